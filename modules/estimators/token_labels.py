"""Token-labels estimator: an auxiliary loss in which every token learns the label of its row, or of its own part of the input."""

from __future__ import annotations

import torch
from torch import Tensor

from ..scorers.base import Scored
from ..site import SiteInput
from ..tokens.decision import Decision
from ..tokens.labels import IGNORE_PIXEL
from .base import Estimate, Estimator


class TokenLabelsEstimator(Estimator):
    """Cross-entropy of each token's own answer with its label, for the ``evidence`` scorer.

    The label of a token depends on the task. A label of the row, one class or a distribution, is the label of each of its tokens. If
    every token or every pixel has a label, a token learns the fraction of each class in its own patch; its score is still the distance
    of its answer from the row's mean answer, so that tokens like the rest of the image score low. A token without a label (all of its
    pixels ignored) is left out of the loss.

    Args:
        weight: weight of this loss relative to the task's loss.
    """

    needs_answers = True

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        if weight <= 0:
            raise ValueError(f"estimator 'token_labels': weight = {weight} must be greater than 0")
        self.weight = weight

    def forward(self, inputs: SiteInput, scored: Scored, decision: Decision) -> Estimate:
        answers, state, flow, labels = scored.answers, inputs.state, inputs.flow, inputs.trace.labels
        assert answers is not None
        if labels is None:
            raise ValueError(
                "estimator 'token_labels' needs the labels in training: make the trace with Trace(labels=labels) or "
                "budget.trace(step, labels=labels)"
            )
        counted = state.routable
        if labels.ndim == 3:
            if labels.dtype.is_floating_point:
                own = labels.gather(1, state.position.unsqueeze(-1).expand(-1, -1, labels.shape[-1]))
            else:
                own = flow.of_cells(patch_labels(labels, flow.grid, answers.shape[1]), state)
            likelihood = (answers * own.transpose(1, 2)).sum(1)
            counted = counted & (own.sum(-1) > 0)
        elif labels.dtype.is_floating_point:
            likelihood = (answers * labels.unsqueeze(-1)).sum(1)
        else:
            likelihood = answers.gather(1, labels[:, None, None].expand(-1, 1, answers.shape[2])).squeeze(1)
        return Estimate(loss=-self.weight * (likelihood * counted).sum() / counted.sum().clamp(min=1))


@torch.no_grad()
def patch_labels(labels: Tensor, grid: tuple[int, int] | None, classes: int) -> Tensor:
    """The fraction of each class among the labelled pixels of each patch.

    Args:
        labels: (B, height, width) int64, IGNORE_PIXEL for a pixel without a label.
        grid: number of patches (down, across) of the images.
        classes: number of classes.

    Returns:
        (B, patches, classes) float32; zeros for a patch without a labelled pixel.
    """
    if grid is None:
        raise ValueError("labels of pixels need a backbone whose tokens are patches on a grid, in reading order")
    rows, height, width = labels.shape
    down, across = height // grid[0], width // grid[1]
    # A patch embedding ignores the pixels at the right and the bottom that fill no patch.
    cut = labels[:, : grid[0] * down, : grid[1] * across].reshape(rows, grid[0], down, grid[1], across)
    cut = cut.permute(0, 1, 3, 2, 4).reshape(rows, grid[0] * grid[1], -1)
    # Ignored pixels are counted in an extra class after the last.
    cut = cut.masked_fill(cut == IGNORE_PIXEL, classes)
    counts = cut.new_zeros(rows, cut.shape[1], classes + 1, dtype=torch.float32)
    counts = counts.scatter_add_(2, cut, torch.ones_like(cut, dtype=torch.float32))[..., :classes]
    return counts / counts.sum(-1, keepdim=True).clamp(min=1)
