"""Shortcut: the base class of all shortcuts."""

from __future__ import annotations

from torch import Tensor, nn

from ..cost.shape import StackShape


class Shortcut(nn.Module):
    """Computes for one token by itself what it gets in place of the update of the layer, or of the half, that it bypasses.

    A shortcut is built with ``spec``, the TokenSpec of the tokens, and its options.
    """

    @property
    def fitted(self) -> bool:
        """``fit`` has run, or there is nothing to fit."""
        raise NotImplementedError

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, M, C) tokens before the layer -> (B, M, C), what is added to them."""
        raise NotImplementedError

    def fit(self, tokens: Tensor, updates: Tensor) -> float:
        """Sets the weights before training.

        Args:
            tokens: (P, C) tokens before the layer.
            updates: (P, C) what the layer adds to them.

        Returns:
            Share of the updates' squares that it predicts for tokens that it has not seen; 1 is all.
        """
        raise NotImplementedError

    def macs(self, shape: StackShape, tokens: int) -> int:
        """MACs for one row with this many tokens."""
        raise NotImplementedError
