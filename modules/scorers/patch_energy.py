"""Patch-energy scorer: keeps the patches whose pixels differ most from the image mean."""

from __future__ import annotations

from torch.nn import functional

from ..site import SiteInput
from .base import Scored, Scorer


class PatchEnergyScorer(Scorer):
    """Mean squared deviation of a patch's pixels from the mean colour of its image.

    The ranking does not change with brightness or contrast normalisation of the whole image. It is the strongest untrained control for
    images on a flat background; a router should beat it.
    """

    reads_pixels = True

    def forward(self, inputs: SiteInput) -> Scored:
        flow = inputs.flow
        if flow.pixel_values is None or flow.grid is None:
            raise ValueError("scorer 'patch_energy' needs an image backbone: this forward has no pixel_values")
        image = flow.pixel_values.float()
        deviation = (image - image.mean((2, 3), keepdim=True)).square().mean(1)
        energy = functional.adaptive_avg_pool2d(deviation[:, None], flow.grid).flatten(1)
        return Scored(flow.of_cells(energy.unsqueeze(-1), inputs.state).squeeze(-1))
