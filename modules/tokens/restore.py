"""Giving a shortened sequence its full length back."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .dechunk import dechunk
from .state import TokenState
from .trace import Trace


def restore(hidden_states: Tensor, trace: Trace, by: str) -> Tensor:
    """(B, M, C) tokens -> (B, N, C), all original tokens in their place.

    Args:
        hidden_states: what is left of them.
        trace: of this forward; its state becomes that of N tokens, each standing for itself.
        by: ``unmerge`` gives every original token the state of the one that stands for it, ``rejoin`` only that one itself; any
            other gets the state that it had when it went. ``dechunk`` gives it that state and what layers added to its chunk.
    """
    state = trace.state
    assert state is not None
    if trace.left:
        first = trace.left[0][1]
        if not state.whole:
            hidden_states = dechunk(hidden_states, trace) if by == "dechunk" else _in_place(hidden_states, trace, state, by)
        trace.shortest = state
        trace.state = TokenState.initial(
            first.rows, first.tokens, first.protected_per_row, first.valid, hidden_states.device, first.document
        )
        trace.left = []
    return hidden_states


def _in_place(hidden_states: Tensor, trace: Trace, state: TokenState, by: str) -> Tensor:
    # What each token was when it was last seen: later stages overwrite what earlier ones noted.
    full = trace.left[0][0]
    for seen, when in trace.left[1:]:
        full = _put(full, seen, when)
    if by == "rejoin":
        return _put(full, hidden_states, state)
    alive = (state.source >= 0).unsqueeze(-1)
    slots = state.source.clamp(min=0).unsqueeze(-1).expand(-1, -1, hidden_states.shape[-1])
    return torch.where(alive, hidden_states.gather(1, slots), full)


def _put(full: Tensor, hidden_states: Tensor, state: TokenState) -> Tensor:
    """(B, N, C) with the (B, M, C) tokens at their positions."""
    position = state.position if state.valid is None else state.position.masked_fill(~state.valid, full.shape[1])
    padded = functional.pad(full, (0, 0, 0, 1))
    return padded.scatter(1, position.unsqueeze(-1).expand_as(hidden_states), hidden_states)[:, :-1]
