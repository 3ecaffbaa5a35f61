"""Settings laid over a model's own config, checked: transformers keeps unknown ones without a word."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from ...modules.backbones import families

DEPTH = "drop_path_rate"


def check_settings(model_type: str, settings: Iterable[str], key: str) -> None:
    """Refuses what the family's config does not have, since a slip of the pen would train another model.

    Args:
        model_type: of the family.
        settings: their names, or names and values.
        key: of the recipe they stand under, for the message.

    Raises:
        ValueError: with the nearest setting that there is; for stochastic depth, with the families that have it.
    """
    default = AutoConfig.for_model(model_type)
    _check_names(default, model_type, settings, key)
    tower = settings.get("vision_config") if isinstance(settings, Mapping) else None
    if isinstance(tower, Mapping):
        _check_names(default.vision_config, f"{model_type}'s vision tower", tower, f"{key}.vision_config")


def _check_names(default: PretrainedConfig, owner: str, settings: Iterable[str], key: str) -> None:
    known = [name for name in vars(default) if not name.startswith("_")]
    for name in settings:
        if name in known:
            continue
        if name == DEPTH:
            having = ", ".join(families_with_depth()) or "none"
            raise ValueError(
                f"{key}.{name}: {owner} of transformers has no stochastic depth; of the families here that have it there are: {having}. "
                f"Leave it out, or take {key}.hidden_dropout_prob"
            )
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {key}.{near[0]}?" if near else f"its settings are {', '.join(sorted(known))}"
        raise ValueError(f"{key}.{name} is no setting of {owner}; {hint}")


def families_with_depth() -> list[str]:
    """Families with an adapter whose config has a rate of stochastic depth."""
    return [name for name in sorted(families()) if hasattr(AutoConfig.for_model(name), DEPTH)]


def with_settings(config: PretrainedConfig, settings: Mapping[str, Any], model_class: type[PreTrainedModel]) -> PretrainedConfig:
    """A loaded model's config with settings laid over it.

    Args:
        config: of the checkpoint.
        settings: names and values.
        model_class: what is made of it.

    Raises:
        ValueError: a setting is unknown, has a value that the family does not take, or changes the shape of weights that are loaded.
    """
    if not settings:
        return config
    check_settings(config.model_type, settings, "model.settings")
    try:
        changed = type(config).from_dict({**config.to_dict(), **settings})
    except Exception as error:
        # transformers checks its configs with errors of several kinds; each is the user's setting here.
        raise ValueError(f"model.settings: {' '.join(str(error).split())}") from None
    before, after = _shapes(config, model_class), _shapes(changed, model_class)
    differing = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    if differing:
        raise ValueError(
            f"model.settings {', '.join(settings)}: would change the weights that model.name loads ({', '.join(sorted(differing)[:3])} …): "
            "settings of a loaded model are those without weights, dropout for example"
        )
    return changed


def _shapes(config: PretrainedConfig, model_class: type[PreTrainedModel]) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = model_class._from_config(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}
