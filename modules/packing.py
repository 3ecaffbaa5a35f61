"""Rows of different lengths laid end to end in one row, so that layers compute no filler; attention alone sees them side by side.

There, rows of similar length run together, so that little is padded.

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

# By the module's own name: a model exported for machines without Laconic brings its own copy of this file, with its own Packing.
ATTENTION = f"{__name__.replace('.', '_')}_attention"

# Rows whose attention runs together, at least; and groups that a batch is cut into, at most.
_ROWS, _GROUPS = 8, 4


@dataclass(frozen=True)
class RowGroup:
    """Rows of similar length, whose attention runs together, padded to the longest of them.

    Attributes:
        rows: R of the group.
        tokens: M' of its longest row.
        size: T' tokens of all its rows; the groups lie one after the other in the packed row.
        slots: (T',) int64, flat slot in (R·M') of each; None where all rows are equally long.
        mask: (R, 1, 1, M') bool or what to add to the logits; None where there is nothing to hide or to add.
    """

    rows: int
    tokens: int
    size: int
    slots: Tensor | None
    mask: Tensor | None

    def side_by_side(self, own: Tensor) -> Tensor:
        """(T', H, D) -> (R, H, M', D), zeros in place of filler."""
        if self.slots is not None:
            own = own.new_zeros(self.rows * self.tokens, *own.shape[1:]).index_copy(0, self.slots, own)
        return own.reshape(self.rows, self.tokens, *own.shape[1:]).transpose(1, 2)

    def end_to_end(self, output: Tensor) -> Tensor:
        """(R, M', H, D) -> (T', H, D)."""
        flat = output.flatten(0, 1)
        return flat if self.slots is None else flat.index_select(0, self.slots)


@dataclass(frozen=True)
class Packing:
    """How rows lie in one long row of T tokens, short rows first.

    Attributes:
        rows: B.
        tokens: M, of the rows side by side.
        slots: (T,) int64, flat slot in (B·M) of each packed token.
        groups: of rows of similar length.
    """

    rows: int
    tokens: int
    slots: Tensor
    groups: tuple[RowGroup, ...]

    @staticmethod
    def of(state: TokenState, dtype: torch.dtype) -> Packing:
        """Packing of a state with filler, for queries of a dtype."""
        valid = state.valid
        assert valid is not None
        rows, tokens = valid.shape
        counts, order = valid.sum(-1).sort(stable=True)
        row, slot = valid[order].nonzero().unbind(-1)
        # Which of its row's tokens each one is, filler left out.
        rank = (valid[order].long().cumsum(-1) - 1)[row, slot]
        bias = None if state.logit_bias is None else state.logit_bias[order][row, slot].to(dtype)
        lengths: list[int] = counts.tolist()
        groups, start = [], 0
        for rows_of_group in torch.arange(rows).chunk(max(1, min(_GROUPS, rows // _ROWS))):
            first, number = int(rows_of_group[0]), len(rows_of_group)
            own = lengths[first : first + number]
            stop, longest = start + sum(own), own[-1]
            local = (row[start:stop] - first) * longest + rank[start:stop]
            even = own[0] == longest
            mask = None
            if bias is not None:
                mask = torch.full((number * longest,), torch.finfo(dtype).min, dtype=dtype, device=valid.device)
                mask = mask.index_copy(0, local, bias[start:stop]).view(number, 1, 1, longest)
            elif not even:
                ranks = torch.arange(longest, device=valid.device)
                mask = (ranks < counts[first : first + number, None])[:, None, None]
            groups.append(RowGroup(number, longest, stop - start, None if even else local, mask))
            start = stop
        return Packing(rows, tokens, order[row] * tokens + slot, tuple(groups))

    def pack(self, padded: Tensor) -> Tensor:
        """(B, M, C) -> (1, T, C)."""
        return padded.flatten(0, 1).index_select(0, self.slots).unsqueeze(0)

    def unpack(self, packed: Tensor) -> Tensor:
        """(1, T, C) -> (B, M, C), zeros in place of filler."""
        padded = packed.new_zeros(self.rows * self.tokens, packed.shape[-1]).index_copy(0, self.slots, packed.squeeze(0))
        return padded.view(self.rows, self.tokens, packed.shape[-1])


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
    for group, *own_parts in zip(groups, *parts, strict=True):
        own = (group.side_by_side(part) for part in own_parts)
        output, _ = sdpa_attention_forward(module, *own, group.mask, **kwargs)  # type: ignore[call-arg]
        outputs.append(group.end_to_end(output))
    return torch.cat(outputs).unsqueeze(0), None


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
