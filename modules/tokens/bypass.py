"""Which tokens go through the part of a layer that a stage goes around: how they are taken out, and put back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .decision import Decision
from .gather import put_back, take_out
from .state import TokenState


class Passing(Protocol):
    """The tokens that go through."""

    def state(self, state: TokenState) -> TokenState:
        """Theirs."""

    def of(self, values: Tensor) -> Tensor:
        """(B, M) -> theirs."""

    def take_out(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """(B, M, C) -> theirs, and what ``put_back`` puts them into."""

    def put_back(self, rest: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """(B, M, C) with what became ``after`` of those that were ``before``."""


class EveryToken:
    """All of them, as they lie."""

    def state(self, state: TokenState) -> TokenState:
        return state

    def of(self, values: Tensor) -> Tensor:
        return values

    def take_out(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        return hidden_states, hidden_states

    def put_back(self, rest: Tensor, before: Tensor, after: Tensor) -> Tensor:
        return after


@dataclass(frozen=True)
class SomeRows:
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
class SomeTokens:
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


def passing(decision: Decision, state: TokenState, may_leave_rows_out: bool) -> Passing:
    """Those that a decision sends through.

    Args:
        decision: of a stage.
        state: the tokens that it was made for.
        may_leave_rows_out: those without any.
    """
    if decision.rows is not None and len(decision.rows) == state.rows:
        return EveryToken()
    if decision.rows is not None and may_leave_rows_out:
        return SomeRows(decision.rows)
    if decision.valid is None and decision.index.shape[1] == state.tokens:
        return EveryToken()
    return SomeTokens(decision.index, decision.valid)
