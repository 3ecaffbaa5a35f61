"""Metrics count whole numbers with torchmetrics and divide them exactly."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from laconic.data.rows import BadRows
from laconic.trainer.metrics.accuracy import Accuracy
from laconic.trainer.metrics.mean_iou import MeanIoU
from laconic.trainer.metrics.perplexity import Perplexity
from laconic.trainer.metrics.quality import Quality
from laconic.trainer.metrics.reconstruction import Reconstruction

CLASSES = 5


def test_accuracy_is_that_of_torchmetrics_over_all_batches_and_ranks_and_divided_exactly() -> None:
    ranks, reference = [Accuracy(), Accuracy()], MulticlassAccuracy(CLASSES, average="micro")
    generator, right = torch.Generator().manual_seed(0), 0
    # Batches of different sizes: their accuracies must not be averaged.
    for number, rows in enumerate((7, 1, 4, 18)):
        logits, labels = torch.randn(rows, CLASSES, generator=generator), torch.randint(CLASSES, (rows,), generator=generator)
        ranks[number % 2].add(SimpleNamespace(logits=logits), {"labels": labels})
        reference.update(logits, labels)
        right += sum(int(row.argmax()) == label for row, label in zip(logits, labels.tolist(), strict=True))
    ranks[0].merge(ranks[1])
    assert ranks[0].value == right / 30
    assert ranks[0].value == pytest.approx(float(reference.compute()), rel=1e-6)


@pytest.mark.parametrize("quality", [Accuracy, Perplexity, Reconstruction])
def test_a_mean_over_nothing_is_refused(quality: type[Quality]) -> None:
    with pytest.raises(BadRows, match="were counted, so there is no metric: check the rows of data.validation_split"):
        _ = quality().value


def test_mean_iou_is_that_of_torchmetrics_over_all_images() -> None:
    quality, reference = MeanIoU(), MulticlassJaccardIndex(CLASSES, ignore_index=255)
    generator = torch.Generator().manual_seed(0)
    for rows in (2, 1):
        logits, labels = (
            torch.randn(rows, CLASSES, 6, 6, generator=generator),
            torch.randint(CLASSES - 1, (rows, 6, 6), generator=generator),
        )
        # The last class is in no label and in no answer, and some pixels have no class.
        logits[:, -1] = -torch.inf
        labels[:, 0] = 255
        quality.add(SimpleNamespace(logits=logits), {"labels": labels})
        reference.update(logits, labels)
    assert quality.per_class[-1] is None
    assert quality.value == pytest.approx(float(reference.compute()), rel=1e-6)
