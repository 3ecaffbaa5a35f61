"""Mixup and cutmix: each mixed row combines the images and labels of two rows of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ...modules.tokens.draws import uniform

# Separates these draws from those of the model's stages, which are numbered from 0.
_DRAWS = 1 << 21
_TABLE = 4096


@dataclass(frozen=True)
class Mixed:
    """A mixed batch.

    Attributes:
        pixel_values: (B, channels, height, width).
        labels: (B, classes) float32, each row sums to 1.
    """

    pixel_values: Tensor
    labels: Tensor


class Mixing:
    """Mixup (arXiv 1710.09412) and cutmix (arXiv 1905.04899), drawn for each row.

    The draws of a row (whether it is mixed, the method, the share, the box) depend on (seed, step, sample id) alone: they are the same on
    any number of processes and after resuming. The partner of a row is the previous row in the batch of its process, so the partner
    does change with the number of processes and the batch size. Every row is the partner of exactly one other row.

    Under cutmix all tokens of a row get the row's mixed label, those of the pasted box too: estimators that learn from
    ``trace.labels`` get shares that are right for the row, not for each token.

    Args:
        mixup: α of mixup's Beta(α, α); 0 turns mixup off.
        cutmix: α of cutmix's Beta(α, α); 0 turns cutmix off.
        probability: share of the rows that are mixed.
        switch: if both are on, share of the mixed rows that use cutmix.
        seed: seed of the draws.
    """

    def __init__(self, mixup: float = 0.0, cutmix: float = 0.0, probability: float = 1.0, switch: float = 0.5, seed: int = 0) -> None:
        self.mixup, self.cutmix, self.probability, self.seed = mixup, cutmix, probability, seed
        self.switch = switch if mixup and cutmix else float(cutmix > 0)
        self._quantiles = {name: _beta_quantiles(alpha) for name, alpha in (("mixup", mixup), ("cutmix", cutmix))}

    def __call__(self, pixel_values: Tensor, labels: Tensor, step: int, sample_ids: Tensor) -> Mixed:
        """Mixes a batch.

        Args:
            pixel_values: (B, channels, height, width).
            labels: (B, classes) float32.
            step: optimizer step.
            sample_ids: (B,) int64.
        """
        rows, (height, width), device = len(labels), pixel_values.shape[-2:], pixel_values.device
        draws = uniform(self.seed, step, sample_ids, _DRAWS, torch.arange(5, device=device).expand(rows, 5))
        mixed, pasted = draws[:, 0] < self.probability, draws[:, 1] < self.switch
        own = self._share(draws[:, 2], pasted).masked_fill(~mixed, 1.0)
        partner = pixel_values.roll(1, 0)
        box = _box(1 - own, draws[:, 3], draws[:, 4], height, width) & (mixed & pasted)[:, None, None]
        # The area that the box covers after rounding to pixels and clipping at the border.
        own = torch.where(pasted, 1 - box.float().mean((1, 2)), own)
        blend = torch.where(pasted, 1.0, own).to(pixel_values.dtype)[:, None, None, None]
        blended = torch.where(blend < 1, blend * pixel_values + (1 - blend) * partner, pixel_values)
        share = own[:, None].to(labels.dtype)
        return Mixed(torch.where(box[:, None], partner, blended), share * labels + (1 - share) * labels.roll(1, 0))

    def _share(self, draws: Tensor, pasted: Tensor) -> Tensor:
        """(B,) share of its own image that a row keeps: Beta(α, α) quantiles of uniform draws."""
        return torch.where(pasted, _interpolate(self._quantiles["cutmix"], draws), _interpolate(self._quantiles["mixup"], draws))


def soft_labels(labels: Tensor, classes: int, smoothing: float = 0.0) -> Tensor:
    """(B, classes) float32 from int64 (B,): ``smoothing`` of the mass is spread evenly over all classes (arXiv 1512.00567)."""
    return functional.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def _beta_quantiles(alpha: float) -> Tensor:
    """Quantiles of Beta(α, α) at even steps from 0 to 1; all ones if α is 0."""
    if not alpha:
        return torch.ones(_TABLE + 1)
    # scipy is a requirement of scikit-learn.
    from scipy.special import betaincinv

    return torch.from_numpy(betaincinv(alpha, alpha, torch.linspace(0, 1, _TABLE + 1, dtype=torch.float64).numpy())).float()


def _interpolate(table: Tensor, draws: Tensor) -> Tensor:
    table = table.to(draws.device)
    place = draws * (len(table) - 1)
    below = place.long().clamp(max=len(table) - 2)
    return torch.lerp(table[below], table[below + 1], place - below)


def _box(area: Tensor, down: Tensor, across: Tensor, height: int, width: int) -> Tensor:
    """(B, height, width) bool: a box with the image's aspect ratio around a random centre, clipped at the border.

    Args:
        area: (B,) share of the image's area.
        down, across: (B,) centre, as fractions of height and width.
    """

    def inside(centre: Tensor, length: int) -> Tensor:
        half = (length * area.sqrt() / 2)[:, None]
        pixels = torch.arange(length, device=area.device) + 0.5
        return (pixels - centre[:, None] * length).abs() < half

    return inside(down, height)[:, :, None] & inside(across, width)[:, None, :]
