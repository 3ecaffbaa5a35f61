"""One checkpoint at any keep: loading, exporting and sweeping."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import PreTrainedModel
from typer.testing import CliRunner

from laconic import CompressionConfig, StageConfig, Trace, compress, from_pretrained, set_keep, stages_of
from laconic.trainer.cli.app import app
from laconic.trainer.errors import RecipeError
from laconic.trainer.recipe.files import load
from laconic.trainer.run import train_arm
from laconic.trainer.show.sweep import draw, swept
from tests.matrix import decoders, dense, images
from tests.trainer.export_runs import written_run


def _model() -> PreTrainedModel:
    return compress(dense("vit"), CompressionConfig([StageConfig(layer=1, keep=0.5, scorer="learned"), StageConfig(layer=2, keep=0.5)]))


def test_a_model_loaded_with_another_keep_is_the_one_whose_trace_requests_it_and_saves_it(tmp_path: Path) -> None:
    _model().save_pretrained(tmp_path / "model")
    trained = from_pretrained(tmp_path / "model")
    wanted = trained(images(), trace=Trace(keep={"before_1": 0.25, "before_2": 0.25})).logits
    fewer = from_pretrained(tmp_path / "model", keep=0.25)
    assert torch.equal(fewer(images()).logits, wanted)
    fewer.save_pretrained(tmp_path / "fewer")
    assert torch.equal(from_pretrained(tmp_path / "fewer")(images()).logits, wanted)
    one = from_pretrained(tmp_path / "model", keep={"before_2": 0.25})
    assert torch.equal(one(images()).logits, trained(images(), trace=Trace(keep={"before_2": 0.25})).logits)
    assert not torch.equal(wanted, trained(images()).logits)


def test_stages_with_one_decision_have_the_keep_of_the_one_that_decides(tmp_path: Path) -> None:
    block = {"layer": [0, 1, 2], "site": "around", "keep": 0.5, "scorer": "learned", "share": True}
    model = compress(dense("vit"), CompressionConfig([block]))
    set_keep(model, {"around_0": 0.25, "around_2": 0.25})
    assert [stage.config.keep for stage in stages_of(model).values()] == [0.25] * 3
    model.save_pretrained(tmp_path)
    assert torch.equal(from_pretrained(tmp_path)(images()).logits, model(images()).logits)
    for wrong in ({"around_1": 0.5}, {"around_0": 0.75, "around_1": 0.5}):
        with pytest.raises(ValueError, match="keep of stage 'around_1' = 0.5 differs from 0.[27]5 of 'around_0', which decides for both"):
            set_keep(model, wrong)
    assert [stage.config.keep for stage in stages_of(model).values()] == [0.25] * 3


def test_keeps_that_a_stage_cannot_have_are_refused() -> None:
    with pytest.raises(ValueError, match=r"keep of stage 'before_1' = 1.5 must be in \(0, 1\]"):
        set_keep(_model(), 1.5)
    with pytest.raises(ValueError, match="keep names before_7, and the stages are before_1, before_2"):
        set_keep(_model(), {"before_7": 0.5})
    with pytest.raises(ValueError, match="keep names no stage: give a keep for all stages, or keeps by the name of a stage"):
        set_keep(_model(), {})
    with pytest.raises(ValueError, match="the model has none"):
        set_keep(dense("vit"), 0.5)
    for selector in ("gumbel", {"name": "threshold", "calibrate": False}):
        held = compress(dense("vit"), CompressionConfig([StageConfig(layer=1, keep=0.5, scorer="learned", selector=selector)]))
        with pytest.raises(
            ValueError, match="keeps what its router learned, and keep requests other keeps: take top_k, threshold or predictor"
        ):
            set_keep(held, 0.4)


@pytest.mark.parametrize("selector", ["threshold", pytest.param("predictor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["vit", "llama"])
def test_a_model_with_thresholds_keeps_what_is_requested_at_any_keep(name: str, selector: str, tmp_path: Path) -> None:
    scorer, site = ("learned", "before") if name == "vit" else ("linear", "around")
    stages = [StageConfig(layer=layer, keep=0.5, scorer=scorer, selector=selector, site=site) for layer in (1, 2)]
    model = compress((dense if name == "vit" else decoders.dense)(name), CompressionConfig(stages)).train()
    generator = torch.Generator().manual_seed(0)
    for stage in stages_of(model).values():
        for parameter in stage.scorer.parameters():
            parameter.data.normal_(0, 1, generator=generator)
    batch = torch.randn(16, *images().shape[1:], generator=generator) if name == "vit" else torch.randint(48, (16, 24), generator=generator)
    for step in range(100):
        keep = 0.1 + 0.8 * (7 * step % 25) / 25
        with torch.no_grad():
            model(batch, trace=Trace(step=step, keep=dict.fromkeys(stages_of(model), keep)))
    model.save_pretrained(tmp_path)
    for keep in (0.2, 0.5, 0.8):
        fewer, trace = from_pretrained(tmp_path, keep=keep), Trace()
        fewer(batch, trace=trace)
        # An untrained predictor chooses other tokens than the scores, so that later stages see others than in training.
        for routing in list(trace.routings.values())[: 1 if selector == "predictor" else None]:
            kept = (routing.kept_mask & routing.routable).sum() / routing.routable.sum()
            assert float(kept) == pytest.approx(keep, abs=0.12 if name == "vit" else 0.06)
        fewer.save_pretrained(tmp_path / "fewer")
        assert torch.equal(from_pretrained(tmp_path / "fewer")(batch).logits, fewer(batch).logits)


def test_a_keep_for_which_a_threshold_has_seen_no_score_is_refused() -> None:
    model = compress(
        decoders.dense("llama"), CompressionConfig([StageConfig(layer=1, site="around", keep=1.0, scorer="linear", selector="threshold")])
    )
    ids = torch.arange(2, 40)[None]
    model.eval()(ids)
    with pytest.raises(ValueError, match="its threshold has seen no score"):
        model(ids, trace=Trace(keep={"around_1": 0.5}))
    set_keep(model, 0.5)
    with pytest.raises(ValueError, match="its threshold has seen no score"):
        model(ids)


@pytest.mark.slow
def test_an_export_at_another_keep_has_it_and_no_figure_of_the_trained_one(tmp_path: Path) -> None:
    run = written_run(tmp_path / "run", _model())
    report = (run / "report.json").read_bytes()
    done = CliRunner().invoke(app, ["export", str(run), "--to", str(tmp_path / "out"), "--keep", "0.25"])
    assert done.exit_code == 0, done.output
    assert (run / "report.json").read_bytes() == report
    assert [stage.config.keep for stage in from_pretrained(tmp_path / "out").modules() if hasattr(stage, "merger")] == [0.25, 0.25]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "0.2500 requested, not measured" in card
    assert "0.8765" not in card


def test_a_sweep_is_ten_keeps_and_a_curve(tmp_path: Path) -> None:
    assert swept("0.1:1.0") == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    for wrong in ("0.1", "0.5:0.1", "0:1", "a:b"):
        with pytest.raises(RecipeError, match=f"--sweep {wrong}"):
            swept(wrong)
    with pytest.raises(RecipeError, match=r"--sweep 0.0002:1: keeps have three decimals, so that the lowest must be at least 0.001"):
        swept("0.0002:1")
    assert swept("0.001:1")[0] == 0.001
    variants = {f"keep {keep}": {"macs_ratio": keep, "accuracy": keep} for keep in swept("0.1:1")}
    result = {
        "target": "run",
        "split": "test",
        "metric": "accuracy",
        "variants": {**variants, "dense": {"macs_ratio": 1.0, "accuracy": 1.0}},
    }
    draw(result, tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").size[0] > 500


@pytest.mark.slow
def test_the_command_sweeps_a_run(tmp_path: Path, quick: list[str], console: Console) -> None:
    run = tmp_path / "run"
    train_arm(load("vit_digits", quick), "arm", run, console)
    done = CliRunner().invoke(app, ["evaluate", str(run), "--sweep", "0.2:1", "--plot", str(tmp_path / "curve.png")])
    assert done.exit_code == 0, done.output
    assert all(f"evaluating keep {keep:g} " in done.output for keep in swept("0.2:1"))
    assert (tmp_path / "curve.png").is_file()
