"""Which tokens of a row are its prompt."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .labels import IGNORE_TOKEN
from .state import TokenState
from .trace import Trace


def prompt_of(trace: Trace, state: TokenState) -> Tensor:
    """(B, M) bool: tokens of the prompt, but for the one that the first new token is predicted from.

    They are those that the trace names; in training, where a row has labels, those in front of the first label, in every document;
    with a cache, all that fill it first.

    Raises:
        ValueError: nothing tells which they are.
    """
    tokens = state.source.shape[1]
    if trace.prompt is not None:
        prompt = trace.prompt.to(state.position.device).bool()
    elif trace.labels is not None and trace.labels.shape == (state.rows, tokens):
        prompt = _in_front_of_labels(trace.labels != IGNORE_TOKEN, trace)
    elif trace.carry is not None:
        prompt = torch.full((state.rows, tokens), trace.seen == 0, device=state.position.device)
    else:
        raise ValueError(
            "selector 'prefix' reduces the prompt, and nothing tells which tokens that is: call the model with labels, with "
            "use_cache=True, or with Trace(prompt=…)"
        )
    if trace.prompt is None:
        prompt = prompt & _has_a_next(prompt, trace)
    return prompt.gather(1, state.position) & state.routable


def _in_front_of_labels(answered: Tensor, trace: Trace) -> Tensor:
    """(B, N) bool: neither a token nor the next has a label, nor any before it in its document."""
    number = answered.cumsum(1)
    if trace.documents is not None:
        begins = trace.documents.diff(dim=1, prepend=trace.documents[:, :1] - 1) != 0
        # What earlier documents had, which never becomes less along a row.
        number = number - torch.where(begins, number - answered.long(), 0).cummax(1).values
    return functional.pad(number[:, 1:] == 0, (0, 1), value=True) & (number == 0)


def _has_a_next(prompt: Tensor, trace: Trace) -> Tensor:
    """(B, N) bool: another token of the same document follows."""
    follows = torch.ones_like(prompt)
    follows[:, -1] = False
    if trace.documents is not None:
        follows[:, :-1] &= trace.documents[:, 1:] == trace.documents[:, :-1]
    if trace.valid is not None:
        follows[:, :-1] &= trace.valid[:, 1:]
    return follows
