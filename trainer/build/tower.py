"""The vision tower of a new vision-language model: sizes and weights of an image model that was trained before."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ...modules.backbones import families
from ...modules.backbones.llava import TOWERS
from ...modules.checkpoints.adapters import quietly
from ...modules.checkpoints.base_weights import check_weights
from ...modules.checkpoints.foreign_config import load_config
from ...modules.checkpoints.tensors import copy_all
from ...modules.checkpoints.whole_files import DamagedFile
from ..recipe.schema import ModelRecipe
from ..run_folder import RunFolder
from .initial_weights import weights_of

# Models that hold a tower under the names that its own class has.
_IMAGE_MODELS = ("clip", "siglip")
_TRAIN = "train one first, with laconic train vlm_digits_tower for example, or name another run folder, folder of weights or hub model"


def tower_config(recipe: ModelRecipe) -> PretrainedConfig:
    """Config of the vision tower of ``model.tower_of``.

    Raises:
        ValueError: the new model has no tower or has a config of its own for it, or the named model has no supported one.
    """
    assert recipe.config is not None
    given, model_type = f"model.tower_of = {recipe.tower_of!r}", recipe.config["model_type"]
    adapter = families().get(model_type)
    if adapter is None or adapter.tower_at is None:
        raise ValueError(f"{given} is for LLaVA, and model.config.model_type = {model_type!r}: remove it")
    if "vision_config" in recipe.config:
        raise ValueError(f"{given} decides the vision tower, and so does model.config.vision_config: remove one of them")
    try:
        config: Any = load_config(_weights(recipe))
    except DamagedFile as error:
        raise ValueError(f"{given}: {error}; {_TRAIN}") from None
    tower: PretrainedConfig = getattr(config, "vision_config", config)
    if tower.model_type not in TOWERS or config.model_type not in (*_IMAGE_MODELS, *TOWERS):
        raise ValueError(
            f"{given} is a {config.model_type}, and a tower comes from a {', '.join((*_IMAGE_MODELS, *TOWERS))}: name such a model"
        )
    return tower


def with_own_tower(model: ModelRecipe, run: RunFolder | None) -> ModelRecipe:
    """The ``model`` block of a run that goes on: the vision tower is that which the run recorded, and its weights are in the checkpoint.

    Args:
        model: the recipe's block.
        run: the run that goes on; None for a new one.

    Raises:
        DamagedFile: what the run recorded is damaged.
    """
    recorded = None if model.tower_of is None or run is None else run.read_tower()
    if recorded is None:
        return model
    assert model.config is not None
    return model.model_copy(update={"tower_of": None, "config": {**model.config, "vision_config": recorded}})


def load_tower(model: PreTrainedModel, recipe: ModelRecipe) -> None:
    """Copies the weights of the named model's tower into a new vision-language model, in place.

    Raises:
        ValueError: the weights lack some of the tower.
    """
    adapter = families()[model.config.model_type]
    assert adapter.tower_at is not None
    tower: Any = adapter.base(model).get_submodule(adapter.tower_at)
    weights = _weights(recipe)
    check_weights(weights, None)
    # Its head, its routers and a text model are left over, without a warning.
    with quietly():
        loaded: Any = type(tower).from_pretrained(
            weights, config=tower.config, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    source, report = loaded
    if missing := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        raise ValueError(f"model.tower_of = {recipe.tower_of!r} lacks weights of a vision tower: {', '.join(missing[:3])}")
    copy_all(tower.state_dict(), source.state_dict(), f"model.tower_of = {recipe.tower_of!r}")


def _weights(recipe: ModelRecipe) -> str:
    assert recipe.tower_of is not None
    return weights_of("model.tower_of", recipe.tower_of, _TRAIN)
