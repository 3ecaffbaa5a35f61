"""What every selector shares."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ..state import Decision, TokenState


class Selector(nn.Module):
    """Scores and a count in, a decision out.

    Attributes:
        lookahead: the decision for a token depends on later tokens.
    """

    lookahead: ClassVar[bool] = False

    def forward(self, scores: Tensor, state: TokenState, count: int | Tensor, noise: Tensor | None) -> Decision:
        """
        Args:
            scores: (B, M) float32, higher means keep.
            state: the tokens at the site.
            count: routable tokens to keep of each row, an int for all rows or int64 (B,).
            noise: (B, M) standard Gumbel draws times the schedule's strength; None where nothing is explored.
        """
        raise NotImplementedError
