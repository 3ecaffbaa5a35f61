"""Decision: which tokens of a row stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .state import TokenState


@dataclass(frozen=True)
class Decision:
    """Which tokens stay.

    Attributes:
        index: (B, K) int64 slots that stay, sorted, protected ones included.
        valid: (B, K) bool, False where ``index`` is filler; None when every row keeps the same number.
        empty: nothing stays in any row; ``index`` is filler alone.
        everything: it was decided to leave every slot in its place, filler too.
        cut: score that a token had to be above, a scalar or (B, 1); None where it was decided in another way.
        rows: (R,) int64, where rows have one token, as while generating, those whose token stays; None elsewhere.
    """

    index: Tensor
    valid: Tensor | None
    empty: bool = False
    everything: bool = False
    cut: Tensor | None = None
    rows: Tensor | None = None

    def keeps_all(self, state: TokenState) -> bool:
        """Nothing goes of the tokens that it was made for, nor moves."""
        return self.everything or (self.valid is None and state.valid is None and self.index.shape[1] == state.tokens)

    def kept_mask(self, tokens: int) -> Tensor:
        """(B, tokens) bool: True at the slots that stay."""
        mask = torch.zeros(self.index.shape[0], tokens + 1, dtype=torch.bool, device=self.index.device)
        # Filler writes to a slot past the last token.
        target = self.index if self.valid is None else self.index.masked_fill(~self.valid, tokens)
        return mask.scatter_(1, target, True)[:, :tokens]
