"""Units: squares of patches that a later layer joins into one token, so that a stage keeps or removes each as a whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .decision import Decision
from .state import TokenState


@dataclass(frozen=True)
class Units:
    """The units of the current tokens. Leading tokens, such as CLS, are units of one token, before the others.

    Attributes:
        order: (B, M) int64, slots of the leading tokens, then of each unit's tokens in the order of their positions, then padding.
        leading: number L of leading tokens.
        size: tokens s of each other unit.
        number: (B, U) int64, number of each unit that is not leading, U = (M - L) / s; without a meaning for padding.
        state: TokenState of the L + U units, whose positions are those of their first tokens.
    """

    order: Tensor
    leading: int
    size: int
    number: Tensor
    state: TokenState

    @staticmethod
    def of(state: TokenState, numbers: Tensor, size: int, leading: int = 0) -> Units:
        """
        Args:
            state: TokenState of tokens of which all units are whole.
            numbers: (B or 1, N) int64, unit of each original token, counted from 0; -1 for leading tokens.
            size: tokens of a unit.
            leading: number of leading tokens of each row.
        """
        own = numbers.expand(state.rows, -1).gather(1, state.position)
        # Padding comes last.
        keys = own if state.valid is None else own.masked_fill(~state.valid, torch.iinfo(own.dtype).max)
        order = keys.sort(dim=-1, stable=True).indices
        first = torch.cat([order[:, :leading], order[:, leading::size]], 1)
        valid = None if state.valid is None else state.valid.gather(1, first)
        return Units(order, leading, size, own.gather(1, order[:, leading::size]), state.select(first, valid))

    @staticmethod
    def at(state: TokenState, numbers: Tensor | None, size: int, leading: int) -> Units | None:
        """The units at a site, as ``of``; None where units are single tokens, and each stays or leaves by itself."""
        if size == 1:
            return None
        assert numbers is not None
        return Units.of(state, numbers, size, leading)

    def mean(self, values: Tensor) -> Tensor:
        """(B, M, …) values of tokens -> (B, L + U, …) means over the tokens of each unit."""
        index = self.order.view(*self.order.shape, *[1] * (values.ndim - 2)).expand(-1, -1, *values.shape[2:])
        ordered = values.gather(1, index)
        return torch.cat(
            [ordered[:, : self.leading], ordered[:, self.leading :].reshape(len(values), -1, self.size, *values.shape[2:]).mean(2)], 1
        )

    def spread(self, values: Tensor) -> Tensor:
        """(B, L + U) values of units -> (B, M), each token with that of its unit."""
        of_tokens = torch.cat([values[:, : self.leading], values[:, self.leading :].repeat_interleave(self.size, 1)], 1)
        return torch.zeros_like(of_tokens).scatter(1, self.order, of_tokens)

    def tokens_of(self, decision: Decision, state: TokenState) -> Decision:
        """The Decision over tokens of a Decision over units.

        Args:
            decision: the units that stay; leading ones always do.
            state: TokenState of the tokens.
        """
        slots = self.order[:, self.leading :].reshape(len(self.order), -1, self.size)
        units = (decision.index[:, self.leading :] - self.leading).unsqueeze(-1).expand(-1, -1, self.size)
        index = torch.cat([self.order[:, : self.leading], slots.gather(1, units).flatten(1)], 1)
        if decision.valid is None:
            return Decision(index.sort(-1).values, None, decision.empty, cut=decision.cut)
        valid = torch.cat([decision.valid[:, : self.leading], decision.valid[:, self.leading :].repeat_interleave(self.size, 1)], 1)
        sorting = index.masked_fill(~valid, state.tokens).sort(dim=-1, stable=True).indices
        return Decision(index.gather(1, sorting), valid.gather(1, sorting), decision.empty, cut=decision.cut)
