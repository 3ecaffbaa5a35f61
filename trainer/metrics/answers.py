"""Accuracy of the answers of chats."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...data.splits import Splits
from ...modules.tokens.labels import IGNORE_TOKEN
from ..losses.answer_loss import AnswerLoss
from .predictions import Predictions
from .quality import Answered, Quality, mean

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
        answers: row, turn, number of the kind, whether it is right, and the model's own tokens of each answer.
    """

    nats: float = 0.0
    tokens: int = 0
    right: dict[int, int] = field(default_factory=dict)
    total: dict[int, int] = field(default_factory=dict)
    answers: list[tuple[int, int, int, bool, tuple[int, ...]]] = field(default_factory=list)

    def add(self, out: AnswerLoss, batch: Mapping[str, Any]) -> None:
        self.nats, self.tokens = self.nats + float(out.total.detach()), self.tokens + len(out.right)
        kinds: torch.Tensor = batch["kinds"]
        turns = int(out.turn.max()) + 1 if len(out.turn) else 0
        answer = out.row * turns + out.turn
        number = len(kinds) * turns
        asked = torch.zeros(number, dtype=torch.bool, device=answer.device).index_fill(0, answer, True)
        wrong = torch.zeros(number, dtype=torch.bool, device=answer.device).index_fill(0, answer[~out.right], True)
        named = kinds if kinds.shape[-1] else torch.full((len(kinds), turns), UNNAMED, device=answer.device)
        self._note(out, batch, named)
        for kind in named.unique().tolist():
            of_kind = asked & (named[:, :turns] == kind).flatten()
            self.total[kind] = self.total.get(kind, 0) + int(of_kind.sum())
            self.right[kind] = self.right.get(kind, 0) + int((of_kind & ~wrong).sum())

    def _note(self, out: AnswerLoss, batch: Mapping[str, Any], named: torch.Tensor) -> None:
        """Notes the answers of a batch one by one; the learned tokens are in the order of rows and turns."""
        rows = batch["sample_ids"].tolist()
        found: dict[tuple[int, int], tuple[bool, list[int]]] = {}
        for row, turn, right, token in zip(*(part.tolist() for part in (out.row, out.turn, out.right, out.logits.argmax(-1))), strict=True):
            good, tokens = found.get((row, turn), (True, []))
            found[row, turn] = good and right, [*tokens, token]
        kinds = named.tolist()
        self.answers += [(rows[row], turn, kinds[row][turn], good, tuple(tokens)) for (row, turn), (good, tokens) in found.items()]

    def merge(self, other: AnswerAccuracy) -> None:
        self.answers += other.answers
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

    def answered(self, data: Splits) -> list[Answered]:
        # Chats about images, or prompts.
        of: Any = data
        asked = {row: of.test.asked(row) for row in {answer[0] for answer in self.answers}}
        return sorted(
            Answered(row, turn, of.kinds[kind] if kind >= 0 else "", right, tokens, *asked[row][turn])
            for row, turn, kind, right, tokens in self.answers
        )


def predictions(out: AnswerLoss, labels: torch.Tensor) -> Predictions:
    """The predictions of a batch of chats or prompts, an answer being a sample; learned tokens of no answer are left out.

    Args:
        out: loss of the batch.
        labels: (B, N) int64, each token's own id, IGNORE_TOKEN where it is not learned.
    """
    following, of = labels[:, 1:], out.turn >= 0
    expected = following[following != IGNORE_TOKEN]
    return Predictions.of(out.logits[of], expected[of], (out.row * (out.turn.max() + 1) + out.turn)[of] if len(out.turn) else None)
