"""Runs with layers that are left out: trained beside LoRA, evaluated, and exported as ordinary, shallower models."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from transformers import ViTForImageClassification

from laconic.modules.stage import stages_of
from laconic.trainer.build.trainable import check_lora
from laconic.trainer.build.validate import validate
from laconic.trainer.errors import RecipeError
from laconic.trainer.evaluate import evaluate
from laconic.trainer.export.export import export
from laconic.trainer.recipe.files import load
from laconic.trainer.run import train
from laconic.trainer.run_folder import RunFolder, load_model

LEFT_OUT = "compression.stages=[{layer: [1, 2], site: around, keep: 0}]"


@pytest.mark.slow
@pytest.mark.usefixtures("quick_exports")
def test_a_run_without_a_layer_is_evaluated_and_exported_as_an_ordinary_shallower_model(
    tmp_path: Path, quick: list[str], console: Console
) -> None:
    given = [*quick, "baselines=[]", LEFT_OUT, "model.config.num_hidden_layers=3"]
    report = train(load("vit_digits_dense", given), given, console)
    assert report is not None
    found, run = report.to_dict(), str(tmp_path / "run")
    assert found["keep"]["achieved"] == {"around_1": 0.0, "around_2": 0.0}
    assert found["parameters"]["rest"]["trainable"] < found["parameters"]["rest"]["total"]
    # What validate estimates is what trains.
    assert validate(load("vit_digits_dense", given).recipe).trainable == sum(group["trainable"] for group in found["parameters"].values())
    variants = evaluate(run, RunFolder.open(run).read_recipe(), console)["variants"]
    assert set(variants) == {"compressed", "dense"}
    assert variants["compressed"]["accuracy"] == pytest.approx(found["quality"]["compressed"])
    assert export(run, str(tmp_path / "plain"), "plain")["max_abs_reload_diff"] < 1e-5
    assert ViTForImageClassification.from_pretrained(tmp_path / "plain").config.num_hidden_layers == 1


@pytest.mark.slow
def test_shortcuts_of_layers_that_are_left_out_are_fitted_and_trained(tmp_path: Path, quick: list[str], console: Console) -> None:
    shortcut = "compression.stages=[{layer: 1, site: around, keep: 0, shortcut: linear}]"
    given = [*quick, "baselines=[]", shortcut, "model.config.num_hidden_layers=3"]
    report = train(load("vit_digits_dense", given), given, console)
    assert report is not None
    found, run = report.to_dict(), RunFolder.open(str(tmp_path / "run"))
    assert found["fitted"]["shortcuts"].keys() == {"around_1"}
    assert found["parameters"]["routers"]["trainable"] == found["parameters"]["routers"]["total"] > 0
    assert validate(load("vit_digits_dense", given).recipe).trainable == sum(group["trainable"] for group in found["parameters"].values())
    (stage,) = stages_of(load_model(str(run.path))).values()
    assert stage.shortcut is not None
    assert stage.shortcut.fitted
    with pytest.raises(RecipeError, match="around_1 keeps 0.000 of its tokens in evaluation"):
        export(str(run.path), str(tmp_path / "plain"), "plain")


def test_routers_alone_are_refused_where_no_stage_has_one() -> None:
    recipe = load("llm_lora_dense", [LEFT_OUT, "model.name=any", "lora={mode: routers}"]).recipe
    with pytest.raises(RecipeError, match="all stages have keep = 0, which need none: set lora.mode=lora"):
        check_lora(recipe)
