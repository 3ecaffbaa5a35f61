"""Perplexity, of language models. By hand: torchmetrics' would need the logits of all tokens at once, which the loss never holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...data.splits import Splits
from ..losses.token_loss import TokenLoss
from .quality import Quality


@dataclass
class Perplexity(Quality):
    """Perplexity of the predicted tokens, and what can be compared between tokenizers: bits a byte of their text.

    Attributes:
        nats: negative log-likelihood of all of them.
        tokens: predicted.
        bytes: of their text, in UTF-8; special tokens have none, and still cost nats.
    """

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0

    def add(self, out: TokenLoss, batch: Mapping[str, Any]) -> None:
        self.nats, self.tokens, self.bytes = self.nats + float(out.total), self.tokens + int(out.count), self.bytes + batch["bytes"]

    def merge(self, other: Perplexity) -> None:
        self.nats, self.tokens, self.bytes = self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / max(1, self.tokens)

    @property
    def value(self) -> float:
        # Untrained models of large vocabularies may be past what a float holds.
        return math.exp(min(self.loss, 700.0))

    def details(self, data: Splits) -> dict[str, Any]:
        bits = self.nats / math.log(2) / self.bytes if self.bytes else None
        return {"loss": self.loss, "bits_per_byte": bits, "tokens": self.tokens, "bytes": self.bytes}
