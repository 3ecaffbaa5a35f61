"""Which tokens go through the part of a layer that a stage goes around: how they are taken out, and put back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .state import Decision, TokenState
from .subsets import put_back, take_out


class EveryToken:
    """All of them, as they lie."""

    def state(self, state: TokenState) -> TokenState:
        """Of those that go through."""
        return state

    def of(self, values: Tensor) -> Tensor:
        """(B, M) -> the values of those that go through."""
        return values

    def take_out(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """(B, M, C) -> those that go through, and what ``put_back`` puts them into."""
        return hidden_states, hidden_states

    def put_back(self, rest: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """(B, M, C) with what became ``after`` of those that were ``before``."""
        return after


@dataclass(frozen=True)
class SomeRows(EveryToken):
    """All tokens of the rows at (R,); the other rows are left out."""

    rows: Tensor

    def state(self, state: TokenState) -> TokenState:
        return state.select_rows(self.rows)

    def of(self, values: Tensor) -> Tensor:
        return values.index_select(0, self.rows)

    def take_out(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        return self.of(hidden_states), hidden_states

    def put_back(self, rest: Tensor, before: Tensor, after: Tensor) -> Tensor:
        return rest.index_copy(0, self.rows, after.to(rest.dtype))


@dataclass(frozen=True)
class SomeTokens(EveryToken):
    """(B, K) of every row, ``valid`` where they are no filler."""

    index: Tensor
    valid: Tensor | None

    def state(self, state: TokenState) -> TokenState:
        return state.select(self.index, self.valid)

    def of(self, values: Tensor) -> Tensor:
        return values.gather(1, self.index)

    def take_out(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        return take_out(hidden_states, self.index)

    def put_back(self, rest: Tensor, before: Tensor, after: Tensor) -> Tensor:
        if self.valid is not None:
            # Filler stays what it was.
            after = torch.where(self.valid.unsqueeze(-1), after, before)
        return put_back(rest, self.index, after.to(rest.dtype))


def passing(decision: Decision, state: TokenState, rows: bool) -> EveryToken:
    """Those that a decision sends through.

    Args:
        decision: of a stage.
        state: the tokens that it was made for.
        rows: a row without any may be left out.
    """
    if decision.rows is not None and len(decision.rows) == state.rows:
        return EveryToken()
    if decision.rows is not None and rows:
        return SomeRows(decision.rows)
    if decision.valid is None and decision.index.shape[1] == state.tokens:
        return EveryToken()
    return SomeTokens(decision.index, decision.valid)
