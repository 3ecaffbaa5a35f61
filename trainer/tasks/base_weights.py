"""Loading weights for tasks without a head of their own."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ..recipe.schema import ModelRecipe


def whole_weights(model_class: type[PreTrainedModel], recipe: ModelRecipe, config: PretrainedConfig, otherwise: str, **options: Any) -> Any:
    """A dense model all of whose weights are in what the recipe names: a task without a head of its own.

    Args:
        model_class: class of the model.
        recipe: ``model`` block with the name of the weights.
        config: config of the model.
        otherwise: what weights are that lack some, for the message.
        options: arguments of ``from_pretrained``; with ``output_loading_info`` the result is (model, report).

    Raises:
        ValueError: weights are missing.
    """
    with_report = options.pop("output_loading_info", False)
    model, report = model_class.from_pretrained(
        recipe.name,
        revision=recipe.revision,
        config=config,
        attn_implementation=recipe.attention,
        # Whatever the checkpoint's dtype: trainer.precision decides what is computed in bf16.
        dtype=torch.float32,
        output_loading_info=True,
        trust_remote_code=False,
        **options,
    )
    if missing := sorted(map(str, report["missing_keys"])):
        raise ValueError(f"model.name = {recipe.name!r} lacks the weights {', '.join(missing[:3])}: it is {otherwise}")
    return (model, report) if with_report else model
