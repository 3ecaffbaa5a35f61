"""What every scorer shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from ..cost.shape import BackboneShape
from ..tokens.state import TokenState
from ..tokens.trace import Trace

if TYPE_CHECKING:
    from ..backbones.base import Backbone


@dataclass(frozen=True)
class TokenSpec:
    """What a scorer is built for.

    Attributes:
        hidden_size: width C of the tokens.
        classes: number of labels of the task.
        patch_values: pixels times channels of the patch that a token comes from; 0 where tokens are no patches.
        has_cls: the first token is one that the task's head reads.
        family: the backbone's name for messages.
        causal: the model's output at a token may depend on no later token.
    """

    hidden_size: int
    classes: int
    patch_values: int = 0
    has_cls: bool = False
    family: str = "this backbone"
    causal: bool = False


@dataclass(frozen=True)
class SiteInput:
    """What a scorer and a merger may look at.

    Attributes:
        hidden_states: (B, M, C) the tokens at the site.
        state: where they came from.
        trace: the forward they belong to.
        stage: index of the stage among the model's stages.
        layer: the layer that the site belongs to.
        backbone: adapter of the model's family.
    """

    hidden_states: Tensor
    state: TokenState
    trace: Trace
    stage: int
    layer: nn.Module
    backbone: type[Backbone]


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
        probabilities: the sigmoid of a score is a keep probability, which a regulariser may pull on.
        answers_task: every token answers the task by itself, and ``Scored.answers`` holds it.
        lookahead: the score of a token depends on later tokens.
        matches: ``Scored.partner`` holds a partner that stays for every token that may go, up to half of them.
        count: count rule where a stage names none.
        reads_pixels: the scorer looks at the model's input image.
    """

    estimator: ClassVar[str | None] = None
    probabilities: ClassVar[bool] = False
    answers_task: ClassVar[bool] = False
    lookahead: ClassVar[bool] = False
    matches: ClassVar[bool] = False
    count: ClassVar[str] = "round"
    reads_pixels: ClassVar[bool] = False

    def __init__(self, spec: TokenSpec) -> None:
        super().__init__()

    def forward(self, inputs: SiteInput) -> Scored:
        raise NotImplementedError

    def macs(self, shape: BackboneShape, tokens: int) -> int:
        """MACs for one row of ``tokens`` tokens, protected ones included."""
        return 0
