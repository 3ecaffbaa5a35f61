"""Images through Hugging Face datasets: columns, labels, bad rows, transforms, order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from laconic.data.images.splits import ImageData, hub_images
from laconic.data.images.transform import ImageTransform
from laconic.data.loader import ResumableLoader, StepBatches
from laconic.data.rows import BadRow, BadRowCount, BadRows, collate
from laconic.data.source import DataSource, SplitNames
from tests.data.folders import encoded, image_folder, parquet, picture

TRANSFORM = ImageTransform(size=16)


def _open(source: DataSource, num_labels: int | None = None, **names: Any) -> ImageData:
    return hub_images(source, SplitNames(**{"fraction": 0.25, **names}), num_labels, TRANSFORM, 0, 1.0)


def test_an_image_folder_gives_its_classes_and_holds_rows_out(tmp_path: Path) -> None:
    data = _open(DataSource("imagefolder", data_dir=str(image_folder(tmp_path / "images"))))
    assert data.classes == ["class_0", "class_1", "class_2"]
    assert (len(data.train), len(data.validation)) == (18, 6)  # type: ignore[arg-type]
    assert data.train[0]["pixel_values"].shape == (3, 16, 16)
    assert not data.has_test


def test_parquet_with_named_columns(tmp_path: Path) -> None:
    path = parquet(tmp_path / "rows.parquet", [encoded(i) for i in range(8)], [f"kind {i % 2}" for i in range(8)], "photo", "kind")
    data = _open(DataSource("parquet", data_files=str(path), image_column="photo", label_column="kind"))
    assert data.classes == ["kind 0", "kind 1"]
    assert {int(data.train[i]["labels"]) for i in range(len(data.train))} == {0, 1}  # type: ignore[arg-type]


def test_a_missing_column_split_or_source_is_named(tmp_path: Path) -> None:
    path = str(parquet(tmp_path / "rows.parquet", [encoded(i) for i in range(8)], list(range(8))))
    with pytest.raises(
        ValueError, match=r"data.label_column = 'labl' is missing from the data: its columns are img, label; did you mean 'label'"
    ):
        _open(DataSource("parquet", data_files=path, label_column="labl"))
    with pytest.raises(ValueError, match=r"data.test_split = 'tst' does not exist: the splits are train"):
        _open(DataSource("parquet", data_files=path), test="tst")
    with pytest.raises(ValueError, match=r"data.name = 'parquet' cannot be opened"):
        _open(DataSource("parquet", data_files=str(tmp_path / "none.parquet")))


def test_bad_rows_are_named_by_reason_and_not_skipped_silently(tmp_path: Path) -> None:
    good = [encoded(i) for i in range(12)]
    images = [*good[:8], b"no image", encoded(9)[:40], *good[10:]]
    labels: list[Any] = [i % 3 for i in range(12)]
    labels[2], labels[3] = None, 9
    path = str(parquet(tmp_path / "rows.parquet", images, labels))
    data = _open(DataSource("parquet", data_files=path), num_labels=3, fraction=0.01)
    batch = collate([data.train[i] for i in range(len(data.train))] + [data.validation[0]])  # type: ignore[arg-type]
    reasons = sorted(row.reason.split(" (")[0] for row in batch["bad"])
    assert reasons == ["label out of range 0 … 2", "missing label", "undecodable image", "undecodable image"]
    assert batch["rows"] == 12
    assert len(batch["labels"]) == 8


def test_one_early_bad_row_is_no_high_share_of_a_large_split() -> None:
    count = BadRowCount(0.01, expected=1000)
    count.add(10, [BadRow(4, "missing label")])


def test_the_run_stops_past_the_allowed_fraction_of_bad_rows() -> None:
    strict, lenient = BadRowCount(0.0), BadRowCount(0.1)
    strict.add(10, [])
    with pytest.raises(
        BadRows, match=r"1 of 20 rows: 1 × missing label \(first at row 4\); fix them, or allow a share with data.max_bad_fraction"
    ):
        strict.add(10, [BadRow(4, "missing label")])
    lenient.add(10, [BadRow(4, "missing label")])
    with pytest.raises(BadRows, match="3 of 20 rows: 2 × missing label .* 1 × undecodable image"):
        lenient.add(10, [BadRow(5, "missing label"), BadRow(6, "undecodable image")])


@pytest.mark.parametrize("augmentation", ["none", "flip", "crop_flip", "resized_crop_flip"])
def test_augmentation_is_drawn_by_the_row_and_left_out_in_evaluation(augmentation: str) -> None:
    transform, image = ImageTransform(16, augmentation=augmentation), picture(0, 40)
    first, again, other = (transform(image, np.random.default_rng(seed)) for seed in (1, 1, 2))
    plain = transform(image, None)
    assert first.shape == (3, 16, 16)
    assert torch.equal(first, again)
    assert torch.equal(plain, ImageTransform(16)(image, None))
    if augmentation in ("crop_flip", "resized_crop_flip"):
        assert not torch.equal(first, other)
    assert -1.001 <= float(plain.min()) <= float(plain.max()) <= 1.001


def test_every_epoch_is_a_permutation_shared_out_over_processes() -> None:
    batches = [list(StepBatches(10, 2, 10, seed=1, rank=rank, world_size=2)) for rank in (0, 1)]
    first = [index for step in range(2) for rank in (0, 1) for index in batches[rank][step]]
    second = [index for step in range(2, 4) for rank in (0, 1) for index in batches[rank][step]]
    assert len(set(first)) == 8
    assert max(first) < 10
    assert min(second) >= 10
    assert [index % 10 for index in second] != first


def test_a_loader_goes_on_where_its_state_was_taken() -> None:
    def loader() -> ResumableLoader:
        items: Any = list(range(50))
        return ResumableLoader(items, StepBatches(10, 2, 8, seed=0), collate_fn=lambda rows: {"rows": rows, "terms": len(rows)})

    whole = list(loader())
    one = loader()
    steps = iter(one)
    taken = [next(steps) for _ in range(3)]
    rest = loader()
    rest.load_state_dict(one.state_dict())
    assert taken + list(rest) == whole
    other = ResumableLoader(list(range(50)), StepBatches(10, 5, 8, seed=0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="trained with batch_size = 2, now it is 5"):
        other.load_state_dict(one.state_dict())
