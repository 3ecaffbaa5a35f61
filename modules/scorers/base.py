"""Scorer: the base class of all scorers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..cost.shape import StackShape
from ..site import SiteInput, TokenSpec
from ..tokens.documents import DocumentRows
from ..tokens.state import TokenState
from ..tokens.trace import Update


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
        probabilities: the sigmoid of a score is a keep probability, which a regularizer can use.
        answers_task: every token answers the task by itself; ``Scored.answers`` is set.
        lookahead: the score of a token depends on later tokens.
        matches: ``Scored.partner`` is set: every token that may be removed, up to half of them, has a partner that is always kept.
        count: count rule for stages that set none.
        reads_pixels: the scorer reads the model's input image.
        reads_cls: the scorer reads the CLS query of the site's layer.
        reads_query: the scorer reads the query of any token, and keys, with the layer's positions.
        reads_prompt: the scorer reads where the prompt of a row ends: for scopes of a prompt or an image in a language model.
        fits_updates: ``fit`` sets its weights before training, from what the site's layer changes in tokens. For bypass sites.
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
    reads_prompt: ClassVar[bool] = False
    fits_updates: ClassVar[bool] = False

    def __init__(self, spec: TokenSpec) -> None:
        super().__init__()

    @property
    def reads_keys(self) -> bool:
        """The scorer reads the keys that the site's layer computes."""
        return False

    @property
    def learns_updates(self) -> bool:
        """``update_loss`` trains the scorer beside the task."""
        return False

    def forward(self, inputs: SiteInput) -> Scored:
        raise NotImplementedError

    def fit(self, tokens: Tensor, sizes: Tensor) -> float:
        """Fits the scorer to the (P,) relative sizes of a layer's updates of (P, C) tokens; returns how well it ranks held-out ones."""
        raise NotImplementedError

    def update_loss(self, scores: Tensor, update: Update) -> Tensor:
        """Scalar loss of (B, K) scores as predictions of an update."""
        raise NotImplementedError

    def macs(self, shape: StackShape, tokens: int) -> int:
        """MACs for one row of ``tokens`` tokens, protected tokens included."""
        return 0


class ComparingScorer(Scorer):
    """A scorer that compares the tokens of a row with each other. In packed rows it compares those of each document, as if it were alone."""

    lookahead = True

    def forward(self, inputs: SiteInput) -> Scored:
        hidden_states, state = inputs.hidden_states, inputs.state
        if state.document is None:
            return Scored(self.compare(hidden_states, state))
        rows = DocumentRows.of(state)
        return Scored(rows.put(self.compare(rows.take(hidden_states), rows.state), state))

    def compare(self, hidden_states: Tensor, state: TokenState) -> Tensor:
        """(B, M) float32 scores of (B, M, C) tokens, of which the routable ones of a row are compared."""
        raise NotImplementedError
