"""Every family that has a classifier trains from a local folder of weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from laconic import Trace, stages_of
from laconic.trainer.build.build import build
from laconic.trainer.build.validate import validate
from laconic.trainer.errors import RecipeError
from laconic.trainer.recipe.files import load
from laconic.trainer.tasks.base import task_named
from tests.data.folders import image_folder
from tests.matrix import BACKBONES, FAMILIES, IMAGE, LAYERS, dense

CLASSIFIERS = [family for family in BACKBONES if FAMILIES[family].architecture.endswith("ForImageClassification")]


def _overrides(family: str, tmp_path: Path) -> list[str]:
    dense(family).save_pretrained(tmp_path / family)
    (tmp_path / family / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}))
    return [
        f"model.name={tmp_path / family}",
        f"data.data_dir={image_folder(tmp_path / 'images')}",
        "data.batch_size=4",
        "data.workers=0",
        "trainer.max_epochs=null",
        "trainer.max_steps=1",
        f"compression.stages=[{{layer: 1, scorer: evidence}}, {{layer: {LAYERS - 1}, scorer: random}}]",
        f"output={tmp_path / 'run'}",
    ]


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_local_folder_of_any_family_builds_and_takes_a_training_step(family: str, tmp_path: Path) -> None:
    recipe = load("vit_image_folder", _overrides(family, tmp_path)).recipe
    parts = build(recipe)
    assert list(stages_of(parts.model)) == ["before_1", f"before_{LAYERS - 1}"]
    loaded = dict(parts.model.named_parameters())
    kept = {name: parameter for name, parameter in dense(family).named_parameters() if "classifier" not in name}
    assert {name: torch.equal(parameter, loaded[name]) for name, parameter in kept.items()} == dict.fromkeys(kept, True)
    batch = [parts.data.train[index] for index in range(4)]
    pixels = torch.stack([row["pixel_values"] for row in batch])
    assert pixels.shape == (4, 3, IMAGE, IMAGE) == (4, *task_named(parts.recipe.task).probe(parts.model.config)["pixel_values"].shape[1:])
    # Noise of mean a half, normalised by the folder's own processor.
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx([0.5, 0.0, -0.25], abs=0.1)
    labels = torch.tensor([0, 1, 2, 0])
    trace = Trace(noise=1.0, labels=labels)
    out = parts.model.train()(pixel_values=pixels, labels=labels, trace=trace)
    assert out.logits.shape == (4, 3)
    assert trace.auxiliary_loss is not None
    (out.loss + trace.auxiliary_loss).backward()
    assert all(parameter.grad is not None for name, parameter in parts.model.named_parameters() if "classifier" in name)
    assert parts.cost().macs_ratio == pytest.approx(0.65, abs=0.03)


@pytest.mark.parametrize(("family", "cure"), [("vit_mae", "set model.encoder_of")])
def test_a_family_without_a_classifier_says_what_to_take(family: str, cure: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, RecipeError), match=cure):
        validate(load("vit_image_folder", _overrides(family, tmp_path)).recipe)


def test_a_slip_in_the_vision_tower_s_settings_names_the_nearest() -> None:
    overrides = ["model.name=null", "model.config={model_type: siglip, vision_config: {hiden_size: 16}}", "data.data_dir=images"]
    with pytest.raises((ValueError, RecipeError), match=r"model\.config\.vision_config\.hidden_size"):
        validate(load("vit_image_folder", overrides).recipe)
