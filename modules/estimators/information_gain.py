"""Every token predicts the label alone; the scorer learns how much its prediction gains."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..state import Decision, TokenState, Trace
from .base import Estimate, Estimator


class InformationGainEstimator(Estimator):
    """Trains the scores on how much each token tells of the label by itself.

    An auxiliary head on the scorer's features of one token classifies it; a token that carries nothing learns to answer with
    the prior. The scores are regressed on KL(p(label | token) || p(label)), the information in that answer, relative to the
    mean of the row. So dropped tokens teach like kept ones, and the backbone gets no gradient from it when the scorer's input
    is detached (as with the auxiliary heads of Token Cropr, arXiv 2412.00965).

    Tokens do not compete. Heads that pool them, tried here first, settle on a part of what matters (one half of every digit)
    and leave the rest to chance; so does regressing on log p(the true label | token), which is negative for tokens whose
    answer is still overconfident.

    Args:
        features: width of the scorer's per-token features.
        classes: number of labels.
        weight: weight of the head's and the regression's loss beside the task's.
    """

    def __init__(self, features: int, classes: int, weight: float = 1.0) -> None:
        super().__init__(features, classes)
        if weight <= 0:
            raise ValueError(f"estimator 'information_gain': weight = {weight} must be greater than 0")
        self.weight = weight
        self.classify = nn.Linear(features, classes)

    def forward(self, scores: Tensor, features: Tensor, decision: Decision, state: TokenState, trace: Trace) -> Estimate:
        labels = trace.labels
        if labels is None:
            raise ValueError(
                "estimator 'information_gain' needs the labels in training: call model(..., labels=labels), or make the trace with labels"
            )
        with torch.autocast(scores.device.type, enabled=False):
            logits = functional.linear(features.float(), self.classify.weight.float(), self.classify.bias.float())
            answers = logits.log_softmax(-1)
            if labels.dtype.is_floating_point:
                likelihood = (answers * labels[:, None]).sum(-1)
            else:
                likelihood = answers.gather(2, labels[:, None, None].expand(-1, answers.shape[1], 1)).squeeze(-1)
            heard = state.routable.float()
            target = self._information(answers.detach(), heard)
            # Only differences within a row decide what stays; the level is left to the budget's regulariser.
            number = heard.sum(-1, keepdim=True).clamp(min=1)
            target = target - (target * heard).sum(-1, keepdim=True) / number
            centred = scores - (scores * heard).sum(-1, keepdim=True) / number
            per_token = (centred - target).square() - likelihood
            loss = self.weight * (per_token * heard).sum() / number.sum()
        return Estimate(loss=loss)

    @staticmethod
    def _information(answers: Tensor, heard: Tensor) -> Tensor:
        """(B, M) KL divergence of each token's answer from the mean answer of the batch."""
        probabilities = answers.exp()
        prior = (probabilities * heard.unsqueeze(-1)).sum((0, 1)) / heard.sum().clamp(min=1)
        return (probabilities * (answers - prior.clamp(min=1e-9).log())).sum(-1)

    def macs(self, tokens: int) -> int:
        return tokens * self.classify.in_features * self.classify.out_features
