"""What every scorer shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..cost.shape import StackShape
from ..site import SiteInput, TokenSpec


@dataclass(frozen=True)
class Scored:
    """What a scorer found.

    Attributes:
        scores: (B, M) float32; values at protected tokens and padding are ignored.
        answers: (B, classes, M) float32 log-probabilities, where every token answers the task by itself; None otherwise.
        partner: (B, M) int64, the slot that a token would be merged into, where the scorer matches tokens; None otherwise.
    """

    scores: Tensor
    answers: Tensor | None = None
    partner: Tensor | None = None


class Scorer(nn.Module):
    """E, the criterion: gives every token a score, higher means keep.

    Args:
        spec: the tokens that it scores.

    Attributes:
        estimator: name of the estimator that trains it by default; None for a scorer that is not trained.
        chunk_estimator: the same where the tokens that stay make chunks for a restore by ``dechunk``; None takes ``estimator``.
        probabilities: the sigmoid of a score is a keep probability, which a regulariser may pull on.
        answers_task: every token answers the task by itself, and ``Scored.answers`` holds it.
        lookahead: the score of a token depends on later tokens.
        matches: ``Scored.partner`` holds a partner that stays for every token that may go, up to half of them.
        count: count rule where a stage names none.
        reads_pixels: the scorer looks at the model's input image.
        reads_cls: it needs the query of the CLS token, as the layer that follows makes it.
    """

    estimator: ClassVar[str | None] = None
    chunk_estimator: ClassVar[str | None] = None
    probabilities: ClassVar[bool] = False
    answers_task: ClassVar[bool] = False
    lookahead: ClassVar[bool] = False
    matches: ClassVar[bool] = False
    count: ClassVar[str] = "round"
    reads_pixels: ClassVar[bool] = False
    reads_cls: ClassVar[bool] = False

    def __init__(self, spec: TokenSpec) -> None:
        super().__init__()

    @property
    def reads_keys(self) -> bool:
        """It needs the keys that the site's layer makes of the tokens."""
        return False

    def forward(self, inputs: SiteInput) -> Scored:
        raise NotImplementedError

    def macs(self, shape: StackShape, tokens: int) -> int:
        """MACs for one row of ``tokens`` tokens, protected ones included."""
        return 0
