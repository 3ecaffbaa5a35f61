"""Queries merger: the first of a number of learned queries, which read all tokens of a row, take the places of the kept tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..cost.shape import StackShape
from ..scorers.base import Scored
from ..site import SiteInput, TokenSpec
from ..tokens.decision import Decision
from ..tokens.gather import look_up, take
from ..tokens.state import TokenState
from ..tokens.units import Units
from .base import Merged, Merger

# Period, in places, of the slowest wave of a place's code.
_LONGEST = 10000.0


class QueriesMerger(Merger):
    """Puts what the first m learned queries read in the places of the m kept tokens (Matryoshka Query Transformer, arXiv 2405.19315).

    Each query attends to all tokens of its row, one layer of attention whose keys know the tokens' places in the grid. Query i
    does not depend on m, so that with scorer ``first`` the tokens of a low keep are the first ones of a higher keep, and one model serves
    all of them; ``training_keep`` draws m. In front of values and behind attention are identities at first: each query begins with means of
    tokens, which a pretrained projector knows how to read. A row from which no token is removed is unchanged.

    Where later layers join squares of patches, the queries of a square follow each other.

    Args:
        spec: the tokens to read.
        queries: number of learned queries, the largest number of tokens that stay of a row.
        heads: attention heads; None has one for each 64 values of a token where these divide evenly, else fewer.
    """

    conserves_size = False

    def __init__(self, spec: TokenSpec, queries: int = 256, heads: int | None = None) -> None:
        super().__init__(spec)
        width = spec.hidden_size
        if isinstance(queries, bool) or not isinstance(queries, int) or queries < spec.unit:
            raise ValueError(f"merger 'queries': queries = {queries!r} must be an integer of at least {spec.unit}")
        if heads is not None and (heads < 1 or width % heads):
            raise ValueError(f"merger 'queries': heads = {heads!r} must divide the width of a token, {width}")
        self.heads = heads or math.gcd(width, max(1, width // 64))
        self.unit = spec.unit
        # Kept apart: between forwards, a process that holds a part of the weights sees a parameter of length 0.
        self._most = queries
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        for layer in (self.value, self.out):
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def most(self) -> int:
        return self._most

    def forward(self, inputs: SiteInput, scored: Scored, decision: Decision) -> Merged:
        hidden_states, state = inputs.hidden_states, inputs.state
        kept, kept_state = take(hidden_states, decision.index), state.select(decision.index, decision.valid)
        # Rows of a blank image lose nothing and take part, so that all processes call the same modules.
        if decision.keeps_all(state) and not inputs.flow.blank:
            return Merged(kept, kept_state)
        some_gone = (state.routable & ~decision.kept_mask(state.tokens)).any(-1, keepdim=True)
        changed = kept_state.routable & some_gone
        number = self._numbers(kept_state, inputs).clamp(max=self.most - 1)
        made = self._attend(number, hidden_states, self._places(inputs), state.routable)
        return Merged(torch.where(changed.unsqueeze(-1), made.to(kept.dtype), kept), kept_state)

    def macs(self, shape: StackShape, tokens: int, kept: int) -> int:
        if kept == tokens:
            return 0
        projected = 2 * tokens + kept + min(kept, self.most)
        return projected * shape.hidden**2 + 2 * tokens * kept * shape.hidden

    def _attend(self, number: Tensor, tokens: Tensor, places: Tensor, read: Tensor) -> Tensor:
        """(B, K, C) what queries read.

        Args:
            number: (B, K) int64 number of each query.
            tokens: (B, M, C).
            places: (B, M, C) codes of the tokens' places.
            read: (B, M) bool, tokens that the queries read.
        """

        def heads(values: Tensor) -> Tensor:
            return values.view(*values.shape[:2], self.heads, -1).transpose(1, 2)

        # No number is larger than that of the slots.
        asked = self.query(self.norm(self.queries)[: number.shape[1]])
        asked = heads(look_up(asked.expand(len(number), -1, -1), number))
        keys = heads(self.key(self.norm(tokens) + places.to(tokens.dtype)))
        logits = (asked @ keys.transpose(-1, -2)).float() * asked.shape[-1] ** -0.5
        # A row of padding reads nothing: a finite number in place of -inf avoids NaN.
        weights = logits.masked_fill(~read[:, None, None], torch.finfo(logits.dtype).min).softmax(-1).to(tokens.dtype)
        made: Tensor = self.out((weights @ heads(self.value(tokens))).transpose(1, 2).flatten(2))
        return made

    def _numbers(self, kept: TokenState, inputs: SiteInput) -> Tensor:
        """(B, K) int64 number of the query for each kept token, counted from 0 in its row; without a meaning for others."""
        flow = inputs.flow
        if self.unit > 1:
            assert flow.units is not None
            order = Units.of(kept, flow.units, self.unit, flow.leading).order
            slots = torch.arange(kept.tokens, device=order.device).expand_as(order)
            return (torch.zeros_like(order).scatter(1, order, slots) - flow.leading).clamp(min=0)
        return (kept.routable.cumsum(-1) - 1).clamp(min=0)

    def _places(self, inputs: SiteInput) -> Tensor:
        """(B, M, C) float32 sines and cosines of each token's row and column in the grid; of its position where there is none."""
        grid, width = inputs.flow.grid, self.queries.shape[-1]
        cells = inputs.flow.cells(inputs.state).clamp(min=0)
        axes = [cells] if grid is None else [cells // grid[1], cells % grid[1]]
        waves = max(1, width // (2 * len(axes)))
        rates = _LONGEST ** (-torch.arange(waves, device=cells.device) / waves)
        angles = torch.stack(axes, -1).unsqueeze(-1) * rates
        codes = torch.cat([angles.sin(), angles.cos()], -1).flatten(2)
        return functional.pad(codes, (0, width - codes.shape[-1]))
