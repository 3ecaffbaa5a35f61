"""A budget in step time: times of steps become a macs_ratio on the device, which a run that goes on keeps."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from laconic import Budget, BudgetConfig, CompressionConfig, StageConfig
from laconic.trainer.build.build import build
from laconic.trainer.build.step_target import with_macs
from laconic.trainer.build.validate import validate
from laconic.trainer.errors import RecipeError
from laconic.trainer.measure.calibration import Calibration, macs_ratio_at, monotone
from laconic.trainer.measure.step_time import calibration_of
from laconic.trainer.recipe.files import load
from laconic.trainer.run import train
from laconic.trainer.run_folder import RunFolder
from tests.matrix import dense

POINTS = ((0.2, 0.4), (0.4, 0.35), (0.6, 0.7), (1.0, 1.1))
# The time of a dense step is a fifth overhead, here in operations.
OVERHEAD = 4e6


def test_times_that_fall_are_pooled_and_targets_lie_on_straight_lines_between() -> None:
    assert monotone(POINTS) == pytest.approx([(0.2, 0.375), (0.4, 0.375), (0.6, 0.7), (1.0, 1.1)])
    for target, macs in ((0.375, 0.4), (0.5, 0.4 + 0.2 * 0.125 / 0.325), (0.7, 0.6), (1.0, 0.9), (1.2, 1.0), (0.1, 0.2)):
        assert macs_ratio_at(target, POINTS) == pytest.approx(macs)


def test_a_target_below_the_floor_is_refused_with_the_floor() -> None:
    Calibration(0.4, POINTS, 1.0, 1, "cpu").check()
    with pytest.raises(RecipeError, match=r"budget.target = 0.3 of the dense step's time cannot be met on cpu: .* still takes 0.375"):
        Calibration(0.3, POINTS, 1.0, 1, "cpu").check()
    with pytest.raises(RecipeError, match=r"budget.start = 0.2 of the dense step's time cannot be met on cpu: .* still takes 0.375"):
        Calibration(0.5, POINTS, 1.0, 1, "cpu").check(0.2)


def test_the_target_and_the_start_of_a_schedule_are_calibrated_and_full_length_stays_full_length() -> None:
    overrides = ["budget.measure=step_time", "budget.target=0.5", "budget.schedule=linear", "budget.start=0.7"]
    for start, macs in ((0.7, 0.6), (1, 1.0)):
        budget = with_macs(load("vit_digits", [*overrides, f"budget.start={start}"]).recipe, Calibration(0.5, POINTS, 1.0, 1, "")).budget
        assert budget is not None
        assert (budget.measure, budget.target, budget.start) == ("macs_ratio", pytest.approx(0.4 + 0.2 * 0.125 / 0.325), macs)


def test_a_budget_of_python_code_and_stairs_in_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="budget.measure = 'step_time' depends on the device, and is calibrated by laconic train"):
        Budget(BudgetConfig(measure="step_time"), dense("vit"), CompressionConfig([StageConfig(layer=1)]))
    with pytest.raises(
        ValueError, match=r"budget.increment = 0.1 is a part of the tokens, and budget.measure = 'step_time' counts seconds"
    ):
        BudgetConfig(measure="step_time", schedule="linear", increment=0.1)


def _operations(step: Callable[[], None], device: torch.device) -> float:
    """Seconds of a step on a device of 10¹² operations a second."""
    with FlopCounterMode(display=False) as counter:
        step()
    return (counter.get_total_flops() + OVERHEAD) / 1e12


def test_steps_that_train_compiled_are_not_measured_otherwise() -> None:
    recipe = load("vit_digits", ["budget.measure=step_time", "trainer.compile=true"]).recipe
    for check in (validate, lambda recipe: calibration_of(recipe, RunFolder(Path()), None, Console(), resumed=False)):
        with pytest.raises(RecipeError, match="steps that are not compiled, and trainer.compile = true .*set trainer.compile=false or"):
            check(recipe)
    taught = load("vit_digits", ["budget.measure=step_time", "distillation={teacher: self}"]).recipe
    with pytest.raises(RecipeError, match="measures steps without a teacher, and distillation adds the teacher's forward to each: remove"):
        validate(taught)


@pytest.mark.parametrize(
    ("stages", "target"),
    [("{layer: 1, scorer: learned, selector: gumbel}, {layer: 2, tokens: 2, scorer: learned}", 0.9), ("{layer: 4, scorer: learned}", 0.2)],
)
def test_a_time_is_not_refused_by_the_macs_that_stand_for_it_before_it_is_measured(stages: str, target: float, quick: list[str]) -> None:
    given = [
        *quick,
        "model.config.num_hidden_layers=6",
        f"compression.stages=[{stages}]",
        f"budget.target={target}",
        "budget.regularizer=null",
    ]
    for measure, refused in (("macs_ratio", True), ("step_time", False)):
        recipe = load("vit_digits", [*given, f"budget.measure={measure}"]).recipe
        for check in (validate, build):
            with pytest.raises((RecipeError, ValueError), match="cannot be met") if refused else contextlib.nullcontext():
                check(recipe)


@pytest.mark.parametrize("selector", ["top_k", pytest.param("gumbel", marks=pytest.mark.slow)])
def test_a_requested_step_time_is_met_and_a_run_that_goes_on_keeps_its_calibration(
    selector: str, tmp_path: Path, quick: list[str], console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("laconic.trainer.measure.bench._timed", _operations)
    for name in ("bench.WARM_UP_ROUNDS", "step_time._FIRST_ROUNDS", "step_time._ROUNDS"):
        monkeypatch.setattr(f"laconic.trainer.measure.{name}", 1)
    router = ["compression.stages.0.scorer=learned", f"compression.stages.0.selector={selector}"]
    loaded = load(
        "vit_digits",
        [*quick, *router, "baselines=[]", "trainer.bench_rounds=1", "trainer.pictures=0", "budget.measure=step_time", "budget.target=0.7"],
    )
    assert any("training measures steps on its device first" in remark for remark in validate(loaded.recipe).remarks)
    train(loaded, [], console)
    run = RunFolder(tmp_path / "run")
    found = json.loads(run.report.read_text())["step_time"]["target"]
    assert 0.2 < found["macs_ratio"] < 0.7
    if selector == "top_k":
        # A router of gumbel, trained for two steps, does not keep what it should yet.
        assert found["measured"] == pytest.approx(0.7, abs=0.03)
    stored = Calibration.from_dict(json.loads(run.step_time.read_text()))
    assert stored.macs_ratio == found["macs_ratio"]
    # Another device.
    monkeypatch.setattr("laconic.trainer.measure.bench._timed", lambda step, device: 1.0)
    assert calibration_of(loaded.recipe, run, None, console, resumed=True)[0] == stored
    assert "measure: step_time" in run.recipe.read_text()
    run.step_time.unlink()
    with pytest.raises(RecipeError, match=r"step_time.json, which says what a step takes on the device, is gone or damaged"):
        calibration_of(loaded.recipe, run, None, console, resumed=True)


@pytest.mark.slow
def test_a_requested_step_time_is_measured_on_a_real_device(tmp_path: Path, quick: list[str], console: Console) -> None:
    large = ["model.config.patch_size=2", "model.config.hidden_size=64", "model.config.intermediate_size=256", "trainer.bench_seconds=1"]
    settings = ["baselines=[]", "trainer.bench_rounds=8", "budget.measure=step_time", "budget.target=0.8"]
    train(load("vit_digits", [*quick, *large, *settings]), [], console)
    found = json.loads((tmp_path / "run" / "report.json").read_text())["step_time"]["target"]
    assert found["floor"] <= 0.8
    assert 0 < found["macs_ratio"] < 1
    assert found["low"] <= found["measured"] <= found["high"]
