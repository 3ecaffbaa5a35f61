"""Classes and heads of weights that a run starts from: labels are compared by name, and a head for other classes is trained anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ...data.labels.classes import KnownClasses
from ..recipe.schema import Recipe
from .initial_weights import Start

ANEW = "; model.new_head=true trains a new head for other classes"


def named_classes(config: PretrainedConfig) -> tuple[str, ...]:
    """Names of a model's classes in the order of its answers; empty if they are transformers' placeholders."""
    labels: Mapping[int, str] = config.id2label or {}
    names = tuple(str(labels[code]) for code in sorted(labels))
    return () if all(name == f"LABEL_{code}" for code, name in enumerate(names)) else names


def known_classes(recipe: Recipe, start: Start | None, model_class: type[PreTrainedModel]) -> KnownClasses | None:
    """The classes that the head of a run's initial weights knows; None if it has no such head, or a new one is requested.

    Args:
        recipe: the recipe.
        start: initial weights; None for random ones.
        model_class: class of the task's model.
    """
    if start is None or recipe.model.new_head or not has_head(start, model_class):
        return None
    names = named_classes(start.config)
    trained_here = start.run is not None and start.run.recipe.is_file()
    return KnownClasses(names, f"model.name = {start.name!r}", ANEW if trained_here else None) if names else None


def trained_classes(config: PretrainedConfig, owner: str) -> KnownClasses | None:
    """The classes of a trained model that is evaluated or shown; None if they have no names.

    Args:
        config: config of the model.
        owner: the model, for messages.
    """
    names = named_classes(config)
    return KnownClasses(names, owner, "") if names else None


def check_known(classes: Sequence[str], known: KnownClasses | None) -> None:
    """Raises ValueError if the classes of opened data are not numbered as a trained model numbers them: data that come with Laconic and
    masks have classes of their own, onto which nothing is mapped."""
    if known is None or known.cure is None or tuple(classes) == known.names[: len(classes)]:
        return
    raise ValueError(
        f"the data have the classes {', '.join(classes)}, and {known.owner} has {', '.join(known.names)}: use data with the same "
        f"classes{known.cure}"
    )


def has_head(start: Start, model_class: type[PreTrainedModel]) -> bool:
    """True if the initial weights were trained with the task's kind of head."""
    classes = [start.adapter.model_class] if start.adapter is not None else [str(name) for name in start.config.architectures or []]
    return any(name.partition("For")[2] == model_class.__name__.partition("For")[2] for name in classes)


def heads_of(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The layers that answer with one number for each class, by name; a model has one."""
    inside = f"{model.base_model_prefix}."
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == model.config.num_labels and not name.startswith(inside)
    }


def renew_heads(model: PreTrainedModel) -> list[str]:
    """Gives the heads of a dense model new random weights, in place; returns their names."""
    heads: Mapping[str, Any] = heads_of(model)
    for head in heads.values():
        for parameter in head.parameters():
            # transformers initialises only what it has not loaded.
            parameter._is_hf_initialized = False
        model._init_weights(head)  # type: ignore[no-untyped-call]
    return sorted(heads)
