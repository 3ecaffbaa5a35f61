"""Teaches every token its row's label."""

from __future__ import annotations

from torch import Tensor

from ..state import Decision, TokenState, Trace
from .base import Estimate, Estimator


class TokenLabelsEstimator(Estimator):
    """Cross-entropy of each token's own answer with the label of its row, for the ``evidence`` scorer.

    Args:
        weight: of this loss beside the task's.
    """

    needs_answers = True

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        if weight <= 0:
            raise ValueError(f"estimator 'token_labels': weight = {weight} must be greater than 0")
        self.weight = weight

    def forward(self, scores: Tensor, answers: Tensor | None, decision: Decision, state: TokenState, trace: Trace) -> Estimate:
        assert answers is not None
        labels = trace.labels
        if labels is None:
            raise ValueError(
                "estimator 'token_labels' needs the labels in training: call model(..., labels=labels), or make the trace with labels"
            )
        if labels.dtype.is_floating_point:
            likelihood = (answers * labels.unsqueeze(-1)).sum(1)
        else:
            likelihood = answers.gather(1, labels[:, None, None].expand(-1, 1, answers.shape[2])).squeeze(1)
        heard = state.routable
        return Estimate(loss=-self.weight * (likelihood * heard).sum() / heard.sum().clamp(min=1))
