"""Predictor: top-k in training, and beside it a causal predictor of who will be among them, which is what is deployed."""

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
    """Trains on the exact top k and deploys a small network that guesses from a token alone whether it would be in it.

    The network reads the tokens without gradient and learns by binary cross-entropy (Mixture-of-Depths, arXiv 2404.02258, its
    second way to sample). Where it is cut is a threshold that follows its logits in training, so that the share of tokens that it
    lets through is the one requested even where it is unsure.

    Args:
        spec: the tokens that it chooses from.
        width: of its hidden layer; None takes C // 4, at least 16.
        weight: of its loss beside the task's.
        rate: weight of the newest batch in the threshold's moving average.
        bucket: rows are filled up to a multiple of it; None takes 16 in a causal model and 1 elsewhere.
    """

    adaptive = False
    # It is the predictor's own logits that are cut, not the scores.
    cuts = False

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

    def looks_ahead(self, request: Request) -> bool:
        return (self.training or request.lookahead) and request.keep < 1

    def logits(self, hidden_states: Tensor | None) -> Tensor:
        """(B, M, C) -> (B, M) float32: log-odds that a token is among the top k, as far as it can know."""
        assert hidden_states is not None
        tokens = self.norm(hidden_states.detach())
        guessed: Tensor = self.guess(functional.relu(self.look(tokens)))
        return guessed.squeeze(-1)

    def forward(self, scores: Tensor, state: TokenState, request: Request) -> Decision:
        if request.keep >= 1:
            return everything(state)
        if self.looks_ahead(request):
            decision: Decision = self.top_k(scores, state, request)
            return decision
        logits = self.logits(request.hidden_states)
        return self.decide(logits > self.threshold, logits, state)

    def auxiliary(self, decision: Decision, state: TokenState, request: Request) -> Auxiliary:
        if not self.looks_ahead(request):
            return Auxiliary()
        logits, routable = self.logits(request.hidden_states), state.routable
        chosen = decision.kept_mask(state.tokens)
        if self.training:
            self.follow(logits.detach(), routable, request.keep)
        number = routable.sum().clamp(min=1)
        losses = functional.binary_cross_entropy_with_logits(logits, chosen.to(logits.dtype), reduction="none")
        agrees = ((logits > self.threshold) == chosen) & routable
        return Auxiliary(self.weight * (losses * routable).sum() / number, agrees.sum() / number)

    def macs(self, shape: StackShape, tokens: int) -> int:
        return tokens * (shape.hidden * self.width + self.width)

    @property
    def needs_probabilities(self) -> bool:  # type: ignore[override]
        return False
