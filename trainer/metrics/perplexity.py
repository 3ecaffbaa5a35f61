"""Perplexity of language models. Not from torchmetrics, which needs the logits of all tokens at once; the loss never has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...data.splits import Splits
from ..losses.token_loss import TokenLoss
from .quality import Quality, mean


@dataclass
class Perplexity(Quality):
    """Perplexity of the predicted tokens, and bits per byte of their text, which is comparable between tokenizers.

    Attributes:
        nats: negative log-likelihood of all predicted tokens.
        tokens: number of predicted tokens.
        bytes: UTF-8 bytes of their text; special tokens have 0 bytes but count in ``nats``.
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
        """Mean negative log-likelihood of a token, in nats."""
        return mean(self.nats, self.tokens, "predicted token")

    @property
    def value(self) -> float:
        # The loss of an untrained model with a large vocabulary may overflow a float.
        return math.exp(min(self.loss, 700.0))

    def details(self, data: Splits) -> dict[str, Any]:
        bits = self.nats / math.log(2) / self.bytes if self.bytes else None
        return {"loss": self.loss, "bits_per_byte": bits, "tokens": self.tokens, "bytes": self.bytes}
