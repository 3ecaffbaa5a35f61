"""``laconic evaluate``: agreement with a dense model, hard and easy samples, where kept tokens lie, smaller inputs, throughput."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from laconic import CompressionConfig, StageConfig, Trace, compress, decompress
from laconic.trainer.build.build import build
from laconic.trainer.cli.app import app
from laconic.trainer.errors import RecipeError
from laconic.trainer.evaluate import Options, evaluate
from laconic.trainer.measure import forward_times
from laconic.trainer.measure.forward_times import nearest
from laconic.trainer.metrics.kept_places import KeptPlaces, kept_parts
from laconic.trainer.metrics.predictions import Agreement, Groups, PredictionLog, Predictions
from laconic.trainer.recipe.files import load
from laconic.trainer.run_folder import RunFolder
from tests.matrix import decoders
from tests.trainer.conftest import QUICK
from tests.trainer.export_runs import written_run

# Far from zero, so that predictions differ between images and models.
SMALLER = [*QUICK, "data.eval_batch_size=8", "data.eval_samples=48", "baselines=[]", "model.config.initializer_range=1.0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 × 8 patches of which a stage before layer 1 of 2 keeps half, and beside it one of a dense model with other weights."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("compressed", 0), ("dense", 1)):
        model = decompress(
            build(load("vit_digits", [*SMALLER, "compression.stages.0.layer=1", f"seed={seed}", "budget.target=0.8"]).recipe).model
        )
        if name == "compressed":
            compress(model, CompressionConfig([StageConfig(layer=1, scorer="patch_energy", keep=0.5)]))
        written_run(folder / name, model, "vit_digits", *SMALLER, "budget.target=0.8")
    return folder / "compressed"


def _predicted(answers: str, labels: str, sample: list[int] | None = None, sure: float = 2.0) -> Predictions:
    """Predictions of digits, of which later ones have larger margins."""
    logits = torch.zeros(len(answers), 10)
    for place, answer in enumerate(answers):
        logits[place, int(answer)] = sure + place
    return Predictions.of(logits, torch.tensor([int(label) for label in labels]), None if sample is None else torch.tensor(sample))


def test_agreement_counts_wrong_answers_too_and_hard_samples_are_those_that_a_smaller_input_loses() -> None:
    dense, ours, small = _predicted("12345", "12344"), _predicted("12995", "12344"), _predicted("1234"[::-1] + "5", "12344")
    assert dense.margin.tolist() == [2, 3, 4, 5, -6]
    by_margin = Groups.of(dense, None)
    assert (by_margin.hard.tolist(), by_margin.easy.tolist()) == ([True, True, False, False, False], [False, False, True, True, False])
    assert Agreement.of(ours, dense, by_margin) == Agreement(3 / 5, 1.0, 0.0)
    lost = Groups.of(dense, small)
    assert (lost.hard.tolist(), lost.easy.tolist(), lost.by) == ([True] * 4 + [False], [False] * 5, "downsampled")
    assert Agreement.of(ours, dense, lost) == Agreement(3 / 5, 0.5, None)


def test_all_tokens_of_an_answer_count_as_one_sample_over_batches_until_the_limit() -> None:
    log, dense = PredictionLog(limit=4), PredictionLog(limit=4)
    for part in (("121", "111"), ("11", "11"), ("99", "99")):
        log.add(_predicted(*part, sample=[3, 3, 8][: len(part[0])]))
        dense.add(_predicted(part[1], part[1], sample=[3, 3, 8][: len(part[0])]))
    ours, theirs = log.whole, dense.whole
    assert ours is not None
    assert theirs is not None
    assert log.cut
    assert ours.sample.tolist() == [0, 0, 1, 2, 2]
    assert ours.right_samples.tolist() == [False, True, True]
    assert ours.margins.tolist() == [-3.0, 4.0, 2.0]
    assert Agreement.of(ours, theirs, Groups.of(theirs, theirs)).agreement == 2 / 3
    assert PredictionLog().whole is None


@pytest.mark.parametrize(("site", "scope", "kept"), [("around", "all", (6, 6, 0, 0)), ("before", "prompt", (6, 6, 0, 2))])
def test_kept_places_of_text_are_shares_of_its_length_without_padding(site: str, scope: str, kept: tuple[int, ...]) -> None:
    stage = StageConfig(
        layer=1, site=site, scope=scope, scorer="first", keep=0.5, protect={"first": 0, **({"last": 1} if scope == "prompt" else {})}
    )
    model = decoders.spread(compress(decoders.dense("llama"), CompressionConfig([stage])))
    ids, trace = decoders.tokens(2, 16), Trace(lookahead=True)
    mask = torch.ones_like(ids)
    # Rows of sixteen and eight tokens, of which the first half is kept; the last token of a prompt too.
    mask[1, 8:] = 0
    trace.labels = torch.full_like(ids, -100)
    model(input_ids=ids, attention_mask=mask, trace=trace)
    places = KeptPlaces()
    places.add(kept_parts(trace, mask.sum(1)))
    found = places.bias[f"{site}_1"]
    assert found["by_part"] == pytest.approx([number / sum(kept) for number in kept])
    assert found["length"] == pytest.approx(0.5 if site == "around" else 12 / 14 - 0.5)


@pytest.mark.parametrize(("speed", "found"), [(0.2, 5), (0.21, 5), (0.15, 7), (1.0, 1), (0.01, 16)])
def test_the_nearest_size_in_time_is_found_by_few_measurements(speed: float, found: int) -> None:
    seen: list[int] = []

    def ratio(size: int) -> float:
        seen.append(size)
        return size * speed

    assert nearest(range(1, 17), ratio) == found
    assert len(seen) == len(set(seen)) <= 6


def _fake_times(steps: Mapping[str, Callable[[], None]], device: torch.device, rounds: int, *rest: Any) -> dict[str, list[float]]:
    """Seconds by the number of tokens that the first layer of the MLPs has read."""
    times = {}
    for name, step in steps.items():
        read: list[float] = []
        hook = torch.nn.modules.module.register_module_forward_hook(
            lambda module, given, out, read=read: read.append(out.shape[1]) if getattr(module, "out_features", 0) == 32 else None
        )
        step()
        hook.remove()
        times[name] = [sum(read) / 100] * rounds
    return times


def test_variants_beside_a_reference_at_equal_tokens(run: Path, console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_times, "paired_times", _fake_times)
    dense = str(run.parent / "dense")
    options = Options(dense=dense, arms=("pooled", "downsampled"), batch_sizes=(1, 24))
    result = evaluate(str(run), RunFolder.open(run).read_recipe(), console, options=options)
    variants = result["variants"]
    assert variants["reference"]["against_reference"]["agreement"] == 1.0
    assert 0 < variants["compressed"]["against_reference"]["agreement"] < 1
    assert result["groups"]["by"] == "downsampled"
    assert result["groups"]["hard"] + result["groups"]["easy"] == round(48 * variants["reference"]["accuracy"]) > 0
    # By definition.
    assert {variants["downsampled"]["against_reference"][group] for group in ("hard", "easy")} <= {0.0, 1.0, None}
    # 64 tokens in a layer and 32 in the other.
    assert variants["pooled"]["input"] == {"equal": "tokens", "size": 48, "whole": 64, "unit": "tokens"}
    assert variants["downsampled"]["input"] == {"equal": "tokens", "size": 28, "whole": 32, "unit": "pixels"}
    assert 0.6 < variants["downsampled"]["macs_ratio"] < 49 / 64
    assert list(variants["compressed"]["position_bias"]["before_1"]) == ["rows", "columns", "by_row", "by_column"]
    speeds = result["throughput"]["batch_sizes"][24]
    assert set(speeds) == {"compressed", "pooled", "downsampled", "dense", "reference"}
    assert speeds["reference"]["speedup"]["median"] == 1.0
    assert speeds["compressed"]["speedup"]["median"] == pytest.approx(2 * 65 / (65 + 33))
    assert speeds["dense"]["rows_per_second"] == speeds["dense"]["per_second"] == pytest.approx(24 / 1.3)


@pytest.mark.slow
def test_arms_of_equal_latency_have_the_size_that_takes_as_long_and_a_plot_has_its_data_beside_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward_times, "paired_times", _fake_times)
    arms = ["--arms", "pooled,downsampled", "--equal", "latency", "--keep", "0.25", "--plot", str(tmp_path / "curve.png")]
    done = CliRunner().invoke(app, ["evaluate", str(run), *arms, "data.eval_samples=8"])
    assert done.exit_code == 0, done.output
    variants = json.loads((tmp_path / "curve.json").read_text())["variants"]
    # The compressed model reads 65 and 33 tokens in its two layers.
    assert variants["pooled"]["input"]["size"] == 48
    assert variants["downsampled"]["input"]["size"] == 28
    assert variants["downsampled"]["input"]["time_ratio"]["median"] == 2 * (7 * 7 + 1) / (65 + 33)
    assert (tmp_path / "curve.svg").is_file()
    assert "where kept tokens lie" in done.output


def test_options_that_a_model_or_task_cannot_have_are_refused(run: Path, console: Console) -> None:
    recipe = RunFolder.open(run).read_recipe()
    with pytest.raises(RecipeError, match=r"--dense .* has stages: name the run of a dense arm"):
        evaluate(str(run), recipe, console, options=Options(dense=str(run)))
    with pytest.raises(RecipeError, match="--arms have as many tokens as the stages leave, and the model has no stages"):
        evaluate(str(run.parent / "dense"), recipe, console, options=Options(arms=("pooled",)))
    for keeps, message in (
        (["--keep", "0.5"], "--keep is of stages, and the model has none"),
        (["--sweep", "0.1:1"], "--sweep 0.1:1 is of stages, and the model has none"),
        (["--sweep", "0.1:1", "--keep", "0.5"], "--keep with --sweep 0.1:1 is of stages, and the model has none"),
    ):
        done = CliRunner().invoke(app, ["evaluate", str(run.parent / "dense"), *keeps])
        assert (done.exit_code != 0, message in done.output) == (True, True), done.output
    for given, message in (
        (["--arms", "uniform"], "--arms uniform: the arms with a smaller input are pooled, downsampled"),
        (["--equal", "latency"], "--equal latency is of --arms, and none is given"),
        (["--arms", "pooled", "--equal", "time"], "--equal time must be tokens or latency"),
        (["--batch-sizes", "1,0"], "--batch-sizes 1,0: '0' must be a number of 1 or more"),
        (["--plot", "curve.pdf", "--keep", "0.5"], "--plot curve.pdf must end in .png or .svg"),
        (["--plot", "curve.png"], "--plot draws the keeps that are measured"),
    ):
        done = CliRunner().invoke(app, ["evaluate", str(run), *given])
        assert (done.exit_code, message in done.output) == (2, True), done.output
