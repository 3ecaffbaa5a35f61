"""Means over the heads of a linear layer's output."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from .stack import sharded


def mean_over_heads(projection: nn.Module, tokens: Tensor, width: int) -> Tensor:
    """(B, M, D) mean over heads of width D of a linear layer's output for (B, M, C) tokens.

    Where the layer's weights are at hand their mean is taken first, so that the work is that of one head.
    """
    if type(projection) is nn.Linear and not sharded(projection) and projection.weight.device == tokens.device:
        bias = None if projection.bias is None else projection.bias.view(-1, width).mean(0)
        return functional.linear(tokens, projection.weight.view(-1, width, tokens.shape[-1]).mean(0), bias)
    projected: Tensor = projection(tokens)
    return projected.view(*projected.shape[:2], -1, width).mean(2)
