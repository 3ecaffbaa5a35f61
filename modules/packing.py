"""Rows of different lengths laid end to end in one row, so that layers compute no filler; attention alone sees them side by side.

A packed forward hands its Packing to the layers in place of the attention mask. They pass it on, untouched, to the attention
function that transformers looks up by name, which is ours then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .state import TokenState

ATTENTION = "laconic_packed"


@dataclass(frozen=True)
class Packing:
    """How rows lie in one long row of T tokens.

    Attributes:
        rows: B.
        tokens: M, of the rows side by side.
        slots: (T,) int64, flat slot in (B·M) of each packed token.
        mask: (B, 1, 1, M) for attention: bool, False for filler, or what to add to the logits.
    """

    rows: int
    tokens: int
    slots: Tensor
    mask: Tensor

    @staticmethod
    def of(state: TokenState, dtype: torch.dtype) -> Packing:
        """Packing of a state with filler, for queries of a dtype."""
        valid, bias = state.valid, state.logit_bias
        assert valid is not None
        mask = valid if bias is None else bias.to(dtype).masked_fill(~valid, torch.finfo(dtype).min)
        return Packing(state.rows, state.tokens, valid.flatten().nonzero().squeeze(1), mask[:, None, None])

    def pack(self, padded: Tensor) -> Tensor:
        """(B, M, …) -> (1, T, …)."""
        return padded.flatten(0, 1).index_select(0, self.slots).unsqueeze(0)

    def unpack(self, packed: Tensor) -> Tensor:
        """(1, T, …) -> (B, M, …), zeros in place of filler."""
        padded = packed.new_zeros(self.rows * self.tokens, *packed.shape[2:]).index_copy(0, self.slots, packed.squeeze(0))
        return padded.view(self.rows, self.tokens, *packed.shape[2:])


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | Packing | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention function of transformers that understands a Packing as its mask; with any other it is plain SDPA.

    Args:
        module: the attention module.
        query, key, value: (1, H, T, D) packed, else (B, H, M, D).
        attention_mask: how they are packed.

    Returns:
        (1, T, H, D), else (B, M, H, D); and no weights.
    """
    if not isinstance(attention_mask, Packing):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    packing = attention_mask
    query, key, value = (packing.unpack(packed.transpose(1, 2)).transpose(1, 2) for packed in (query, key, value))
    output, _ = sdpa_attention_forward(module, query, key, value, packing.mask, **kwargs)
    return packing.pack(output), None


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
