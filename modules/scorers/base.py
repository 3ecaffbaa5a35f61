"""What every scorer shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from ..counting import BackboneShape
from ..state import TokenState, Trace

if TYPE_CHECKING:
    from ..backbones.base import Backbone


@dataclass(frozen=True)
class ScorerInput:
    """What a scorer may look at.

    Attributes:
        hidden_states: (B, M, C) the tokens at the site.
        state: where they came from.
        trace: the forward they belong to.
        stage: index of the stage among the model's stages.
        layer: the layer that follows the site.
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
        features: (B, M, F) what a trained scorer computed of each token on the way, for estimators; None otherwise.
    """

    scores: Tensor
    features: Tensor | None = None


class Scorer(nn.Module):
    """E, the criterion: gives every token a score, higher means keep.

    Attributes:
        trained: the scores are logits with a gradient; sigmoid gives keep probabilities.
        lookahead: the score of a token depends on later tokens.
        reads_pixels: the scorer looks at the model's input image.
        features: width F of the features that ``forward`` gives beside the scores.
    """

    features: int

    trained: ClassVar[bool] = False
    lookahead: ClassVar[bool] = False
    reads_pixels: ClassVar[bool] = False

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.features = 0

    def forward(self, inputs: ScorerInput) -> Scored:
        raise NotImplementedError

    def macs(self, shape: BackboneShape, tokens: int) -> int:
        """MACs for one row of ``tokens`` tokens, protected ones included."""
        return 0
