"""Accuracy of the answers of chats."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...data.splits import Splits
from ..losses.answer_loss import AnswerLoss
from .quality import Quality, mean

# Kind of answers whose kind is unknown.
UNNAMED = -1


@dataclass
class AnswerAccuracy(Quality):
    """Share of answers all of whose tokens are the most likely ones, each given the right ones before it. For answers of one token it is the
    share that greedy decoding gets right.

    Attributes:
        nats: negative log-likelihood of all learned tokens.
        tokens: number of them.
        right: right answers by number of their kind.
        total: answers by number of their kind.
    """

    nats: float = 0.0
    tokens: int = 0
    right: dict[int, int] = field(default_factory=dict)
    total: dict[int, int] = field(default_factory=dict)

    def add(self, out: AnswerLoss, batch: Mapping[str, Any]) -> None:
        self.nats, self.tokens = self.nats + float(out.total.detach()), self.tokens + len(out.right)
        kinds: torch.Tensor = batch["kinds"]
        turns = int(out.turn.max()) + 1 if len(out.turn) else 0
        answer = out.row * turns + out.turn
        number = len(kinds) * turns
        asked = torch.zeros(number, dtype=torch.bool, device=answer.device).index_fill(0, answer, True)
        wrong = torch.zeros(number, dtype=torch.bool, device=answer.device).index_fill(0, answer[~out.right], True)
        named = kinds if kinds.shape[-1] else torch.full((len(kinds), turns), UNNAMED, device=answer.device)
        for kind in named.unique().tolist():
            of_kind = asked & (named[:, :turns] == kind).flatten()
            self.total[kind] = self.total.get(kind, 0) + int(of_kind.sum())
            self.right[kind] = self.right.get(kind, 0) + int((of_kind & ~wrong).sum())

    def merge(self, other: AnswerAccuracy) -> None:
        self.nats, self.tokens = self.nats + other.nats, self.tokens + other.tokens
        for kind, number in other.total.items():
            self.total[kind] = self.total.get(kind, 0) + number
            self.right[kind] = self.right.get(kind, 0) + other.right[kind]

    @property
    def value(self) -> float:
        return mean(sum(self.right.values()), sum(self.total.values()), "answer")

    def details(self, data: Splits) -> dict[str, Any]:
        names = getattr(data, "kinds", ())
        by_kind = {
            names[kind] if kind >= 0 else "all": {"accuracy": self.right[kind] / self.total[kind], "answers": self.total[kind]}
            for kind in sorted(self.total)
            if self.total[kind]
        }
        nats = mean(self.nats, self.tokens, "learned token")
        return {"loss": nats, "perplexity": math.exp(min(nats, 700.0)), "answers": by_kind}
