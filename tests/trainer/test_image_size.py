"""Models of another image size than their weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import interpolate

from laconic.trainer.build.build import build, model_config
from laconic.trainer.recipe.files import load
from laconic.trainer.recipe.schema import ModelRecipe
from laconic.trainer.run_folder import load_model
from laconic.trainer.tasks.base import task_named
from tests.matrix.vision import BACKBONES, FAMILIES, IMAGE, PATCH, dense, images
from tests.trainer.conftest import QUICK

RESIZED = [name for name in BACKBONES if name not in ("beit", "vit_mae")]


@pytest.mark.parametrize("family", [pytest.param(name, marks=[] if name in ("vit", "clip") else pytest.mark.slow) for name in RESIZED])
def test_trained_positions_are_interpolated_as_transformers_does_it(family: str, tmp_path: Path) -> None:
    model, task = dense(family), task_named("image_classification")
    model.save_pretrained(tmp_path)
    recipe = ModelRecipe(name=str(tmp_path), image_scale=0.5)
    small = task.loaded_model(recipe, model_config(recipe, task)).eval()
    pixels = interpolate(images(), size=(IMAGE // 2, IMAGE // 2))
    # DINOv2 interpolates in every forward.
    asked = {} if family.startswith("dinov2") else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        assert torch.allclose(small(pixels).logits, model(pixels, **asked).logits, atol=1e-5)
    small.save_pretrained(tmp_path / "small")
    again = load_model(tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(again(pixels).logits, small(pixels).logits)
    positions = [value for name, value in again.named_parameters() if "position_embedding" in name]
    assert positions[0].numel() // positions[0].shape[-1] == (IMAGE // 2 // PATCH) ** 2 + {"siglip": 0, "deit": 2}.get(family, 1)
    assert FAMILIES[family].architecture == type(again).__name__


def test_an_image_size_that_a_task_or_model_cannot_have_is_refused(tmp_path: Path) -> None:
    dense("beit").save_pretrained(tmp_path)
    task = task_named("image_classification")
    recipe = ModelRecipe(name=str(tmp_path), image_scale=0.5)
    with pytest.raises(ValueError, match=r"model.image_scale = 0.5: the positions of a beit with weights cannot be interpolated"):
        model_config(recipe, task)
    for name, message in (
        ("segment_digits", "model.image_scale = 0.5 would change the pixels that task = semantic_segmentation is about"),
        ("llm_pretrain", "is for LLaVA and image classifiers, and the model is a llama"),
    ):
        with pytest.raises(ValueError, match=message):
            build(load(name, ["model.image_scale=0.5", "data.train_samples=128"]).recipe)
    with pytest.raises(ValueError, match="data.canvas.size = 32 does not fit model.config: image_size = 16"):
        build(load("vit_digits", [*QUICK, "model.config.image_size=16"]).recipe)
