"""Packs rows of different lengths into one row (varlen), so that layers process almost no padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .state import TokenState

# Named after the module: a standalone export has its own copy of this file, with its own Packing class.
ATTENTION = f"{__name__.replace('.', '_')}_attention"

# FLOPs that a CPU thread computes in the time of one more attention call, forward and backward; measured.
_CALL = 6e6
# FLOPs of a layer's matrices per token, forward and backward, divided by the squared width.
_LAYER = 72
# Maximum number of lengths at which a group may end: the search is quadratic in it.
_ENDS = 32


@dataclass(frozen=True)
class RowGroup:
    """Rows that share one attention call.

    Attributes:
        rows: number R of rows.
        tokens: padded length M' of each row.
        mask: (R, 1, 1, M') term added to the attention logits of each key; None if there is no padding and no bias.
    """

    rows: int
    tokens: int
    mask: Tensor | None

    @property
    def size(self) -> int:
        """Tokens of all rows, padding included."""
        return self.rows * self.tokens


@dataclass(frozen=True)
class RowSpans:
    """Rows of any length behind each other, without padding.

    Attributes:
        starts: (B + 1,) int32, packed place of each row's first token, and T.
        longest: largest number of tokens of a row.
        valid: (B, M) bool, False for padding of the padded layout.
        bias: (B, M) term added to the attention logits of each key of the padded layout; None if there is none.
    """

    starts: Tensor
    longest: int
    valid: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Packing:
    """The layout of rows in one packed row of T tokens.

    On a CPU short rows come first, and attention runs once per group of rows of equal length, on a (rows, tokens) view without a copy. If
    a group is too small to be worth a call, its rows are padded and join the next group. On other devices a call costs more than padding:
    attention runs once, by the kernel for rows of different lengths, or on padded rows where that kernel does not serve. Layers receive
    the Packing instead of the attention mask and pass it on to ``packed_attention``, which transformers looks up by name.

    Attributes:
        rows: number B of rows.
        tokens: length M of the padded rows.
        slots: (T,) int64, flat slot in the padded (B·M) layout of each packed token.
        groups: groups of rows of one length, in packed order; empty if ``spans`` are given.
        spans: where rows begin; None if there are ``groups``.
    """

    rows: int
    tokens: int
    slots: Tensor
    groups: tuple[RowGroup, ...] = ()
    spans: RowSpans | None = None

    @staticmethod
    def of(state: TokenState, hidden_states: Tensor) -> Packing:
        """The Packing of (B, M, C) tokens whose state has padding."""
        return Packing.in_groups(state, hidden_states) if hidden_states.device.type == "cpu" else Packing.in_spans(state)

    @staticmethod
    def in_spans(state: TokenState) -> Packing:
        """The Packing without any padding, rows in their order."""
        valid = state.valid
        assert valid is not None
        rows, tokens = valid.shape
        counts = valid.sum(-1)
        # The only synchronisation with the device.
        lengths: list[int] = counts.tolist()
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        slots = (~valid.flatten()).byte().sort(stable=True).indices[: sum(lengths)]
        return Packing(rows, tokens, slots, spans=RowSpans(starts, max(lengths), valid, state.logit_bias))

    @staticmethod
    def in_groups(state: TokenState, hidden_states: Tensor) -> Packing:
        """The Packing with groups of rows of (B, M, C) tokens, short rows first."""
        valid, dtype = state.valid, hidden_states.dtype
        assert valid is not None
        rows, tokens = valid.shape
        counts, order = valid.sum(-1).sort(stable=True)
        # Real tokens first: a merger may have added its token after the padding.
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
                padding = torch.arange(longest, device=valid.device) >= counts[first:last, None]
                mask = torch.zeros(padding.shape, dtype=dtype, device=valid.device) if mask is None else mask
                mask = mask.masked_fill(padding, torch.finfo(dtype).min)
            groups.append(RowGroup(number, longest, None if mask is None else mask[:, None, None]))
            taken.append(slots[first:last, :longest].flatten())
            first = last
        return Packing(rows, tokens, torch.cat(taken), tuple(groups))

    def pack(self, padded: Tensor) -> Tensor:
        """(B, M, C) -> (1, T, C)."""
        return padded.flatten(0, 1).index_select(0, self.slots).unsqueeze(0)

    def unpack(self, packed: Tensor) -> Tensor:
        """(1, T, C) -> (B, M, C); padding holds finite values without a meaning."""
        padded = packed.new_zeros(self.rows * self.tokens, packed.shape[-1]).index_copy_(0, self.slots, packed.squeeze(0))
        return padded.view(self.rows, self.tokens, packed.shape[-1])


def group_sizes(lengths: Sequence[int], call: float) -> list[int]:
    """Number of rows in each group, chosen to minimise the time for padding and for attention calls.

    Args:
        lengths: tokens of each row, ascending.
        call: number of padding tokens that take as long as one more group.
    """
    rows = len(lengths)
    ends = [end for end in range(1, rows + 1) if end == rows or lengths[end] > lengths[end - 1]]
    every = -(-len(ends) // _ENDS)
    ends = [0, *ends[(len(ends) - 1) % every :: every]]
    # For the rows before each end: the lowest cost, and the start of the last group.
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
    """Number of tokens that a layer processes in the time of one more attention call."""
    return _CALL * torch.get_num_threads() / (_LAYER * hidden_states.shape[-1] ** 2)


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | Packing | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention function of transformers that accepts a Packing as its mask; with any other mask it is plain SDPA.

    Args:
        module: the attention module.
        query, key, value: (1, H, T, D) packed, else (B, H, M, D).
        attention_mask: Packing, or mask for SDPA.

    Returns:
        (1, T, H, D) packed, else (B, M, H, D); and None for the attention weights.
    """
    if not isinstance(attention_mask, Packing):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if attention_mask.spans is not None:
        return _over_spans(module, query, key, value, attention_mask, attention_mask.spans, **kwargs), None
    groups, outputs = attention_mask.groups, []
    # One split, whose backward is one cat; separate slices would each allocate and add a gradient of the whole tensor.
    parts = [packed.squeeze(0).transpose(0, 1).split([group.size for group in groups]) for packed in (query, key, value)]  # type: ignore[no-untyped-call]
    for group, *own in zip(groups, *parts, strict=True):
        padded = (part.unflatten(0, (group.rows, group.tokens)).transpose(1, 2) for part in own)
        output, _ = sdpa_attention_forward(module, *padded, group.mask, **kwargs)  # type: ignore[call-arg]
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs).unsqueeze(0), None


def _over_spans(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, packing: Packing, spans: RowSpans, **kwargs: Any) -> Tensor:
    """(1, H, T, D) -> (1, T, H, D)."""
    if _by_kernel(query, key, value, spans, **kwargs):
        starts, longest = spans.starts, spans.longest
        query, key, value = (part.squeeze(0).transpose(0, 1).to(value.dtype) for part in (query, key, value))
        attended = varlen_attn(query, key, value, starts, starts, longest, longest)
        assert isinstance(attended, Tensor)
        return attended.unsqueeze(0)

    def pad(part: Tensor) -> Tensor:
        _, heads, packed, width = part.shape
        by_token = packing.unpack(part.transpose(1, 2).reshape(1, packed, heads * width))
        return by_token.view(packing.rows, packing.tokens, heads, width).transpose(1, 2)

    mask = torch.zeros_like(spans.valid, dtype=query.dtype) if spans.bias is None else spans.bias.to(query.dtype)
    mask = mask.masked_fill(~spans.valid, torch.finfo(query.dtype).min)[:, None, None]
    by_row, _ = sdpa_attention_forward(module, pad(query), pad(key), pad(value), mask, **kwargs)
    return packing.pack(by_row.flatten(2)).view(1, -1, *by_row.shape[2:])


def _by_kernel(query: Tensor, key: Tensor, value: Tensor, spans: RowSpans, **kwargs: Any) -> bool:
    """Flash attention for rows of different lengths serves: half precision on CUDA, no bias, no dropout, the default scale."""
    width, scale = query.shape[-1], kwargs.get("scaling")
    return (
        value.is_cuda
        and value.dtype in (torch.bfloat16, torch.float16)
        and spans.bias is None
        and not kwargs.get("dropout")
        and (scale is None or scale == width**-0.5)
        and width % 8 == 0
        and width <= 256
    )


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
