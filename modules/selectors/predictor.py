"""Predictor selector: top-k in training, and a trained causal predictor of its decisions in evaluation."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from ..cost.shape import StackShape
from ..precision import Float32Linear
from ..site import TokenSpec
from ..tokens.decision import Decision
from ..tokens.state import TokenState
from .base import Auxiliary, Request, everything
from .threshold import ThresholdSelector


class PredictorSelector(ThresholdSelector):
    """Trains on exact top-k decisions, and in evaluation uses a small network that predicts from each token alone whether top-k keeps it.

    The network reads detached tokens and is trained by binary cross-entropy (Mixture-of-Depths, arXiv 2404.02258, its second sampling
    method). Its threshold follows its logits in training, so that the fraction of tokens kept is the requested one even if the
    predictions are uncertain.

    Args:
        spec: the tokens to select from.
        width: width of the hidden layer; None means C // 4, at least 16.
        weight: weight of the auxiliary loss relative to the task's loss.
        rate: weight of the newest batch in the threshold's moving average.
        bucket: the padded length is a multiple of it; None means 16 in a causal model and 1 otherwise.
    """

    adaptive = False
    # The threshold applies to the predictor's logits, not to the scores.
    cuts = False
    by_scores = False
    # Training decides by top-k.
    ignores_noise = False

    def __init__(
        self, spec: TokenSpec, width: int | None = None, weight: float = 1.0, rate: float = 0.05, bucket: int | None = None
    ) -> None:
        super().__init__(spec, calibrate=True, rate=rate, bucket=bucket)
        if width is not None and width < 1:
            raise ValueError(f"selector 'predictor': width = {width} must be at least 1")
        if weight <= 0:
            raise ValueError(f"selector 'predictor': weight = {weight} must be greater than 0")
        self.weight = weight
        self.width = width or max(16, spec.hidden_size // 4)
        self.norm = nn.LayerNorm(spec.hidden_size, elementwise_affine=False)
        self.look = nn.Linear(spec.hidden_size, self.width)
        self.guess = Float32Linear(self.width, 1)

    def is_noncausal(self, request: Request) -> bool:
        return (self.training or request.lookahead) and request.keep < 1

    def logits(self, hidden_states: Tensor | None) -> Tensor:
        """(B, M, C) -> (B, M) float32: predicted log-odds that a token is among the top k."""
        assert hidden_states is not None
        tokens = self.norm(hidden_states.detach())
        guessed: Tensor = self.guess(functional.relu(self.look(tokens)))
        return guessed.squeeze(-1)

    def forward(self, scores: Tensor, state: TokenState, request: Request) -> Decision:
        if request.keep >= 1:
            return everything(state)
        if self.is_noncausal(request):
            decision: Decision = self.top_k(scores, state, request)
            return decision
        logits = self.logits(request.hidden_states)
        return self.decide(logits > self.cut_for(request), logits, state)

    def auxiliary(self, decision: Decision, state: TokenState, request: Request) -> Auxiliary:
        if not self.is_noncausal(request):
            return Auxiliary()
        logits, routable = self.logits(request.hidden_states), state.routable
        chosen = decision.kept_mask(state.tokens)
        if self.training:
            self.follow(logits.detach(), routable, request)
        number = routable.sum().clamp(min=1)
        losses = functional.binary_cross_entropy_with_logits(logits, chosen.to(logits.dtype), reduction="none")
        agrees = ((logits > self.cut_for(request)) == chosen) & routable
        return Auxiliary(self.weight * (losses * routable).sum() / number, agrees.sum() / number)

    def macs(self, shape: StackShape, tokens: int) -> int:
        return tokens * (shape.hidden * self.width + self.width)

    @property
    def needs_probabilities(self) -> bool:  # type: ignore[override]
        return False
