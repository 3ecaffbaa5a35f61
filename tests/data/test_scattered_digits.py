"""The embedded data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from laconic.data.embedded.canvas import Canvas
from laconic.data.embedded.scattered_digits import ScatteredDigits, source_digits


def test_splits_share_no_source_digit() -> None:
    splits = [{image.tobytes() for image in source_digits(split)[0]} for split in ("train", "validation", "test")]
    counts = [len(source_digits(split)[0]) for split in ("train", "validation", "test")]
    assert sum(counts) == 1797
    assert not splits[0] & splits[1]
    assert not splits[0] & splits[2]
    assert not splits[1] & splits[2]


def test_an_image_depends_only_on_seed_split_and_index() -> None:
    data = ScatteredDigits("train", 100, seed=3)
    batch = data.__getitems__([7, 3, 50])
    assert torch.equal(batch[1]["pixel_values"], data[3]["pixel_values"])
    assert not torch.equal(data[3]["pixel_values"], ScatteredDigits("train", 100, seed=4)[3]["pixel_values"])
    assert not torch.equal(data[3]["pixel_values"], ScatteredDigits("validation", 100, seed=3)[3]["pixel_values"])
    assert [int(item["sample_ids"]) for item in batch] == [7, 3, 50]


def test_the_labelled_digit_is_where_the_item_says() -> None:
    images, labels = source_digits("test")
    known = {image.tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    for item in ScatteredDigits("test", 50).__getitems__(list(range(50))):
        top, left = item["place"].tolist()
        cut = np.ascontiguousarray(item["pixel_values"][0, top : top + 8, left : left + 8].numpy())
        assert known[cut.tobytes()] == int(item["labels"])


def test_brightness_does_not_give_the_digit_away() -> None:
    items = ScatteredDigits("train", 400).__getitems__(list(range(400)))
    inside, outside = [], []
    for item in items:
        patches = item["pixel_values"][0].unfold(0, 4, 4).unfold(1, 4, 4).mean((2, 3))
        row, column = (item["place"] // 4).tolist()
        mask = torch.zeros(8, 8, dtype=torch.bool)
        mask[row : row + 2, column : column + 2] = True
        inside += patches[mask].tolist()
        outside += patches[~mask & (patches > 0)].tolist()
    assert np.mean(inside) == pytest.approx(np.mean(outside), rel=0.05)
    assert np.std(inside) >= np.std(outside) * 0.9


def test_objects_do_not_overlap_and_most_patches_hold_no_digit() -> None:
    canvas = Canvas(scrambled=4, pieces=3)
    for item in ScatteredDigits("train", 20, canvas).__getitems__(list(range(20))):
        filled = item["pixel_values"][0].unfold(0, 4, 4).unfold(1, 4, 4).amax((2, 3)) > 0
        assert int(filled.sum()) <= 4 + 4 * 4 + 3


def test_a_digit_may_stand_alone() -> None:
    for item in ScatteredDigits("train", 4, Canvas(scrambled=0, pieces=0)).__getitems__([0, 1, 2, 3]):
        top, left = item["place"].tolist()
        assert item["pixel_values"].sum() == item["pixel_values"][0, top : top + 8, left : left + 8].sum() > 0


@pytest.mark.parametrize(
    ("settings", "message"), [({"size": 30}, "multiple of 4"), ({"scrambled": 20}, "do not fit"), ({"pieces": -1}, "at least 0")]
)
def test_a_canvas_that_cannot_be_is_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Canvas(**settings)
