"""Random draws per token, independent of the process.

A draw is a hash of (seed, step, sample id, stage, position): the same on any number of ranks, in any batch, on any device, and when
gradient checkpointing recomputes, without a generator state to save.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
# Stage index of a model's own masking, outside the range of real stages.
_MASKING = 1 << 21


def _mix(value: Tensor) -> Tensor:
    """A bijective mixing of 32 bits held in int64: two rounds of multiply and shift, whose products fit into 63 bits."""
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & _MASK
    value = ((value ^ (value >> 15)) * 0x6C8E9CF5) & _MASK
    return value ^ (value >> 16)


def uniform(seed: int, step: int | Tensor, sample_ids: Tensor, stage: int, position: Tensor) -> Tensor:
    """Uniform draws in (0, 1), one per token.

    Args:
        seed: seed of the run.
        step: training step.
        sample_ids: (B,) int64 identity of each row.
        stage: index of the stage; stages have different draws.
        position: (B, M) int64 original positions.

    Returns:
        (B, M) float32, never exactly 0 or 1.
    """
    start = torch.full((), (seed * 0x9E3779B1 + stage * 0x85EBCA6B) & _MASK, dtype=torch.int64, device=position.device)
    key = _mix(start ^ (torch.as_tensor(step, device=position.device) & _MASK))
    key = _mix(key ^ (sample_ids & _MASK))
    bits = _mix(_mix(key[:, None] ^ (position & _MASK)) ^ key[:, None])
    # 23 bits plus a half: with 24 bits the largest draw would round to 1.
    return ((bits >> 9).float() + 0.5) / (1 << 23)


def masking_order(seed: int, step: int | Tensor, sample_ids: Tensor, patches: int) -> Tensor:
    """(B, patches) float32: in every row a random permutation of 0, 1, …, patches − 1.

    It replaces the ``noise`` of a model that masks (ViT-MAE keeps the patches with the lowest values). The mask is then a function of
    (seed, step, sample id): the same in any batch, on any number of ranks, and after a resume.
    """
    position = torch.arange(patches, device=sample_ids.device).expand(sample_ids.shape[0], -1)
    draws = uniform(seed, step, sample_ids, _MASKING, position)
    return draws.argsort(dim=1, stable=True).argsort(dim=1, stable=True).float()


def gumbel(draws: Tensor) -> Tensor:
    """Standard Gumbel noise from uniform draws, of the same shape."""
    return -torch.log(-torch.log(draws))
