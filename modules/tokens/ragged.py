"""Rows of different lengths laid end to end in one row, so that layers compute next to no filler; attention sees them side by side.

Rows of one length lie next to each other. There, attention reads them as what they are, (rows, tokens), and nothing is copied
for it. It runs once for every such group; where a group has too few tokens to be worth that, its rows are padded to the length of
the next.

A packed forward hands its Packing to the layers in place of the attention mask. They pass it on, untouched, to the attention
function that transformers looks up by name, which is ours then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .state import TokenState

# By the module's own name: a model exported for machines without Laconic brings its own copy of this file, with its own Packing.
ATTENTION = f"{__name__.replace('.', '_')}_attention"

# FLOPs that a device, or a thread of a CPU, gets done while one more group is handed to attention, forward and backward. The CPU's
# was measured; a GPU's is its order of magnitude.
_CALL = {"cpu": 6e6, "cuda": 5e9}
# FLOPs of a layer's matrices for one token, forward and backward, over its squared width.
_LAYER = 72
# Lengths at which groups may end, at most: finding the best ones takes the square of their number.
_ENDS = 32


@dataclass(frozen=True)
class RowGroup:
    """Rows that attention runs on together.

    Attributes:
        rows: R of the group.
        tokens: M' of each of them, filler included.
        mask: (R, 1, 1, M') what to add to the attention logits of each key; None where there is nothing to hide or to add.
    """

    rows: int
    tokens: int
    mask: Tensor | None

    @property
    def size(self) -> int:
        """Tokens of all its rows."""
        return self.rows * self.tokens


@dataclass(frozen=True)
class Packing:
    """How rows lie in one long row of T tokens, short rows first.

    Attributes:
        rows: B.
        tokens: M, of the rows side by side.
        slots: (T,) int64, flat slot in (B·M) of each packed token.
        groups: of rows of one length, one after the other.
    """

    rows: int
    tokens: int
    slots: Tensor
    groups: tuple[RowGroup, ...]

    @staticmethod
    def of(state: TokenState, hidden_states: Tensor) -> Packing:
        """Packing of (B, M, C) tokens, whose state has filler."""
        valid, dtype = state.valid, hidden_states.dtype
        assert valid is not None
        rows, tokens = valid.shape
        counts, order = valid.sum(-1).sort(stable=True)
        # Filler behind: a merger may have put its token there.
        slots = (~valid[order]).byte().sort(dim=-1, stable=True).indices
        bias = None if state.logit_bias is None else state.logit_bias[order].gather(1, slots).to(dtype)
        slots = slots + order[:, None] * tokens
        lengths: list[int] = counts.tolist()
        groups, taken, first = [], [], 0
        for number in group_sizes(lengths, _call_in_tokens(hidden_states)):
            last = first + number
            longest = lengths[last - 1]
            mask = None if bias is None else bias[first:last, :longest]
            if lengths[first] < longest:
                filler = torch.arange(longest, device=valid.device) >= counts[first:last, None]
                mask = torch.zeros(filler.shape, dtype=dtype, device=valid.device) if mask is None else mask
                mask = mask.masked_fill(filler, torch.finfo(dtype).min)
            groups.append(RowGroup(number, longest, None if mask is None else mask[:, None, None]))
            taken.append(slots[first:last, :longest].flatten())
            first = last
        return Packing(rows, tokens, torch.cat(taken), tuple(groups))

    def pack(self, padded: Tensor) -> Tensor:
        """(B, M, C) -> (1, T, C)."""
        return padded.flatten(0, 1).index_select(0, self.slots).unsqueeze(0)

    def unpack(self, packed: Tensor) -> Tensor:
        """(1, T, C) -> (B, M, C); filler holds anything finite."""
        padded = packed.new_zeros(self.rows * self.tokens, packed.shape[-1]).index_copy_(0, self.slots, packed.squeeze(0))
        return padded.view(self.rows, self.tokens, packed.shape[-1])


def group_sizes(lengths: Sequence[int], call: float) -> list[int]:
    """Rows of each group, so that filler and calls of attention together take the least time.

    Args:
        lengths: tokens of each row, ascending.
        call: tokens of filler that take as long as one more group.
    """
    rows = len(lengths)
    ends = [end for end in range(1, rows + 1) if end == rows or lengths[end] > lengths[end - 1]]
    every = -(-len(ends) // _ENDS)
    ends = [0, *ends[(len(ends) - 1) % every :: every]]
    # Of the rows before each end: what they take at best, and where their last group begins.
    best = [(0.0, 0)]
    for index, end in enumerate(ends[1:], 1):
        longest = lengths[end - 1]
        best.append(min((best[first][0] + (end - ends[first]) * longest + call, first) for first in range(index)))
    sizes, last = [], len(ends) - 1
    while last:
        first = best[last][1]
        sizes.append(ends[last] - ends[first])
        last = first
    return sizes[::-1]


def _call_in_tokens(hidden_states: Tensor) -> float:
    """Tokens that a layer computes in the time that one more group takes."""
    kind, width = hidden_states.device.type, hidden_states.shape[-1]
    flops = _CALL["cpu"] * torch.get_num_threads() if kind == "cpu" else _CALL["cuda"]
    return flops / (_LAYER * width**2)


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
    groups, outputs = attention_mask.groups, []
    # One split, whose backward is one cat: slices would each fill and add a gradient of the whole.
    parts = [packed.squeeze(0).transpose(0, 1).split([group.size for group in groups]) for packed in (query, key, value)]  # type: ignore[no-untyped-call]
    for group, *own in zip(groups, *parts, strict=True):
        side_by_side = (part.unflatten(0, (group.rows, group.tokens)).transpose(1, 2) for part in own)
        output, _ = sdpa_attention_forward(module, *side_by_side, group.mask, **kwargs)  # type: ignore[call-arg]
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs).unsqueeze(0), None


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
