"""Pool: all tokens are softly pooled to a fixed number of learned outputs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional

from ..cost.shape import BackboneShape
from ..scorers.base import Scored, SiteInput, TokenSpec
from ..tokens.decision import Decision
from .base import Merged, Merger


class PoolMerger(Merger):
    """Every token divides itself among learned outputs by a softmax; an output is the mean of what it got (after TokenLearner,
    arXiv 2106.11297, whose softmax runs over the tokens instead, so that sizes do not add up).

    The scorer decides nothing here; ``uniform_grid`` costs least, and its choice says where the outputs stand. An original token
    counts as part of the output that got most of it.

    Args:
        spec: the tokens that it pools.
        outputs: their number.
        proportional: later layers attend to an output in proportion to its size.
    """

    def __init__(self, spec: TokenSpec, outputs: int = 16, proportional: bool = True) -> None:
        super().__init__(spec)
        if isinstance(outputs, bool) or not isinstance(outputs, int) or outputs < 1:
            raise ValueError(f"merger 'pool': outputs = {outputs!r} must be an integer of at least 1")
        self._outputs, self.proportional = outputs, proportional
        self.norm = nn.LayerNorm(spec.hidden_size, elementwise_affine=False)
        self.share = nn.Linear(spec.hidden_size, outputs)

    @property
    def outputs(self) -> int:
        return self._outputs

    def forward(self, inputs: SiteInput, scored: Scored, decision: Decision) -> Merged:
        hidden_states, state = inputs.hidden_states, inputs.state
        prefix, outputs = state.protected_per_row, decision.index.shape[1] - state.protected_per_row
        if state.valid is not None:
            raise ValueError("merger 'pool' makes the same number of outputs of every row: it takes no padded batch")
        shares = self.share(self.norm(hidden_states[:, prefix:])).float()[..., :outputs].softmax(-1)
        weights = shares * state.size[:, prefix:, None]
        size = weights.sum(1)
        pooled = (weights.transpose(1, 2) @ hidden_states[:, prefix:].float()) / size.clamp(min=1e-6).unsqueeze(-1)
        # An original token follows the output that got most of what stands for it.
        belongs = functional.pad(shares.argmax(-1) + prefix, (prefix, 0))
        belongs[:, :prefix] = torch.arange(prefix, device=belongs.device)
        gone = state.source < 0
        chosen = state.select(decision.index, decision.valid)
        return Merged(
            torch.cat([hidden_states[:, :prefix], pooled.to(hidden_states.dtype)], 1),
            replace(
                chosen,
                size=torch.cat([state.size[:, :prefix], size.detach()], 1),
                source=belongs.gather(1, state.source.clamp(min=0)).masked_fill(gone, -1),
                proportional=state.proportional or self.proportional,
            ),
        )

    def macs(self, shape: BackboneShape, tokens: int, kept: int) -> int:
        return 2 * (tokens - shape.prefix) * shape.hidden * (kept - shape.prefix)
