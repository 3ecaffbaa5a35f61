"""Evidence scorer: every token answers the task by itself, and its score is the information in that answer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..cost.shape import StackShape
from ..precision import Float32Linear, full_precision
from ..site import SiteInput, TokenSpec
from .base import Scored, Scorer


class EvidenceScorer(Scorer):
    """KL(p(label | token) ‖ mean answer of the row), in nats, float32: how far a token's own answer is from the mean.

    A two-layer classifier reads one token at a time and is trained by the ``token_labels`` estimator. A token without information
    learns to answer with the prior and scores 0. Dropped tokens are trained like kept ones, and no gradient enters the backbone, as
    with the auxiliary heads of Token Cropr (arXiv 2412.00965). Tokens do not compete: heads that pool tokens were tried first, and
    learned only a part of the useful tokens (one half of every digit), a different part for each seed.

    If the task labels pixels, a token learns the classes of its own patch instead of its row's label. The score is the same: most
    tokens of an image answer with its background class, which is then the mean answer, and other tokens score high.

    Args:
        spec: the tokens to score.
        reads: ``tokens``, or ``pixels`` of the token's image patch. Take ``pixels`` before layer 0 of a model trained from scratch:
            its patch embedding soon represents only what the kept tokens need, and dropped tokens would never score high again. Take
            ``tokens`` at deeper layers or with pretrained weights.
        width: hidden width; None means C // 2, at least 32.
    """

    estimator = "token_labels"
    answers_task = True
    lookahead = True

    def __init__(self, spec: TokenSpec, reads: str = "tokens", width: int | None = None) -> None:
        super().__init__(spec)
        if width is not None and width < 1:
            raise ValueError(f"scorer 'evidence': width = {width} must be at least 1")
        if reads not in ("tokens", "pixels"):
            raise ValueError(f"scorer 'evidence': reads = {reads!r} must be tokens or pixels")
        if reads == "pixels" and not spec.patch_values:
            raise ValueError("scorer 'evidence': reads = 'pixels' needs a backbone whose tokens are image patches")
        if not spec.classes:
            raise ValueError(
                "scorer 'evidence' learns the label of the task from each token, and questions about images have no label for a token: "
                "take scorer 'learned'"
            )
        self.reads = reads
        self.width = width or max(32, spec.hidden_size // 2)
        self.classes = spec.classes
        self.values = spec.patch_values if reads == "pixels" else spec.hidden_size
        self.look = nn.Linear(self.values, self.width)
        self.answer = Float32Linear(self.width, spec.classes)

    def forward(self, inputs: SiteInput) -> Scored:
        # The input is detached and normalised to unit variance; the larger epsilon keeps nearly flat patches small.
        content, epsilon = (self._patches(inputs), 1e-2) if self.reads == "pixels" else (inputs.hidden_states.detach(), 1e-5)
        features = functional.relu(self.look(functional.layer_norm(content.to(self.look.weight.dtype), (self.values,), eps=epsilon)))
        logits = self.answer(features)
        with full_precision(features.device):
            # Classes before tokens: on a CPU, a softmax over a short last dimension is several times slower.
            answers = logits.transpose(1, 2).contiguous().log_softmax(1)
            with torch.no_grad():
                return Scored(self._information(answers, inputs.state.routable), answers)

    @staticmethod
    def _information(answers: Tensor, routable: Tensor) -> Tensor:
        """(B, classes, M) log-probabilities -> (B, M) KL divergence from the mean answer of the row."""
        probabilities = answers.exp()
        mask = routable.unsqueeze(1).to(probabilities.dtype)
        prior = (probabilities * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
        return (probabilities * (answers - prior.clamp(min=1e-12).log())).sum(1)

    @staticmethod
    def _patches(inputs: SiteInput) -> Tensor:
        """(B, M, patch values) pixels of each token's patch, zeros for protected tokens."""
        pixels, grid = inputs.flow.pixel_values, inputs.flow.grid
        if pixels is None or grid is None:
            raise ValueError("scorer 'evidence' with reads = 'pixels': this forward has no pixel_values")
        rows, channels, height, width = pixels.shape
        down, across = height // grid[0], width // grid[1]
        # A patch embedding ignores the pixels at the right and the bottom that fill no patch.
        whole = pixels[:, :, : grid[0] * down, : grid[1] * across]
        cut = whole.reshape(rows, channels, grid[0], down, grid[1], across).permute(0, 2, 4, 1, 3, 5)
        return inputs.flow.of_cells(cut.reshape(rows, grid[0] * grid[1], -1), inputs.state)

    def macs(self, shape: StackShape, tokens: int) -> int:
        return tokens * (self.values * self.width + self.width * self.classes + 2 * self.classes)
