"""What every merger shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..counting import BackboneShape
from ..state import Decision, TokenState


@dataclass(frozen=True)
class Merged:
    """Tokens after a stage.

    Attributes:
        hidden_states: (B, K, C).
        state: where they came from.
    """

    hidden_states: Tensor
    state: TokenState


class Merger(nn.Module):
    """P, the strategy: what becomes of the tokens that the decision leaves out.

    Attributes:
        extra: routable tokens that the merger adds to a row from which something was left out; they count as kept.
        conserves_size: the sizes of all tokens add up to the source tokens, before and after.
    """

    extra: ClassVar[int] = 0
    conserves_size: ClassVar[bool] = True

    def forward(self, hidden_states: Tensor, scores: Tensor, decision: Decision, state: TokenState) -> Merged:
        """
        Args:
            hidden_states: (B, M, C) tokens at the site.
            scores: (B, M) float32.
            decision: which of them stay.
            state: where they came from.
        """
        raise NotImplementedError

    def macs(self, shape: BackboneShape, tokens: int, kept: int) -> int:
        """MACs for one row that goes from ``tokens`` to ``kept`` tokens, protected ones included."""
        return 0


def gather_tokens(hidden_states: Tensor, index: Tensor) -> Tensor:
    """(B, M, C) and (B, K) slots -> (B, K, C)."""
    return hidden_states.gather(1, index.unsqueeze(-1).expand(-1, -1, hidden_states.shape[-1]))
