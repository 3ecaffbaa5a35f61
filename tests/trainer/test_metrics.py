"""Metrics count whole numbers with torchmetrics and divide them exactly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from laconic import CompressionConfig, StageConfig, Trace, compress
from laconic.trainer.metrics.accuracy import Accuracy
from laconic.trainer.metrics.kept_places import KeptPlaces, kept_cells
from laconic.trainer.metrics.mean_iou import MeanIoU
from laconic.trainer.metrics.perplexity import Perplexity
from laconic.trainer.metrics.quality import NothingCounted, Quality
from laconic.trainer.metrics.reconstruction import Reconstruction
from laconic.trainer.show.pictures import visual_overlays
from tests.matrix import image_text
from tests.matrix.image_text import PLACEHOLDER

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


@pytest.mark.parametrize("metric", [Accuracy, MeanIoU, Perplexity, Reconstruction])
def test_a_metric_over_nothing_has_no_value(metric: type[Quality]) -> None:
    with pytest.raises(NothingCounted, match="so the metric has no value"):
        assert metric().value


def test_a_metric_names_the_classes_that_no_label_has() -> None:
    data: Any = SimpleNamespace(classes=["cat", "dog", "owl"])
    logits, labels = torch.eye(3)[[0, 2, 2]], torch.tensor([0, 2, 2])
    accuracy, iou = Accuracy(), MeanIoU()
    accuracy.add(SimpleNamespace(logits=logits), {"labels": labels})
    iou.add(SimpleNamespace(logits=logits.T[None, :, :, None]), {"labels": labels[None, :, None]})
    assert accuracy.remarks(data) == ["accuracy says nothing of the class 'dog', of 3 in all: no label has it"]
    assert iou.remarks(data) == ["mean_iou says nothing of the class 'dog', of 3 in all: no label has it"]
    assert accuracy.details(data) == {"labels": {"cat": 1, "dog": 0, "owl": 2}}
    assert (iou.value, iou.per_class) == (1.0, [1.0, None, 1.0])
    ranks = Accuracy()
    ranks.merge(accuracy)
    ranks.merge(accuracy)
    assert ranks.labels == {0: 2, 2: 4}


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


def test_position_bias_is_zero_for_an_even_choice_and_names_the_band_that_is_preferred() -> None:
    top = torch.zeros(8, 8, dtype=torch.bool)
    top[:2] = True
    even = torch.zeros(8, 8, dtype=torch.bool)
    even[::2, ::2] = True
    one, other, both = KeptPlaces(), KeptPlaces(), KeptPlaces()
    one.add({"a": [top], "b": [even, even]})
    # A grid of another size: 3 lines lie in bands 0, 2 and 3.
    other.add({"a": [torch.tensor([[True], [False], [False]])]})
    for part in (one, other):
        both.merge(part)
    assert one.bias["a"] == {"rows": 0.75, "columns": 0.0, "by_row": [1.0, 0.0, 0.0, 0.0], "by_column": [0.25] * 4}
    assert one.bias["b"] == {"rows": 0.0, "columns": 0.0, "by_row": [0.25] * 4, "by_column": [0.25] * 4}
    assert both.present["a"][0].tolist() == [17, 16, 17, 17]
    assert both.bias["a"]["rows"] == pytest.approx(1 - 17 / 67)
    assert KeptPlaces().bias == {}


def test_patches_of_pictures_of_any_size_are_shown_where_they_are() -> None:
    draws = torch.Generator().manual_seed(0)
    given = {"pixel_values": torch.randn(24 + 16, 96, generator=draws), "image_grid_thw": torch.tensor([[1, 4, 6], [1, 8, 2]])}
    ids = torch.tensor([[2, *[PLACEHOLDER] * 6, 3, *[PLACEHOLDER] * 4, 4]])
    given |= {"input_ids": ids, "mm_token_type_ids": (ids == PLACEHOLDER).int()}
    model, stacks = image_text.dense("qwen2_5_vl"), {"vision.before_1": "vision", "projector.before_0": "projector"}
    stages = [StageConfig(layer=int(name[-1]), stack=stack, scorer="random", keep=0.7) for name, stack in stacks.items()]
    model = compress(model, CompressionConfig(stages))
    model(**given, trace=(trace := Trace()))
    tiles = model.adapter.pictures(model.config, given)
    cells = kept_cells(trace, stacks, tiles)
    marked = model.adapter.encoded_images(model, given)["image"].pooler_output
    for number, (tile, features) in enumerate(zip(tiles, marked, strict=True)):
        here = (~features.isnan().all(-1)).view(tile.rows, tile.columns).repeat_interleave(2, 0).repeat_interleave(2, 1)
        assert torch.equal(cells["projector.before_0"][number], here)
        seen = cells["vision.before_1"][number]
        assert seen.shape == here.shape
        assert bool((seen >= here).all())
        assert int(seen.sum()) == 4 * round(0.7 * tile.rows * tile.columns)
    shown = visual_overlays(trace, stacks, tiles)["vision.before_1"]
    assert [picture.shape for picture in shown] == [(16, 24, 3), (32, 8, 3)]
