"""Data with a class for each pixel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from laconic.data.embedded.canvas import Canvas
from laconic.data.embedded.scattered_digits import BACKGROUND, ScatteredDigits, source_digits
from laconic.data.images.masks import MaskRows, hub_masks
from laconic.data.images.transform import ImageTransform
from laconic.data.rows import BadRow
from laconic.data.source import DataSource, SplitNames


@pytest.mark.parametrize("canvas", [Canvas(), Canvas(size=24, scrambled=2, pieces=3)])
def test_pixels_of_the_real_digit_have_its_class_and_all_others_are_background(canvas: Canvas) -> None:
    indices = [7, 3, 50, 120]
    plain = ScatteredDigits("test", 100, canvas).__getitems__(indices)
    known = {image.tobytes(): int(label) for image, label in zip(*source_digits("test"), strict=True)}
    for item, whole in zip(ScatteredDigits("test", 100, canvas, pixel_labels=True).__getitems__(indices), plain, strict=True):
        assert torch.equal(item["pixel_values"], whole["pixel_values"])
        digit = item["labels"] != BACKGROUND
        assert int(digit.sum()) == 64
        # Those pixels are a digit of the source, of that class, pixel for pixel.
        assert known[np.ascontiguousarray(item["pixel_values"][0][digit].numpy()).tobytes()] == int(whole["labels"])
        assert set(item["labels"][digit].tolist()) == {int(whole["labels"])}


def test_the_mask_is_cut_and_turned_with_its_image() -> None:
    values = np.random.default_rng(0).integers(0, 250, (20, 30), np.uint8)
    image = Image.fromarray(values)
    for augmentation in ("none", "flip", "crop_flip"):
        transform = ImageTransform(20, 1, (0.0,), (1.0,), augmentation)
        seen = set()
        for seed in range(8):
            pixels, numbers = transform.with_mask(image, image, np.random.default_rng(seed))
            assert torch.equal((pixels[0] * 255).round().long(), numbers)
            assert torch.equal(pixels, transform(image, np.random.default_rng(seed)))
            seen.add(numbers.numpy().tobytes())
        assert len(seen) in {"none": (1,), "flip": (2,), "crop_flip": range(3, 9)}[augmentation]
    # Scaled to the nearest: no number between two classes comes up.
    halves = Image.fromarray(np.repeat([[3, 9]], [15, 15], axis=1).repeat(20, 0).astype(np.uint8))
    _, numbers = ImageTransform(16, 1, augmentation="resized_crop_flip").with_mask(halves, halves, np.random.default_rng(1))
    assert set(numbers.unique().tolist()) <= {3, 9}


def test_an_imagefolder_with_a_file_name_for_each_mask_gives_pairs(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    folder.mkdir()
    lines = []
    for code in range(4):
        Image.new("RGB", (10, 8), (code, code, code)).save(folder / f"{code}.png")
        Image.new("L", (10, 8), code).save(folder / f"{code}_mask.png")
        lines.append(json.dumps({"file_name": f"{code}.png", "mask_file_name": f"{code}_mask.png"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    transform = ImageTransform(8, 3, (0.0,) * 3, (1 / 255,) * 3)
    data = hub_masks(DataSource("imagefolder", data_dir=str(tmp_path)), SplitNames(fraction=0.25), 4, 255, transform, 0)
    assert (len(data.train), len(data.validation), data.has_test, data.classes) == (3, 1, False, ["0", "1", "2", "3"])  # type: ignore[arg-type]
    for row in (*(data.train[index] for index in range(3)), data.validation[0]):
        assert torch.equal(row["pixel_values"][0].round().long(), row["labels"])


def test_bad_masks_are_counted_by_reason_and_ignored_pixels_are_marked() -> None:
    image = Image.new("L", (8, 8))
    labelled = np.zeros((8, 8), np.uint8)
    labelled[0, 0], labelled[7, 7] = 2, 7
    masks: list[Any] = [Image.fromarray(labelled), Image.new("RGB", (8, 8)), Image.new("L", (4, 8)), Image.new("L", (8, 8), 3), None]
    rows = [{"image": image, "mask": mask} for mask in masks]
    data = MaskRows(rows, ("image", "mask"), 3, 7, ImageTransform(8, 1), None)
    assert (int(data[0]["labels"][0, 0]), int(data[0]["labels"][7, 7]), int(data[0]["labels"][3, 3])) == (2, 255, 0)
    assert data[0]["predicted"] == 63
    assert [data[index]["bad"] for index in range(1, 5)] == [
        BadRow(1, "mask of mode RGB, which has more than one number a pixel"),
        BadRow(2, "mask and image differ in size"),
        BadRow(3, "mask value above 2 that is not data.ignore_index"),
        BadRow(4, "undecodable mask (ValueError)"),
    ]


def _hub_masks(folder: Path, masks: list[np.ndarray], classes: int, ignore: int = 255) -> Any:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    rows = {"image": [Image.new("L", (8, 8))] * len(masks), "mask": [Image.fromarray(mask) for mask in masks]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "rows.parquet")
    source = DataSource("parquet", data_files=str(folder / "rows.parquet"))
    return hub_masks(source, SplitNames(fraction=0.25), classes, ignore, ImageTransform(8, 1, (0.5,), (0.5,)), 0)


def test_masks_of_16_bits_keep_their_numbers(tmp_path: Path) -> None:
    mask = (np.arange(64) % 4).reshape(8, 8).astype(np.uint16)
    data = _hub_masks(tmp_path, [mask] * 8, 4)
    assert set(data.train[0]["labels"].unique().tolist()) == {0, 1, 2, 3}
    assert data.remarks == []


def test_masks_of_0_and_255_are_refused_where_255_means_no_class(tmp_path: Path) -> None:
    mask = np.where(np.arange(64) < 16, 255, 0).reshape(8, 8).astype(np.uint8)
    with pytest.raises(
        ValueError, match=r"all 6 training masks have one class, 0, and 25% of the pixels are 255, which is data.ignore_index"
    ):
        _hub_masks(tmp_path, [mask] * 8, 2)


def test_a_class_without_a_pixel_is_mentioned_and_an_empty_mask_is_a_bad_row(tmp_path: Path) -> None:
    halves = np.repeat([[0, 2]], [4, 4], axis=1).repeat(8, 0).astype(np.uint8)
    data = _hub_masks(tmp_path, [halves] * 8, 3)
    assert data.remarks == ["class 1: 0 pixels in 6 of 6 training masks"]
    empty = MaskRows(
        [{"image": Image.new("L", (8, 8)), "mask": Image.new("L", (8, 8), 255)}], ("image", "mask"), 3, 255, ImageTransform(8, 1), None
    )
    assert empty[0]["bad"].reason == "mask in which every pixel is data.ignore_index"


def test_masks_are_looked_through_until_a_second_class_is_found(tmp_path: Path) -> None:
    masks = [np.zeros((8, 8), np.uint8)] * 79
    masks.insert(40, np.eye(8, dtype=np.uint8))
    assert _hub_masks(tmp_path, masks, 2).remarks == []
