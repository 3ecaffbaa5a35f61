"""Scorer: the base class of all scorers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..cost.shape import StackShape
from ..site import SiteInput, TokenSpec


@dataclass(frozen=True)
class Scored:
    """Output of a scorer.

    Attributes:
        scores: (B, M) float32; values at protected tokens and padding are ignored.
        answers: (B, classes, M) float32 log-probabilities, if every token answers the task by itself; None otherwise.
        partner: (B, M) int64, slot of the token that a token would be merged into, if the scorer matches tokens; None otherwise.
    """

    scores: Tensor
    answers: Tensor | None = None
    partner: Tensor | None = None


class Scorer(nn.Module):
    """E, the criterion: gives every token a score; tokens with higher scores are kept.

    Args:
        spec: the tokens to score.

    Attributes:
        estimator: name of the default estimator; None for a scorer that is not trained.
        chunk_estimator: name of the default estimator in a stage that makes chunks for a restore by ``dechunk``; None means ``estimator``.
        probabilities: the sigmoid of a score is a keep probability, which a regulariser can use.
        answers_task: every token answers the task by itself; ``Scored.answers`` is set.
        lookahead: the score of a token depends on later tokens.
        matches: ``Scored.partner`` is set: every token that may be removed, up to half of them, has a partner that is always kept.
        count: count rule for stages that set none.
        reads_pixels: the scorer reads the model's input image.
        reads_cls: the scorer reads the CLS query of the site's layer.
        reads_query: the scorer reads the query of any token, and keys, with the layer's positions.
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
    reads_query: ClassVar[bool] = False

    def __init__(self, spec: TokenSpec) -> None:
        super().__init__()

    @property
    def reads_keys(self) -> bool:
        """The scorer reads the keys that the site's layer computes."""
        return False

    def forward(self, inputs: SiteInput) -> Scored:
        raise NotImplementedError

    def macs(self, shape: StackShape, tokens: int) -> int:
        """MACs for one row of ``tokens`` tokens, protected tokens included."""
        return 0
