"""What a model predicts, sample by sample: how often it agrees with another one, and what it gets right of hard and of easy samples."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

# Predictions of one model that are compared; further ones of large data would not change a figure.
LIMIT = 2**20


@dataclass(frozen=True)
class Predictions:
    """Predictions of places with a label, in the order of the data.

    Attributes:
        predicted: (P,) int32 most likely class or token.
        right: (P,) bool, it is the label.
        margin: (P,) float32 logit of the label less the largest other one; above 0 where the prediction is right.
        sample: (P,) int32 sample of each place, growing from 0. An image or text with one label, a pixel, or a token of a text is a sample by
            itself; the tokens of an answer are one sample.
    """

    predicted: Tensor
    right: Tensor
    margin: Tensor
    sample: Tensor

    @staticmethod
    def of(logits: Tensor, labels: Tensor, sample: Tensor | None = None) -> Predictions:
        """
        Args:
            logits: (P, classes) of any float type.
            labels: (P,) int64.
            sample: (P,) int64 number of each place's sample, in any numbering that does not fall; None if each place is one.
        """
        logits, each = logits.float(), torch.arange(len(labels), device=labels.device)
        best = logits.topk(2, -1)
        right = best.indices[:, 0] == labels
        other = torch.where(right, best.values[:, 1], best.values[:, 0])
        margin = logits.gather(1, labels[:, None])[:, 0] - other
        counted = each if sample is None else sample.unique_consecutive(return_inverse=True)[1]
        return Predictions(best.indices[:, 0].int().cpu(), right.cpu(), margin.cpu(), counted.int().cpu())

    def samples_where(self, places: Tensor) -> Tensor:
        """(S,) bool: samples all of whose places are among the given ones, (P,) bool."""
        number = int(self.sample[-1]) + 1 if len(self.sample) else 0
        return torch.ones(number, dtype=torch.bool).index_fill_(0, self.sample[~places].long(), False)

    @property
    def right_samples(self) -> Tensor:
        """(S,) bool: every place of the sample is right."""
        return self.samples_where(self.right)

    @property
    def margins(self) -> Tensor:
        """(S,) float32: the smallest margin of each sample's places."""
        found = torch.full((len(self.right_samples),), torch.inf)
        return found.scatter_reduce_(0, self.sample.long(), self.margin, "amin")

    def comparable(self, other: Predictions) -> bool:
        """True if both are of the same samples."""
        return torch.equal(self.sample, other.sample)


@dataclass
class PredictionLog:
    """The predictions of several batches.

    Attributes:
        parts: predictions of each batch, samples counted from 0 in each.
        limit: number of predictions after which no further batch is taken.
        cut: batches were left out.
    """

    parts: list[Predictions] = field(default_factory=list)
    limit: int = LIMIT
    cut: bool = False
    _number: int = 0

    def add(self, found: Predictions | None) -> None:
        """Adds the predictions of a batch; None for a task whose outputs are none."""
        if found is None:
            return
        self.cut = self.cut or self._number >= self.limit
        if not self.cut:
            self.parts.append(found)
            self._number += len(found.predicted)

    @property
    def whole(self) -> Predictions | None:
        """All of them; None if there are none."""
        parts, first = [part for part in self.parts if len(part.sample)], 0
        if not parts:
            return None
        samples = []
        for part in parts:
            samples.append(part.sample + first)
            first += int(part.sample[-1]) + 1
        joined = (torch.cat([getattr(part, name) for part in parts]) for name in ("predicted", "right", "margin"))
        return Predictions(*joined, torch.cat(samples))


@dataclass(frozen=True)
class Groups:
    """The samples that a reference gets right, in two groups.

    Attributes:
        hard: (S,) bool.
        easy: (S,) bool.
        by: what tells them apart: ``downsampled`` or ``margin``.
    """

    hard: Tensor
    easy: Tensor
    by: str

    @staticmethod
    def of(reference: Predictions, smaller: Predictions | None) -> Groups:
        """Hard samples are those that a smaller input loses (VTC, arXiv 2510.07143).

        Args:
            reference: predictions of the dense model.
            smaller: predictions of the same weights with a smaller input; None without one: then the half of the samples with the smaller
                margins is the hard one.
        """
        right = reference.right_samples
        if smaller is not None:
            kept = smaller.right_samples
            return Groups(right & ~kept, right & kept, "downsampled")
        margins = reference.margins
        middle = margins[right].median() if bool(right.any()) else torch.tensor(0.0)
        return Groups(right & (margins <= middle), right & (margins > middle), "margin")


@dataclass(frozen=True)
class Agreement:
    """A model beside the reference.

    Attributes:
        agreement: share of the samples with the same prediction, right or wrong.
        hard: share of the hard samples that the model gets right; None if there are none.
        easy: likewise of the easy ones.
    """

    agreement: float
    hard: float | None
    easy: float | None

    @staticmethod
    def of(found: Predictions, reference: Predictions, groups: Groups) -> Agreement:
        """
        Args:
            found: predictions of the model.
            reference: predictions of the dense model, of the same samples.
            groups: its hard and easy samples.
        """
        same, right = found.samples_where(found.predicted == reference.predicted), found.right_samples
        return Agreement(float(same.double().mean()), _share(right, groups.hard), _share(right, groups.easy))


def _share(right: Tensor, group: Tensor) -> float | None:
    return float(right[group].double().mean()) if bool(group.any()) else None
