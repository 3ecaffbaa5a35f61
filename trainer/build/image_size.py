"""Another size of a model's images; position embeddings of a trained vision tower are interpolated."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ...modules.backbones import families
from ...modules.backbones.vision import VisionModel
from ..recipe.schema import ModelRecipe


def scaled_side(side: int, patch: int, scale: float) -> int:
    """Side of scaled images in pixels, in whole patches."""
    return side if scale == 1 else round(side / patch * scale) * patch


def scale_images(recipe: ModelRecipe, config: PretrainedConfig) -> None:
    """Applies ``model.image_scale`` to a config, in place.

    Raises:
        ValueError: the model has no images of one size that can be changed, or not one patch is left of them.
    """
    if recipe.image_scale == 1:
        return
    where, adapter = f"model.image_scale = {recipe.image_scale}", families().get(config.model_type)
    if adapter is None or not (issubclass(adapter, VisionModel) or adapter.tower_at is not None):
        raise ValueError(f"{where} is for LLaVA and image classifiers, and the model is a {config.model_type}: remove it")
    if recipe.name is None and adapter.tower_at is not None:
        raise ValueError(f"{where} changes the image size of model.name, which is not set: set the size in model.config")
    if recipe.encoder_of is not None:
        raise ValueError(f"{where} would need other position embeddings than those of {recipe.encoder_of!r}: remove it")
    if recipe.name is not None and issubclass(adapter, VisionModel) and not adapter.interpolates:
        raise ValueError(
            f"{where}: the positions of a {config.model_type} with weights cannot be interpolated: remove it, or set model.config"
        )
    images = sized(config)
    side = scaled_side(images.image_size, images.patch_size, recipe.image_scale)
    if side < 1:
        raise ValueError(f"{where}: not one patch of {images.patch_size} pixels is left of images of {images.image_size}: give more")
    images.image_size = side


def load_at_own_size(load: Callable[[PretrainedConfig], Any], config: PretrainedConfig, own: int) -> Any:
    """Loads a model whose weights are of another image size, and gives it that of ``config``.

    Args:
        load: loads the model for a config; returns the model, or the model and a report.
        config: config of the model, with the new image size.
        own: image size of the weights.
    """
    side = sized(config).image_size
    if own == side:
        return load(config)
    before = copy.deepcopy(config)
    sized(before).image_size = own
    loaded = load(before)
    model: PreTrainedModel = loaded[0] if isinstance(loaded, tuple) else loaded
    adapter = families()[config.model_type]
    base = adapter.base(model)
    _resize(base if adapter.tower_at is None else base.get_submodule(adapter.tower_at), own, side)
    sized(model.config).image_size = side
    return loaded


def sized(config: PretrainedConfig) -> Any:
    """The part of a model's config that has the size of its images."""
    return getattr(config, "vision_config", config)


def _resize(tower: Any, own: int, side: int) -> None:
    """Interpolates the position embeddings of a tower or image classifier from images of one side to another, in place."""
    parts, patch = tower.embeddings, _patch(tower)
    in_module = isinstance(getattr(parts, "position_embedding", None), nn.Embedding)
    old: Tensor = parts.position_embedding.weight if in_module else parts.position_embeddings[0]
    leading, patches = len(old) - (own // patch) ** 2, (side // patch) ** 2
    with torch.no_grad():
        # transformers reads only the shape of the embeddings that it is given.
        new: Tensor = parts.interpolate_pos_encoding(old.new_empty(1, leading + patches, old.shape[1]), side, side).clone()
    if in_module:
        parts.image_size, parts.num_patches, parts.num_positions = side, patches, len(new[0])
        parts.position_embedding = nn.Embedding(*new[0].shape, _weight=new[0])
        parts.position_ids = torch.arange(len(new[0]), device=old.device).expand(1, -1)
    else:
        parts.position_embeddings = nn.Parameter(new)
        for part in (parts, parts.patch_embeddings):
            part.image_size = (side, side)
        parts.patch_embeddings.num_patches = patches
    tower.config.image_size = side


def _patch(tower: Any) -> int:
    size = tower.config.patch_size
    return int(size if isinstance(size, int) else size[0])
