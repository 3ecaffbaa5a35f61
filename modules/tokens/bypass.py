"""Bypass: takes out the selected tokens, which a layer processes, and puts the result back among the tokens that bypass it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .decision import Decision
from .gather import put_back, take_out
from .state import TokenState


class Passing(Protocol):
    """The selected tokens."""

    def state(self, state: TokenState) -> TokenState:
        """TokenState of the selected tokens."""

    def of(self, values: Tensor) -> Tensor:
        """(B, M) -> values of the selected tokens."""

    def take_out(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """(B, M, C) -> (selected tokens, full tensor to scatter back into)."""

    def put_back(self, rest: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """(B, M, C): ``rest`` with the selected tokens ``before`` replaced by ``after``."""


class EveryToken:
    """Every token is selected."""

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
    """All tokens of the rows at (R,) are selected, and none of the other rows."""

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
    """(B, K) tokens of every row are selected; ``valid`` is False for padding."""

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
            # Padding keeps its value.
            after = torch.where(self.valid.unsqueeze(-1), after, before)
        return put_back(rest, self.index, after.to(rest.dtype))


def passing(decision: Decision, state: TokenState, may_leave_rows_out: bool) -> Passing:
    """The tokens that a decision selects.

    Args:
        decision: decision of a bypass stage.
        state: TokenState of the tokens at the site.
        may_leave_rows_out: rows without a selected token may be left out of the computation.
    """
    if decision.rows is not None and len(decision.rows) == state.rows:
        return EveryToken()
    if decision.rows is not None and may_leave_rows_out:
        return SomeRows(decision.rows)
    if decision.valid is None and decision.index.shape[1] == state.tokens:
        return EveryToken()
    return SomeTokens(decision.index, decision.valid)
