"""Patch energy: keeps the patches whose pixels differ most from the image's mean."""

from __future__ import annotations

from torch.nn import functional

from .base import Scored, Scorer, SiteInput


class PatchEnergyScorer(Scorer):
    """Mean squared deviation of a patch's pixels from the mean colour of its image.

    Not changed by brightness or contrast normalisation of the whole image. The strongest plain control for images on a flat
    background: a router is worth its name only where it beats this too.
    """

    reads_pixels = True

    def forward(self, inputs: SiteInput) -> Scored:
        state, trace = inputs.state, inputs.trace
        if trace.pixel_values is None or trace.grid is None:
            raise ValueError("scorer 'patch_energy' needs an image backbone: this forward carried no pixel_values")
        image = trace.pixel_values.float()
        deviation = (image - image.mean((2, 3), keepdim=True)).square().mean(1)
        energy = functional.adaptive_avg_pool2d(deviation[:, None], trace.grid).flatten(1)
        energy = functional.pad(energy, (state.protected_per_row, 0))
        return Scored(energy.gather(1, trace.places_of(state)))
