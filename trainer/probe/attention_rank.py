"""ARank of a layer: how many directions its attention has, the rank of its strict lower triangle (γ-MoD, arXiv 2410.13859)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

# Documents that are measured, and tokens of each: a rank takes time that grows with the cube of the length.
_DOCUMENTS, _TOKENS = 4, 256


@torch.no_grad()
def attention_ranks(model: PreTrainedModel, batches: Sequence[Mapping[str, Any]]) -> list[float]:
    """Mean share of the full rank over heads and documents, by layer; empty without a text of two tokens.

    Where it is low, tokens read nearly the same and a router costs least.

    Args:
        model: dense causal language model in evaluation mode.
        batches: batches with ``input_ids`` (B, N) and, where rows are packed, ``documents`` (B, N).
    """
    texts = _texts(batches)
    attention = model.config._attn_implementation
    # The others give no probabilities.
    model.set_attn_implementation("eager")
    try:
        found = [[rank_share(layer[0]) for layer in _attentions(model, ids)] for ids in texts]
    finally:
        model.set_attn_implementation(attention)
    return [sum(layer) / len(layer) for layer in zip(*found, strict=True)]


def rank_share(attention: Tensor) -> float:
    """Rank of the strict lower triangle of (heads, N, N) probabilities ÷ the largest possible, N − 1; mean over heads."""
    below = attention.float().tril(-1)
    return float(torch.linalg.matrix_rank(below).float().mean()) / (attention.shape[-1] - 1)


def _attentions(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, ...]:
    given: tuple[Tensor, ...] = model(input_ids=ids.to(model.device), output_attentions=True, use_cache=False).attentions
    return given


def _texts(batches: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """(1, N) ids of the first document of some rows."""
    found = []
    for batch in batches:
        for row, ids in enumerate(batch["input_ids"]):
            own = ids if batch.get("documents") is None else ids[batch["documents"][row] == 0]
            if len(own) > 1:
                found.append(own[None, :_TOKENS])
    # From all over the rows.
    return found[:: max(1, len(found) // _DOCUMENTS)][:_DOCUMENTS]
