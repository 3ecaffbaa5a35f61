"""Documents of packed rows as rows of their own, for parts that compare the tokens of a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .state import TokenState


@dataclass(frozen=True)
class DocumentRows:
    """The R documents of a batch of packed rows, padded to the longest.

    Attributes:
        index: (R, L) int64, slot of each token in the flattened batch of B · M tokens.
        state: TokenState of these rows, in which every token represents itself.
    """

    index: Tensor
    state: TokenState

    @staticmethod
    def of(state: TokenState) -> DocumentRows:
        """The documents of a TokenState with ``document``. The host waits for their number and the length of the longest."""
        assert state.document is not None
        valid = torch.ones_like(state.protected) if state.valid is None else state.valid
        each = int(state.document.max()) + 1
        row = torch.arange(state.rows, device=valid.device)[:, None]
        # Padding comes last, as a document behind all others.
        owner = (row * each + state.document).masked_fill(~valid, state.rows * each).flatten()
        order = owner.sort(stable=True).indices
        numbers = torch.zeros(state.rows * each + 1, dtype=torch.long, device=valid.device).scatter_add(0, owner, torch.ones_like(owner))
        place = torch.arange(int(numbers[:-1].max()), device=valid.device)
        starts = (numbers.cumsum(0) - numbers)[:-1, None]
        real = place < numbers[:-1, None]
        index = order[(starts + place).clamp(max=len(order) - 1)]
        protected = state.protected.flatten()[index] | ~real
        return DocumentRows(index, TokenState.initial(len(index), index.shape[1], protected, real, valid.device))

    def take(self, values: Tensor) -> Tensor:
        """(B, M, C) -> (R, L, C)."""
        return values.flatten(0, 1)[self.index]

    def put(self, values: Tensor, packed: TokenState) -> Tensor:
        """(R, L) values -> (B, M), zeros in padding.

        Args:
            values: a value for each token.
            packed: TokenState of the packed rows.
        """
        assert self.state.valid is not None
        # The last place takes the values of padding, and is cut off.
        places = self.index.masked_fill(~self.state.valid, packed.rows * packed.tokens)
        full = values.new_zeros(packed.rows * packed.tokens + 1).scatter(0, places.flatten(), values.flatten())
        return full[:-1].view(packed.rows, packed.tokens)
