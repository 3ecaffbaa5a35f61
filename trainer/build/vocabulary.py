"""Embeddings of loaded weights for a tokenizer with more entries."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from ...data.splits import Splits
from ..errors import RecipeError
from ..recipe.schema import ModelRecipe


def fit_vocabulary(recipe: ModelRecipe, config: PretrainedConfig, data: Splits) -> int | None:
    """Sets a config's vocabulary to the entries of the tokenizer if ``model.resize_vocabulary`` is set and it has more.

    Args:
        recipe: the ``model`` block.
        config: config of the loaded weights, changed in place.
        data: the splits.

    Returns:
        The entries of the weights, for loading them; None if nothing changes.

    Raises:
        RecipeError: the data have no tokenizer.
    """
    if not recipe.resize_vocabulary:
        return None
    tokenizer: Any = getattr(data, "tokenizer", None)
    if tokenizer is None:
        raise RecipeError("model.resize_vocabulary = true needs text, and the data have no tokenizer: remove it")
    inner: Any = config.get_text_config()
    return set_vocabulary(config, len(tokenizer)) if len(tokenizer) > inner.vocab_size else None


def set_vocabulary(config: PretrainedConfig, entries: int) -> int:
    """Sets a config's vocabulary in place; returns the entries that it had."""
    inner: Any = config.get_text_config()
    before: int = inner.vocab_size
    inner.vocab_size = entries
    return before
