"""Restore: gives a shortened sequence its full length again."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .dechunk import dechunk
from .flow import Flow
from .state import TokenState


def restore(hidden_states: Tensor, flow: Flow, by: str) -> Tensor:
    """(B, M, C) -> (B, N, C), all original tokens in their original order.

    Args:
        hidden_states: (B, M, C) current tokens.
        flow: Flow of the stack; its state becomes that of N tokens, each representing itself.
        by: ``unmerge`` gives every original token the hidden state of the token that represents it; a dropped token gets the hidden
            state that it had when it was dropped. ``rejoin`` does this for merged tokens too. ``dechunk`` gives every token its hidden
            state from before the stage, plus the layers' update of its chunk.
    """
    if flow.left:
        state, first = flow.tokens, flow.left[0][1]
        if not state.whole:
            hidden_states = dechunk(hidden_states, flow) if by == "dechunk" else _in_place(hidden_states, flow, by)
        flow.shortest, flow.state, flow.left = state, first.restart(hidden_states.device), []
    return hidden_states


def _in_place(hidden_states: Tensor, flow: Flow, by: str) -> Tensor:
    state = flow.tokens
    # The last hidden state of each original token: later stages overwrite earlier ones.
    full = flow.left[0][0]
    for hidden, when in flow.left[1:]:
        full = _put(full, hidden, when)
    if by == "rejoin":
        return _put(full, hidden_states, state)
    alive = (state.source >= 0).unsqueeze(-1)
    slots = state.source.clamp(min=0).unsqueeze(-1).expand(-1, -1, hidden_states.shape[-1])
    return torch.where(alive, hidden_states.gather(1, slots), full)


def _put(full: Tensor, hidden_states: Tensor, state: TokenState) -> Tensor:
    """(B, N, C) with the (B, M, C) tokens written at their positions."""
    position = state.position if state.valid is None else state.position.masked_fill(~state.valid, full.shape[1])
    padded = functional.pad(full, (0, 0, 0, 1))
    return padded.scatter(1, position.unsqueeze(-1).expand_as(hidden_states), hidden_states)[:, :-1]
