"""Comparisons at equal time: lengths by measured step times, which are kept with what they were measured with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from laconic.trainer.compare import equal_time
from laconic.trainer.compare.arms import arms_of
from laconic.trainer.compare.equal_time import of_equal_time, step_times
from laconic.trainer.errors import RecipeError
from laconic.trainer.recipe.files import load
from laconic.trainer.recipe.schema import Recipe
from laconic.trainer.run_folder import RunFolder
from tests.trainer.conftest import QUICK
from tests.trainer.small_recipes import small


def test_equal_time_sets_steps_by_measured_ratios_and_a_comparison_that_goes_on_has_the_same(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, arms = arms_of("vit_digits", ["dense", "learned"], [])
    asked: list[Sequence[str]] = []

    def measured(recipes: Any, recipe: Recipe) -> dict[str, float]:
        asked.append(list(recipes))
        return {name: {"dense": 2.5, "random": 0.8}[name] for name in recipes}

    monkeypatch.setattr(equal_time, "step_times", measured)
    lengths = {arm.name: arm.load(0).trainer.max_steps for arm in of_equal_time(arms, main.recipe, 500, tmp_path, console)}
    assert lengths == {"dense": 200, "learned": 500}
    again = of_equal_time(arms_of("vit_digits", ["dense", "random"], [])[1], main.recipe, 500, tmp_path, console)
    assert [arm.load(0).trainer.max_steps for arm in again] == [200, 625]
    # What is the recipe itself is not measured.
    assert asked == [["dense"], ["random"]]
    twice = of_equal_time(arms_of("vit_digits", ["learned", "dense", "same=dense"], [])[1], main.recipe, 500, tmp_path, console)
    assert [arm.load(0).trainer.max_steps for arm in twice] == [500, 200, 200]
    assert len(asked) == 2
    compiled = arms_of("vit_digits", ["dense"], ["trainer.compile=true"])[1]
    with pytest.raises(RecipeError, match="arm dense has trainer.compile = true, and --equal time measures steps that are not compiled"):
        of_equal_time(compiled, main.recipe, 500, tmp_path, console)
    timed = arms_of("vit_digits", ["random"], ["budget.measure=step_time"])[1]
    with pytest.raises(RecipeError, match="arm random has budget.measure = step_time, to which each run is calibrated when it trains"):
        of_equal_time(timed, main.recipe, 500, tmp_path, console)
    sandwich = arms_of("vit_digits_elastic", ["learned"], [])[1]
    with pytest.raises(RecipeError, match=r"arm learned has training_keep.also, and --equal time measures steps of one forward: set"):
        of_equal_time(sandwich, load("vit_digits_elastic").recipe, 500, tmp_path, console)
    own = arms_of("vit_digits", ["dense"], ["dense:trainer.max_steps=9"])[1]
    with pytest.raises(RecipeError, match="arm dense has a length of its own, and --equal time sets it"):
        of_equal_time(own, main.recipe, 500, tmp_path, console)


def test_step_times_of_other_settings_are_measured_anew_until_a_run_has_begun(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(equal_time, "step_times", lambda recipes, main: (asked.extend(recipes), dict.fromkeys(recipes, 2.0))[1])

    monkeypatch.setattr(equal_time, "threads", lambda at_once: at_once)
    before = torch.get_num_threads()

    def measure(at_once: int, *overrides: str) -> None:
        main, arms = arms_of("vit_digits", ["dense", "learned"], overrides)
        of_equal_time(arms, main.recipe, 500, tmp_path, console, at_once)

    measure(1)
    # What may differ in a run that goes on is no other setting.
    measure(1, "trainer.log_every=3")
    assert len(asked) == 1
    measure(1, "data.batch_size=8")
    measure(2, "data.batch_size=8")
    assert len(asked) == 3
    run = RunFolder(tmp_path / "dense-0")
    run.path.mkdir()
    run.report.write_text("{}")
    measure(2, "data.batch_size=8")
    for changed in ((1, "data.batch_size=8"), (2, "data.batch_size=16")):
        with pytest.raises(RecipeError, match=r"runs of arm dense have begun, and .*step_times.json has no step time of it with these"):
            measure(*changed)
    (tmp_path / "step_times.json").write_text('{"dense": {"of": "a", "ratio": 0}}')
    with pytest.raises(RecipeError, match=r"step_times.json is damaged \(a ratio is not above 0\): restore it"):
        measure(1)
    assert torch.get_num_threads() == before


@pytest.fixture
def in_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps last as long as they have floating-point operations, and one round is enough."""

    def operations(step: Callable[[], None], device: torch.device) -> float:
        with FlopCounterMode(display=False) as counter:
            step()
        return float(counter.get_total_flops())

    monkeypatch.setattr("laconic.trainer.measure.bench._timed", operations)
    monkeypatch.setattr("laconic.trainer.measure.bench.WARM_UP_ROUNDS", 0)
    monkeypatch.setattr(equal_time, "ROUNDS", 1)


@pytest.mark.usefixtures("in_operations")
@pytest.mark.slow
def test_steps_of_routers_that_decide_the_count_are_timed_at_the_requested_keep() -> None:
    given = [*QUICK, "model.config.patch_size=4", "budget.measure=keep", "budget.target=0.2", "compression.stages.0.scorer=learned"]
    free = load("vit_digits", [*given, "compression.stages.0.selector=gumbel"]).recipe
    # Untrained, gumbel keeps about half.
    assert step_times({"fixed": load("vit_digits", given).recipe}, free)["fixed"] == pytest.approx(1, abs=0.15)


@pytest.mark.usefixtures("in_operations")
@pytest.mark.slow
def test_steps_of_phases_count_by_their_shares() -> None:
    given = [*small("llm_pretrain_dense", Path(), QUICK), "baselines=[]", "trainer.max_steps=10", "data.batch_size=4"]
    dense, patches, bags = (
        load("llm_pretrain_dense", [*given, *own]).recipe
        for own in ([], ["phases=[{share: 0.6, patch_level: 2}, {}]"], ["phases=[{share: 0.5, superposition: 2}, {}]"])
    )
    found = step_times({"patches": patches, "bags": bags}, dense)
    # Half of the rows in three fifths of the steps, and rows of as many bags as tokens.
    assert found["patches"] == pytest.approx(0.7, abs=0.02)
    assert found["bags"] == pytest.approx(1, abs=0.03)
    # The other way round: a recipe with phases, and its dense arm.
    assert step_times({"dense": dense}, patches)["dense"] == pytest.approx(1 / found["patches"], rel=1e-3)
    stages = [
        "budget=null",
        "compression.stages.0.selector=top_k",
        "compression.stages.0.scorer=random",
        "phases=[{share: 0.5, keep: 0.2}, {}]",
    ]
    kept, whole = (
        load("vit_digits", [*QUICK, "model.config.patch_size=4", *own]).recipe for own in (stages, ["compression=null", "budget=null"])
    )
    assert 0.55 < step_times({"kept": kept}, whole)["kept"] < 0.75


@pytest.mark.slow
def test_a_step_on_more_tokens_takes_longer() -> None:
    wide = [*(item for item in QUICK if "hidden_size" not in item), "data.batch_size=64", "budget.target=0.2"]
    recipes = {arm.name: arm.load(0) for arm in arms_of("vit_digits", ["dense", "learned"], wide)[1]}
    # 65 tokens and 13: about three times as long.
    found = step_times(recipes, recipes["learned"])
    assert found["dense"] > 1.3 * found["learned"]
