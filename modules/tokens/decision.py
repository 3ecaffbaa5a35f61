"""Decision: the tokens of each row that a stage keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .state import TokenState


@dataclass(frozen=True)
class Decision:
    """The tokens that a stage keeps.

    Attributes:
        index: (B, K) int64 slots of the kept tokens, sorted, protected tokens included.
        valid: (B, K) bool, False for padding of ``index``; None if every row keeps the same number.
        empty: no row keeps a token; ``index`` is all padding.
        everything: every slot is kept in its place, padding included.
        cut: threshold that a kept token's score exceeds, a scalar or (B, 1); None if the decision used no threshold.
        rows: (R,) int64, if rows have one token each (generation): the rows that keep their token; None otherwise.
    """

    index: Tensor
    valid: Tensor | None
    empty: bool = False
    everything: bool = False
    cut: Tensor | None = None
    rows: Tensor | None = None

    def keeps_all(self, state: TokenState) -> bool:
        """No token is removed or moved."""
        return self.everything or (self.valid is None and state.valid is None and self.index.shape[1] == state.tokens)

    def kept_mask(self, tokens: int) -> Tensor:
        """(B, tokens) bool: True at the kept slots."""
        mask = torch.zeros(self.index.shape[0], tokens + 1, dtype=torch.bool, device=self.index.device)
        # Padding is written to an extra slot after the last token.
        target = self.index if self.valid is None else self.index.masked_fill(~self.valid, tokens)
        return mask.scatter_(1, target, True)[:, :tokens]
