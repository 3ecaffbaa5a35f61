"""Giving a shortened sequence its full length back."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .dechunk import dechunk
from .flow import Flow
from .state import TokenState


def restore(hidden_states: Tensor, flow: Flow, by: str) -> Tensor:
    """(B, M, C) tokens -> (B, N, C), all original tokens in their place.

    Args:
        hidden_states: what is left of them.
        flow: of the stack; its state becomes that of N tokens, each standing for itself.
        by: ``unmerge`` gives every original token the state of the one that stands for it, ``rejoin`` only that one itself; any
            other gets the state that it had when it went. ``dechunk`` gives it that state and what layers added to its chunk.
    """
    if flow.left:
        state, first = flow.tokens, flow.left[0][1]
        if not state.whole:
            hidden_states = dechunk(hidden_states, flow) if by == "dechunk" else _in_place(hidden_states, flow, by)
        flow.shortest, flow.state, flow.left = state, first.restart(hidden_states.device), []
    return hidden_states


def _in_place(hidden_states: Tensor, flow: Flow, by: str) -> Tensor:
    state = flow.tokens
    # What each token was when it was last seen: later stages overwrite what earlier ones noted.
    full = flow.left[0][0]
    for seen, when in flow.left[1:]:
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
