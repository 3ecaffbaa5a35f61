"""Boundary scorer: compares each token with the one before it to decide whether a chunk begins."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..cost.shape import StackShape
from ..site import SiteInput, TokenSpec
from ..tokens.gather import look_up, take
from ..tokens.state import TokenState
from .base import Scored, Scorer

# Probabilities are clamped to [1e-4, 1 - 1e-4]: the log-odds of 0 and 1 are infinite.
_EPSILON = 1e-4


class _Identity(nn.Linear):
    """A square linear map, initialised to the identity when its weight is created, before ZeRO-3 can shard it."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, bias=False)

    def reset_parameters(self) -> None:
        nn.init.eye_(self.weight)


class BoundaryScorer(Scorer):
    """Probability that a chunk begins, p = ½(1 − cos(W_q x_t, W_k x_{t−1})), as log-odds (H-Net, arXiv 2507.07955).

    The first token of a row or document always begins a chunk. For other tokens p is near 0 if the token is like the one before it, and
    0.5 if their cosine is 0. The scorer is causal: it reads one earlier token. With a cache, the last key is carried in the cache.

    Args:
        spec: the tokens to score.
        detach: stop the gradient from the scorer into the backbone below it.
    """

    estimator = "straight_through"
    chunk_estimator = "confidence"
    probabilities = True

    def __init__(self, spec: TokenSpec, detach: bool = False) -> None:
        super().__init__(spec)
        self.detach = detach
        self.query = _Identity(spec.hidden_size)
        self.key = _Identity(spec.hidden_size)

    def forward(self, inputs: SiteInput) -> Scored:
        tokens = inputs.hidden_states.detach() if self.detach else inputs.hidden_states
        key, known = _before(self.key(tokens), inputs)
        # In float32, as all scores: bf16 rounds close values to the same number.
        alike = functional.cosine_similarity(self.query(tokens).float(), key.float(), dim=-1)
        probability = torch.where(known, 0.5 * (1 - alike), 1.0)
        return Scored(probability.clamp(_EPSILON, 1 - _EPSILON).logit())

    def macs(self, shape: StackShape, tokens: int) -> int:
        return 2 * tokens * shape.hidden**2


def _before(keys: Tensor, inputs: SiteInput) -> tuple[Tensor, Tensor]:
    """(B, M, C) key of the token before each token, and (B, M) bool whether there is one."""
    state, carry = inputs.state, inputs.flow.carry
    newest = _newest(state)
    before = functional.pad(newest[:, :-1], (1, 0), value=-1)
    here, at = before >= 0, before.clamp(min=0)
    previous, known = look_up(keys, at), here
    if state.document is not None:
        known = known & (state.document.gather(1, at) == state.document)
    if carry is None:
        return previous, known
    name = f"{inputs.stage}.boundary"
    # The last routable token of each row, for the next forward; from this forward if the row has one, else from an earlier one.
    last, some = newest[:, -1:].clamp(min=0), newest[:, -1] >= 0
    kept = take(keys, last).squeeze(1)
    if name in carry:
        earlier, had = carry[name], carry[f"{name}.some"]
        previous, known = torch.where(here.unsqueeze(-1), previous, earlier[:, None]), known | had[:, None]
        kept, some = torch.where(some[:, None], kept, earlier), some | had
    carry[name], carry[f"{name}.some"] = kept, some
    return previous, known


def _newest(state: TokenState) -> Tensor:
    """(B, M) int64: last slot at or before each slot that holds a routable token; -1 if there is none."""
    slots = torch.arange(state.tokens, device=state.position.device)
    return torch.where(state.routable, slots, -1).cummax(1).values
