"""Scope: the tokens of a row that a stage may touch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .flow import Flow
from .labels import IGNORE_TOKEN
from .state import TokenState
from .trace import Trace

_PROMPT_GIVEN = "call the model with use_cache=True, or give Trace(labels=…) or Trace(prompt=…)"


def in_scope(scope: str, trace: Trace, flow: Flow, first: int = 0, last: int = 0, special: bool = False) -> TokenState:
    """TokenState of the current tokens with those outside the scope marked as protected.

    Args:
        scope: ``all``, ``prompt`` or ``visual``.
        trace: Trace of the forward.
        flow: Flow of the stack.
        first: number of tokens at the start of each document that are outside too.
        last: number of tokens at the end of each prompt that are outside, the one from which the answer starts included.
        special: tokens that begin or end a text are outside too.

    Raises:
        ValueError: the forward does not define which tokens are in the scope.
    """
    state = flow.tokens
    special = special and flow.special is not None
    if scope == "all" and first and not special and _begin_alike(flow, state):
        return state.protect_first(first)
    later = _behind(flow, state, first) if first else None
    if special:
        assert flow.special is not None
        later = ~flow.special if later is None else later & ~flow.special
    if scope == "all":
        return state if later is None else state.restrict(later.gather(1, state.position))
    tokens = _prompt(trace, flow, state) if scope == "prompt" else _visual(flow)
    if last > 1:
        tokens = tokens & (_number_from_the_end(tokens, flow) >= last)
    return state.restrict((tokens if later is None else tokens & later).gather(1, state.position))


def _begin_alike(flow: Flow, state: TokenState) -> bool:
    """Every row is the beginning of one document, without padding and with all of its tokens."""
    return state.counts is not None and state.whole and flow.documents is None and isinstance(flow.earlier, int) and flow.earlier == 0


def _behind(flow: Flow, state: TokenState, first: int) -> Tensor | None:
    """(B, N) bool: tokens behind the first ones of their document; None if all are."""
    place = torch.arange(state.source.shape[1], device=state.position.device).expand(state.rows, -1)
    if flow.documents is not None:
        begins = flow.documents.diff(dim=1, prepend=flow.documents[:, :1] - 1) != 0
        return place - torch.where(begins, place, 0).cummax(1).values >= first
    if isinstance(flow.earlier, int) and flow.earlier >= first:
        return None
    # Padding in front of a row does not count.
    number = place if flow.valid is None else flow.valid.long().cumsum(1) - 1
    return number + torch.as_tensor(flow.earlier, device=place.device).view(-1, 1) >= first


def _number_from_the_end(prompt: Tensor, flow: Flow) -> Tensor:
    """(B, N) int64: number of the prompt's tokens from each one to the last of its document, itself included."""
    following = prompt.flip(1).cumsum(1).flip(1)
    if flow.documents is None:
        return following
    ends = flow.documents.diff(dim=1, append=flow.documents[:, -1:] - 1) != 0
    # Less the prompts of later documents; their number never increases along a row.
    later = torch.where(ends, following - prompt.long(), 0).flip(1).cummax(1).values.flip(1)
    return following - later


def _visual(flow: Flow) -> Tensor:
    """(B, N) bool: tokens of images and video."""
    if flow.visual is None:
        raise ValueError("scope 'visual' is for vision-language models: this model has no visual tokens; give scope 'all' or 'prompt'")
    return flow.visual


def _prompt(trace: Trace, flow: Flow, state: TokenState) -> Tensor:
    """(B, N) bool: tokens of the prompt, without its last token, from which the first new token is predicted.

    ``Trace.prompt`` is used as it is, if set. Otherwise, with labels per token, the prompt is the tokens before the first label of each
    document; otherwise, with a cache, the tokens of the first forward.
    """
    tokens = state.source.shape[1]
    if trace.prompt is not None:
        return trace.prompt.to(state.position.device).bool()
    if trace.labels is not None and trace.labels.shape == (state.rows, tokens):
        prompt = _in_front_of_labels(trace.labels != IGNORE_TOKEN, flow)
    elif flow.carry is not None:
        prompt = torch.full((state.rows, tokens), flow.seen == 0, device=state.position.device)
    else:
        raise ValueError(f"scope 'prompt': nothing says which tokens are the prompt; {_PROMPT_GIVEN}")
    return prompt & _has_a_next(prompt, flow)


def _in_front_of_labels(answered: Tensor, flow: Flow) -> Tensor:
    """(B, N) bool: tokens with no label at or before the next token of their document."""
    number = answered.cumsum(1)
    if flow.documents is not None:
        begins = flow.documents.diff(dim=1, prepend=flow.documents[:, :1] - 1) != 0
        # Subtract the labels of earlier documents; the count never decreases along a row.
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


def last_of_prompt(trace: Trace, flow: Flow) -> Tensor:
    """(B, 1) int64 original position of the token from which the first new token of each row is predicted.

    With ``Trace.prompt``, the token after the prompt's tokens. With labels per token, the token before the first label that follows the
    row's last visual token, so that every image is behind it. With a cache, and in rows without either, the last real token.

    Raises:
        ValueError: the forward does not define where the prompt ends. Its last token may be one of the answer.
    """
    state = flow.tokens
    rows, tokens = state.source.shape
    position = torch.arange(tokens, device=state.position.device)
    real = torch.ones(rows, tokens, dtype=torch.bool, device=position.device) if flow.valid is None else flow.valid
    last = torch.where(real, position, 0).amax(1, keepdim=True)
    if trace.prompt is not None:
        prompt = trace.prompt.to(position.device).bool()
        return torch.where(
            prompt.any(1, keepdim=True), torch.minimum(torch.where(prompt, position, 0).amax(1, keepdim=True) + 1, last), last
        )
    if trace.labels is None or trace.labels.shape != (rows, tokens):
        if flow.carry is None:
            raise ValueError(f"nothing says where the prompt ends, whose last token scores the others; {_PROMPT_GIVEN}")
        return last
    answered = (trace.labels.to(position.device) != IGNORE_TOKEN) & real
    if flow.visual is not None:
        answered = answered & (position > torch.where(flow.visual, position, -1).amax(1, keepdim=True))
    first = torch.where(answered, position, tokens).amin(1, keepdim=True)
    return torch.where(first < tokens, (first - 1).clamp(min=0), last)


def one_prompt_a_row(state: TokenState, scorer: str) -> None:
    """Raises ValueError if rows contain several documents, each of which has a prompt of its own.

    Args:
        state: TokenState of the tokens.
        scorer: name of the scorer that reads the prompt.
    """
    if state.document is not None:
        raise ValueError(
            f"scorer {scorer!r} reads the end of one prompt a row, and these rows contain packed documents: give each document a row, or "
            "take scorer 'learned'"
        )
