"""Training steps at several lengths: exponents, what is measured, and lengths that a model or a memory cannot have."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import PretrainedConfig
from typer.testing import CliRunner

from laconic.trainer.cli.app import app
from laconic.trainer.errors import RecipeError
from laconic.trainer.measure import lengths
from laconic.trainer.measure.bench import ArmTimes, Bench, Ratio
from laconic.trainer.measure.lengths import Exponent, Lengths, Point, at_lengths, bench_lengths
from laconic.trainer.recipe.files import load
from laconic.trainer.show.lengths import lengths_table
from laconic.trainer.tasks.base import task_named
from tests.trainer.conftest import QUICK
from tests.trainer.small_recipes import small

ONE = Ratio(1.0, 1.0, 1.0)


def _bench(tokens: int) -> Bench:
    """Dense steps that grow with the square of the tokens, others with the tokens."""
    times = ArmTimes(tokens / 1e3, tokens / 2e3, ONE, ONE, ONE)
    memory = {"dense": 4 * tokens**2, "compressed": 8 * tokens, "compressed/oracle": 4 * tokens}
    return Bench(tokens**2 / 1e6, {"compressed": times}, memory, "saved_for_backward", 2, tokens)


def test_exponents_are_slopes_of_logarithms_with_an_interval_from_three_points_on() -> None:
    found = Exponent.of([1, 2, 4, 8], [3, 12, 48, 192])
    assert found is not None
    assert (found.value, found.interval) == (pytest.approx(2), pytest.approx(0, abs=1e-6))
    noisy = Exponent.of([1, 2, 4], [1, 3, 4])
    assert noisy is not None
    # Against the textbook: slope 1, residuals a third of log(9 / 8) · (−1, 2, −1), and t = 12.706 with one degree of freedom.
    deviation = torch.tensor([0.0, 3.0, 4.0])
    deviation[0] = 1.0
    rest = torch.log(deviation) - torch.log(deviation).mean() - torch.log(torch.tensor([1.0, 2.0, 4.0])) + torch.log(torch.tensor(2.0))
    assert noisy.value == pytest.approx(1)
    assert noisy.interval == pytest.approx(12.706 * float(rest.square().sum().sqrt()) / (2**0.5 * 0.693147), rel=1e-3)
    assert Exponent.of([1, 2], [1, 2]) == Exponent(pytest.approx(1), None)
    assert Exponent.of([1], [1]) is None


def test_a_result_has_exponents_of_all_three_and_a_length_without_memory_is_a_row_with_its_reason() -> None:
    points = [Point(length, length, _bench(length)) for length in (256, 512, 1024)]
    found = Lengths("llm", "tokens", 4, [*points, Point(2048, 2048, None, "not enough memory")])
    exponents = found.to_dict()["exponents"]
    assert [exponents["dense"][what]["value"] for what in ("seconds", "memory")] == pytest.approx([2, 2])
    assert [exponents["oracle"]["memory"]["value"], exponents["compressed"]["seconds"]["value"]] == pytest.approx([1, 1])
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(lengths_table(found))
    shown = console.export_text()
    assert "not enough memory" in shown
    assert "2.00 ± 0.00 in time" in shown


def test_out_of_memory_ends_the_measurement_without_a_failure(monkeypatch: pytest.MonkeyPatch, console: Console) -> None:
    loaded = load("vit_digits", [*QUICK, "baselines=[]", "budget.target=0.8"])

    def measured(parts: Any, recipe: Any, console: Console, batch: Any) -> Bench:
        side = batch["pixel_values"].shape[-1]
        if side == 16:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory")
        return _bench(side)

    monkeypatch.setattr(lengths, "bench_models", measured)
    found = bench_lengths(loaded, at_lengths(loaded, [8, 16, 32]), console)
    assert [point.reason for point in found.points] == ["", "not enough memory", "not measured: a shorter one has not enough memory"]
    assert [point.tokens for point in found.points] == [2 * 2 + 1, 4 * 4 + 1, 8 * 8 + 1]
    monkeypatch.setattr(lengths, "memory_here", lambda: 1000)
    assert "GiB of activations" in bench_lengths(loaded, at_lengths(loaded, [8]), console).points[0].reason


@pytest.mark.parametrize(
    ("name", "given", "measured"),
    [
        ("vit_digits", "16,24", [17, 37]),
        pytest.param("llm_pretrain", "32,48", [32, 48], marks=pytest.mark.slow),
        pytest.param("segment_digits", "16,24", [17, 37], marks=pytest.mark.slow),
    ],
)
def test_the_command_measures_every_length_and_writes_data_and_plots(name: str, given: str, measured: list[int], tmp_path: Path) -> None:
    overrides = [item for item in small(name, tmp_path, QUICK) if not item.startswith(("trainer.bench_rounds", "baselines"))]
    to = tmp_path / "lengths.json"
    done = CliRunner().invoke(app, ["bench", name, *overrides, "--lengths", given, "--rounds", "1", "--to", str(to)])
    assert done.exit_code == 0, done.output
    found = json.loads(to.read_text())
    assert [point["tokens"] for point in found["points"]] == measured
    assert all(point["memory"]["oracle"] < point["memory"]["dense"] for point in found["points"])
    assert all(set(point["seconds"]) == {"dense", "compressed", "oracle"} for point in found["points"])
    assert (tmp_path / "lengths.png").is_file()
    assert (tmp_path / "lengths.svg").is_file()


def test_lengths_that_a_model_or_task_cannot_have_are_refused() -> None:
    message = "--lengths 30: the side of an image must be a multiple of the model's patches, which have 4 pixels"
    with pytest.raises(RecipeError, match=message):
        at_lengths(load("vit_digits", [*QUICK, "baselines=[]"]), [30])
    chats = load("vlm_digits", ["baselines=[]"]).recipe
    with pytest.raises(ValueError, match="task = vision_language has inputs of no one length"):
        task_named("vision_language").at_length(chats, PretrainedConfig(), 64)
    recipe = at_lengths(load("text_classify", ["baselines=[]"]), [1024])[1024]
    assert recipe.model.config is not None
    assert recipe.model.config["max_position_embeddings"] == 1024
    for given, message in (
        (["--lengths", "1"], "'1' must be a number of 2 or more"),
        (["--lengths", "16", "--prefill"], "give one of them"),
    ):
        done = CliRunner().invoke(app, ["bench", "vit_digits", *given])
        assert (done.exit_code, message in done.output) == (2, True), done.output
