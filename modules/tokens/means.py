"""Means over the tokens of a row or document."""

from __future__ import annotations

from torch import Tensor

from .state import TokenState


def mean_of_routable(values: Tensor, state: TokenState) -> Tensor:
    """(B, M, D) -> (B, 1, D) mean over the routable tokens; in packed rows (B, M, D), the mean of each token's own document."""
    if state.document is None:
        routable = state.routable.unsqueeze(1).to(values.dtype)
        return (routable @ values) / routable.sum(-1, keepdim=True).clamp(min=1)
    number = state.present_by_document
    owner = state.document.unsqueeze(-1).expand_as(values)
    total = values.new_zeros(*number.shape, values.shape[-1]).scatter_add(1, owner, values * state.routable.unsqueeze(-1))
    return (total / number.clamp(min=1).unsqueeze(-1)).gather(1, owner)
