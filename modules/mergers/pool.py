"""Pool merger: pools all tokens softly into a fixed number of learned outputs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..cost.shape import StackShape
from ..scorers.base import Scored
from ..site import SiteInput, TokenSpec
from ..tokens.decision import Decision
from ..tokens.gather import take
from .base import Merged, Merger


class PoolMerger(Merger):
    """Divides every token over learned outputs by a softmax; an output is the weighted mean of its shares (after TokenLearner,
    arXiv 2106.11297, whose softmax runs over the tokens instead, so that sizes are not conserved).

    The decision sets only the positions of the outputs; scorer ``uniform_grid`` costs least. An original token is represented by the
    output that has its largest share.

    Args:
        spec: the tokens to pool.
        outputs: number of outputs.
        proportional: in later layers, log(size) is added to the attention logits of each key.
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
        if state.counts is None:
            raise ValueError(
                "merger 'pool' makes the same number of outputs of every row: it supports no rows with padding or with protected tokens amid "
                "others; take merger 'squeeze'"
            )
        # Slots of the routable tokens, in order, and of the outputs among the kept tokens.
        pooled = _first(~state.protected, state.counts.routable)
        chosen = state.select(decision.index, decision.valid)
        made = _first(~chosen.protected, decision.index.shape[1] - state.counts.protected)
        tokens = take(hidden_states, pooled)
        shares = self.share(self.norm(tokens)).float()[..., : made.shape[1]].softmax(-1)
        weights = shares * state.size.gather(1, pooled).unsqueeze(-1)
        size = weights.sum(1)
        outputs = (weights.transpose(1, 2) @ tokens.float()) / size.clamp(min=1e-6).unsqueeze(-1)
        # An original token belongs to the output with the largest share of its current token; a protected token to itself.
        slots = torch.arange(decision.index.shape[1], device=hidden_states.device).expand_as(decision.index)
        belongs = torch.zeros_like(state.position).scatter(1, decision.index, slots)
        if made.shape[1]:
            belongs = belongs.scatter(1, pooled, made.gather(1, shares.argmax(-1)))
        gone = state.source < 0
        places = made.unsqueeze(-1).expand(-1, -1, hidden_states.shape[-1])
        return Merged(
            take(hidden_states, decision.index).scatter(1, places, outputs.to(hidden_states.dtype)),
            replace(
                chosen,
                size=chosen.size.scatter(1, made, size.detach()),
                source=belongs.gather(1, state.source.clamp(min=0)).masked_fill(gone, -1),
                proportional=state.proportional or self.proportional,
            ),
        )

    def macs(self, shape: StackShape, tokens: int, kept: int) -> int:
        return 2 * (tokens - shape.protected) * shape.hidden * (kept - shape.protected)


def _first(mask: Tensor, number: int) -> Tensor:
    """(B, number) int64: the True slots of a (B, M) mask in order; every row must have ``number`` of them."""
    return (~mask).byte().sort(dim=-1, stable=True).indices[:, :number]
