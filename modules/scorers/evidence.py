"""Every token answers the task alone; its score is the information in its answer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..cost.shape import StackShape
from ..precision import Float32Linear, full_precision
from ..site import SiteInput, TokenSpec
from .base import Scored, Scorer


class EvidenceScorer(Scorer):
    """KL(p(label | token) ‖ mean answer of the row): how far a token by itself moves the answer, in nats, float32.

    A two-layer classifier reads one token at a time; trained by the ``token_labels`` estimator, a token that carries nothing
    learns to answer with the prior and scores 0. Dropped tokens learn like kept ones, and no gradient enters the backbone, as
    with the auxiliary heads of Token Cropr (arXiv 2412.00965). Tokens do not compete while they learn: heads that pool them
    were tried first and settle on a part of what matters, one half of every digit, so that seeds differ.

    Where the task labels pixels, a token learns the classes of its own patch instead of its row's. The score is the same: most
    tokens of an image answer with what fills it, which is then its mean answer, and what differs from that stands out.

    Args:
        spec: the tokens that it scores.
        reads: ``tokens``, or ``pixels`` of the patch that a token comes from. A patch embedding that is still being learned
            soon carries only what the kept tokens taught it, and the router cannot find the others again; pixels stay as they
            are. Before layer 0 of a model from scratch read pixels; deeper, or on pretrained weights, read tokens.
        width: hidden width; None takes C // 2, at least 32.
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
        self.reads = reads
        self.width = width or max(32, spec.hidden_size // 2)
        self.classes = spec.classes
        self.values = spec.patch_values if reads == "pixels" else spec.hidden_size
        self.look = nn.Linear(self.values, self.width)
        self.answer = Float32Linear(self.width, spec.classes)

    def forward(self, inputs: SiteInput) -> Scored:
        # Without gradient into what is read, and of unit variance; nearly flat patches stay small instead of being blown up.
        seen, epsilon = (self._patches(inputs), 1e-2) if self.reads == "pixels" else (inputs.hidden_states.detach(), 1e-5)
        features = functional.relu(self.look(functional.layer_norm(seen.to(self.look.weight.dtype), (self.values,), eps=epsilon)))
        logits = self.answer(features)
        with full_precision(features.device):
            # Classes before tokens: a softmax over the last and short dimension is several times slower on a CPU.
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
        """(B, M, patch values) pixels of the patch that each token comes from, zeros for protected tokens."""
        pixels, grid = inputs.flow.pixel_values, inputs.flow.grid
        if pixels is None or grid is None:
            raise ValueError("scorer 'evidence' with reads = 'pixels': this forward carried no pixel_values")
        rows, channels, height, width = pixels.shape
        down, across = height // grid[0], width // grid[1]
        # A patch embedding leaves out what fills no patch at the right and the bottom.
        whole = pixels[:, :, : grid[0] * down, : grid[1] * across]
        cut = whole.reshape(rows, channels, grid[0], down, grid[1], across).permute(0, 2, 4, 1, 3, 5)
        return inputs.flow.of_cells(cut.reshape(rows, grid[0] * grid[1], -1), inputs.state)

    def macs(self, shape: StackShape, tokens: int) -> int:
        return tokens * (self.values * self.width + self.width * self.classes + 2 * self.classes)
