"""Nearest merger: merges every removed token into the kept token that is nearest in the image."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cost.shape import StackShape
from ..scorers.base import Scored
from ..site import SiteInput, TokenSpec
from ..tokens.decision import Decision
from .base import Merged, Merger, merge_into


class NearestMerger(Merger):
    """Merges each token that is not kept into the kept token nearest to it in the patch grid, weighted by size.

    Of kept tokens that are equally near, the first one in reading order takes the token. Without a grid, distance is that of positions.
    Where a later layer joins squares of patches, distance is that of squares, and each patch of a square goes to the patch in the same
    place of the kept one, so that what is joined is a mean of squares.

    Args:
        spec: the tokens to merge.
        corners: a kept token, or square of tokens, is the upper left corner of the area that it stands for, whose side is that of the mean
            area of what is kept, and distance is from the centre of the area. With scorer ``uniform_grid`` and keep 1/4, 1/16 … this is
            average pooling of the grid (M3, arXiv 2405.17430).
    """

    def __init__(self, spec: TokenSpec, corners: bool = False) -> None:
        super().__init__(spec)
        self.corners, self.side = corners, spec.side

    def forward(self, inputs: SiteInput, scored: Scored, decision: Decision) -> Merged:
        state, grid = inputs.state, inputs.flow.grid
        if decision.keeps_all(state):
            return Merged(inputs.hidden_states, state)
        place = inputs.flow.cells(state)
        down, across = (place, torch.zeros_like(place)) if grid is None else inputs.flow.squares(state, self.side)
        stays = state.routable.gather(1, decision.index)
        if decision.valid is not None:
            stays = stays & decision.valid
        # Sides of the areas, and twice the distance from a corner to the centre, so that distances stay integers.
        side = (state.routable.sum(-1) / stays.sum(-1).clamp(min=1)) ** (1.0 if grid is None else 0.5)
        centre = ((side - 1).round().long() * self.corners)[:, None, None]
        # (B, M, K) four times the squared distances to the kept tokens, to real and routable ones only.
        distance = sum(
            (2 * values[:, :, None] - 2 * values.gather(1, decision.index)[:, None] - centre).square() for values in (down, across)
        )
        assert isinstance(distance, Tensor)
        far = torch.iinfo(distance.dtype).max
        # argmin takes any of several equal ones: the slot decides.
        first = torch.arange(stays.shape[1], device=stays.device)
        fits = stays[:, None]
        if self.side > 1 and grid is not None:
            inner = place // grid[1] % self.side * self.side + place % grid[1] % self.side
            fits = fits & (inner[:, :, None] == inner.gather(1, decision.index)[:, None])
        order = (distance * stays.shape[1] + first).masked_fill(~fits, far)
        return merge_into(inputs, decision, decision.index.gather(1, order.argmin(-1)), proportional=False)

    def macs(self, shape: StackShape, tokens: int, kept: int) -> int:
        return (tokens - kept) * shape.hidden
