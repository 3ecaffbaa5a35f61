"""Checks settings that change a model's config: transformers accepts unknown settings silently."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from ...modules.backbones import families

# What a checkpoint or a recipe has of these does not count.
OF_TASK = (
    "architectures", "id2label", "label2id", "num_labels", "output_attentions", "output_hidden_states", "problem_type", "return_dict",
)  # fmt: skip
DEPTH = "drop_path_rate"


def set_outputs(config: PretrainedConfig) -> None:
    """Sets what a model answers with, in place and in all parts: that belongs to the task, whatever a checkpoint was saved with."""
    inner: Any = config
    for one in (inner, *(getattr(inner, name) for name in inner.sub_configs)):
        if one is not None:
            one.return_dict, one.output_hidden_states, one.output_attentions = True, False, False


def check_settings(model_type: str, settings: Iterable[str], key: str) -> None:
    """Refuses settings that the family's config does not have: transformers would ignore a misspelled name and train another model.

    Args:
        model_type: family of the model.
        settings: names of the settings, or names with values.
        key: recipe key that holds the settings, for the message.

    Raises:
        ValueError: a setting is unknown. The message has the nearest name; for stochastic depth, the families that have it.
    """
    default = AutoConfig.for_model(model_type)
    for name in settings:
        if name in OF_TASK:
            raise ValueError(f"{key}.{name} is set by the task and its data: remove it (data.num_labels is the number of classes)")
    _check_names(default, model_type, settings, key)
    for name, part in (("vision_config", "vision tower"), ("text_config", "language model")):
        inner = settings.get(name) if isinstance(settings, Mapping) else None
        if isinstance(inner, Mapping):
            kind = inner.get("model_type")
            config = getattr(default, name) if kind is None else AutoConfig.for_model(kind)
            own = {setting: value for setting, value in inner.items() if setting != "model_type"}
            _check_names(config, f"{model_type}'s {part}", own, f"{key}.{name}")


def _check_names(default: PretrainedConfig, owner: str, settings: Iterable[str], key: str) -> None:
    known = [name for name in vars(default) if not name.startswith("_")]
    for name in settings:
        if name in known:
            continue
        if name == DEPTH:
            having = ", ".join(families_with_depth()) or "none"
            raise ValueError(
                f"{key}.{name}: {owner} of transformers has no stochastic depth; supported families that have it: {having}. "
                f"Remove it, or use {key}.hidden_dropout_prob"
            )
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {key}.{near[0]}?" if near else f"its settings are {', '.join(sorted(known))}"
        raise ValueError(f"{key}.{name} is not a setting of {owner}; {hint}")


def families_with_depth() -> list[str]:
    """Supported families whose config has a rate of stochastic depth."""
    return [name for name in sorted(families()) if hasattr(AutoConfig.for_model(name), DEPTH)]


def with_settings(config: PretrainedConfig, settings: Mapping[str, Any], model_class: type[PreTrainedModel]) -> PretrainedConfig:
    """A loaded model's config with changed settings.

    Args:
        config: config of the checkpoint.
        settings: names and values.
        model_class: class of the model.

    Raises:
        ValueError: a setting is unknown, has an invalid value, or changes the shape of loaded weights.
    """
    if not settings:
        return config
    check_settings(config.model_type, settings, "model.settings")
    try:
        changed = type(config).from_dict({**config.to_dict(), **settings})
    except Exception as error:
        # transformers validates its configs with several exception types; all of them are errors in the recipe here.
        raise ValueError(f"model.settings: {' '.join(str(error).split())}") from None
    before, after = _shapes(config, model_class), _shapes(changed, model_class)
    differing = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    if differing:
        raise ValueError(
            f"model.settings {', '.join(settings)}: would change the weights that model.name loads ({', '.join(sorted(differing)[:3])} …): "
            "only settings without weights can be changed here, dropout for example"
        )
    return changed


def _shapes(config: PretrainedConfig, model_class: type[PreTrainedModel]) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = model_class._from_config(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}
