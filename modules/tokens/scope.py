"""Scope: which tokens of a row a stage may touch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .flow import Flow
from .labels import IGNORE_TOKEN
from .state import TokenState
from .trace import Trace

# Scopes whose tokens are all there before the first new token is generated: inside them a causal model may look ahead.
COMPLETE = ("prompt", "visual")


def in_scope(scope: str, trace: Trace, flow: Flow) -> TokenState:
    """The state of the current tokens in which those outside the scope are protected.

    Args:
        scope: ``all``, ``prompt`` or ``visual``.
        trace: of the forward.
        flow: of the stack.

    Raises:
        ValueError: the forward does not say which tokens are in the scope.
    """
    state = flow.tokens
    if scope == "all":
        return state
    tokens = _prompt(trace, flow, state) if scope == "prompt" else _visual(flow)
    return state.restrict(tokens.gather(1, state.position))


def _visual(flow: Flow) -> Tensor:
    """(B, N) bool: tokens of images and video."""
    if flow.visual is None:
        raise ValueError("scope 'visual' is for vision-language models: this model has no visual tokens; give scope 'all' or 'prompt'")
    return flow.visual


def _prompt(trace: Trace, flow: Flow, state: TokenState) -> Tensor:
    """(B, N) bool: tokens of the prompt, but for the one that the first new token is predicted from.

    They are those that the trace names; in training, where a row has labels, those in front of the first label, in every document;
    with a cache, all that fill it first.
    """
    tokens = state.source.shape[1]
    if trace.prompt is not None:
        return trace.prompt.to(state.position.device).bool()
    if trace.labels is not None and trace.labels.shape == (state.rows, tokens):
        prompt = _in_front_of_labels(trace.labels != IGNORE_TOKEN, flow)
    elif flow.carry is not None:
        prompt = torch.full((state.rows, tokens), flow.seen == 0, device=state.position.device)
    else:
        raise ValueError(
            "scope 'prompt': nothing says which tokens are the prompt; call the model with use_cache=True, or give Trace(labels=…) or "
            "Trace(prompt=…)"
        )
    return prompt & _has_a_next(prompt, flow)


def _in_front_of_labels(answered: Tensor, flow: Flow) -> Tensor:
    """(B, N) bool: neither a token nor the next has a label, nor any before it in its document."""
    number = answered.cumsum(1)
    if flow.documents is not None:
        begins = flow.documents.diff(dim=1, prepend=flow.documents[:, :1] - 1) != 0
        # What earlier documents had, which never becomes less along a row.
        number = number - torch.where(begins, number - answered.long(), 0).cummax(1).values
    return functional.pad(number[:, 1:] == 0, (0, 1), value=True) & (number == 0)


def _has_a_next(prompt: Tensor, flow: Flow) -> Tensor:
    """(B, N) bool: another token of the same document follows."""
    follows = torch.ones_like(prompt)
    follows[:, -1] = False
    if flow.documents is not None:
        follows[:, :-1] &= flow.documents[:, 1:] == flow.documents[:, :-1]
    if flow.valid is not None:
        follows[:, :-1] &= flow.valid[:, 1:]
    return follows
