"""Another size of a model's images: position embeddings of a vision tower are interpolated."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ...modules.backbones import families
from ..recipe.schema import ModelRecipe


def scale_images(recipe: ModelRecipe, config: PretrainedConfig) -> None:
    """Applies ``model.image_scale`` to the config of loaded weights, in place.

    Raises:
        ValueError: the model has no vision tower, or the new side is no multiple of its patches.
    """
    if recipe.image_scale == 1:
        return
    where, adapter = f"model.image_scale = {recipe.image_scale}", families().get(config.model_type)
    if adapter is None or adapter.tower_at is None:
        raise ValueError(f"{where} is for LLaVA, and the model is a {config.model_type}: remove it")
    given: Any = config
    tower = given.vision_config
    patches = round(tower.image_size / tower.patch_size * recipe.image_scale)
    if patches < 1:
        raise ValueError(f"{where}: not one patch of {tower.patch_size} pixels is left of images of {tower.image_size}: give more")
    tower.image_size = patches * tower.patch_size


def load_at_own_size(load: Callable[[PretrainedConfig], Any], config: PretrainedConfig, own: int) -> Any:
    """Loads a vision-language model whose weights are of another image size, and gives it that of ``config``.

    Args:
        load: loads the model for a config; returns the model, or the model and a report.
        config: config of the model, with the new image size.
        own: image size of the weights.
    """
    side = _tower(config).image_size
    if own == side:
        return load(config)
    before = copy.deepcopy(config)
    _tower(before).image_size = own
    loaded = load(before)
    model: PreTrainedModel = loaded[0] if isinstance(loaded, tuple) else loaded
    adapter = families()[config.model_type]
    assert adapter.tower_at is not None
    _resize(adapter.base(model).get_submodule(adapter.tower_at), side)
    _tower(model.config).image_size = side
    return loaded


def _tower(config: PretrainedConfig) -> Any:
    given: Any = config
    return given.vision_config


def _resize(tower: Any, side: int) -> None:
    """Interpolates the position embeddings of a CLIP or SigLIP tower, in place."""
    parts, old = tower.embeddings, tower.embeddings.position_embedding.weight
    class_tokens, patches = parts.num_positions - parts.num_patches, (side // parts.patch_size) ** 2
    with torch.no_grad():
        # transformers reads only the shape of the embeddings that it is given.
        new: Tensor = parts.interpolate_pos_encoding(old.new_empty(1, patches + class_tokens, old.shape[1]), side, side)[0]
    parts.image_size, parts.num_patches, parts.num_positions = side, patches, len(new)
    parts.position_embedding = nn.Embedding(*new.shape, _weight=new.clone())
    parts.position_ids = torch.arange(len(new), device=old.device).expand(1, -1)
    parts.config.image_size = side
