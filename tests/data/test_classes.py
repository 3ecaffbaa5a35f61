"""Classes of any data set: their names, numbers, and those without an example."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import pytest

from laconic.data.images.splits import ImageData, hub_images
from laconic.data.images.transform import ImageTransform
from laconic.data.labels.classes import KnownClasses
from laconic.data.rows import BadRows
from laconic.data.source import DataSource, SplitNames
from tests.data.folders import encoded, image_folder, parquet, picture


def _labelled(folder: Path, labels: list[Any], **options: Any) -> ImageData:
    path = parquet(folder / "rows.parquet", [encoded(0)] * len(labels), labels)
    settings: dict[str, Any] = {"num_labels": None, "max_bad_fraction": 0.0, "known": None} | options
    return hub_images(
        DataSource("parquet", data_files=str(path)), SplitNames(fraction=0.25), transform=ImageTransform(8), seed=0, **settings
    )


def _folder(root: Path, names: list[str]) -> str:
    for code, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for index in range(4):
            picture(10 * code + index, 8).save(root / name / f"{index}.png")
    return str(root)


def _open(folder: str | None, **options: Any) -> ImageData:
    return hub_images(DataSource("imagefolder", data_dir=folder, **options), SplitNames(), None, ImageTransform(8), 0, 0.0)


def test_numbers_that_are_labels_are_classes_as_they_are(tmp_path: Path) -> None:
    data = _labelled(tmp_path, [3, 1000, 7, 7] * 3)
    assert data.classes == ["3", "7", "1000"]
    assert {int(data.train[row]["labels"]) for row in range(len(data.train))} == {0, 1, 2}  # type: ignore[arg-type]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert _labelled(tmp_path, [7_000_000, 3_000_000] * 4).classes == ["3000000", "7000000"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_numbers_up_to_a_given_count_are_classes_although_one_is_missing(tmp_path: Path) -> None:
    data = _labelled(tmp_path, [0, 1, 3, 3] * 4, num_labels=4)
    assert data.classes == ["0", "1", "2", "3"]
    assert [line for line in data.remarks if "train" in line] == ["class 2: 0 rows in train"]


def test_a_class_whose_only_row_is_held_out_is_a_class_without_training_rows(tmp_path: Path) -> None:
    for place in range(8):
        labels = ["a", "b"] * 4
        labels[place] = "only"
        data = _labelled(tmp_path, labels)
        assert data.classes == ["a", "b", "only"]
        assert "class only: 0 rows in train" in data.remarks or "class only: 0 rows in validation" in data.remarks


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a"] * 8, "the data have the class 'a', and a classifier needs 2 or more"),
        ([[1], [2]] * 4, r"column 'label' holds a list, \[1\]: a label is a text or a whole number"),
        ([0.5, 1.5] * 4, "column 'label' holds a number with a fraction, 0.5"),
        ([None] * 8, "the data have no class"),
    ],
)
def test_what_is_no_set_of_classes_is_refused(tmp_path: Path, labels: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _labelled(tmp_path, labels)


def test_whole_numbers_read_as_floats_and_truth_values_are_classes(tmp_path: Path) -> None:
    assert _labelled(tmp_path, [1.0, 0.0, None, 1.0] * 4, max_bad_fraction=0.5).classes == ["0", "1"]
    assert _labelled(tmp_path, [True, False] * 4).classes == ["False", "True"]


def test_another_number_of_named_classes_is_refused_and_bad_labels_stop_before_training(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"data.num_labels = 5, and the data have the classes 'a', 'b': remove data.num_labels, or set it to 2"
    ):
        _labelled(tmp_path, ["a", "b"] * 4, num_labels=5)
    with pytest.raises(BadRows, match="missing label"):
        _labelled(tmp_path, ["a", "b", None, "b"] * 4)


def test_labels_are_mapped_by_name_onto_the_classes_of_a_model(tmp_path: Path) -> None:
    known = KnownClasses(("dog", "cat", "owl"), "the run", "")
    data = _labelled(tmp_path, ["cat", "dog"] * 4, known=known)
    assert data.classes == ["dog", "cat", "owl"]
    assert data.counts["train"][2] == 0
    assert "class owl: 0 rows in train" in data.remarks
    with pytest.raises(
        ValueError, match=r"the data have the class 'fox', and the run has the classes 'dog', 'cat', 'owl': labels are compared by name"
    ):
        _labelled(tmp_path, ["cat", "fox"] * 4, known=known)
    # Weights whose head may be replaced: other classes are numbered by themselves, the same ones by the model's order.
    open_to_all = KnownClasses(("dog", "cat"), "hub", None)
    assert _labelled(tmp_path, ["cat", "fox"] * 4, known=open_to_all).classes == ["cat", "fox"]
    assert _labelled(tmp_path, ["cat", "dog"] * 4, known=open_to_all).classes == ["dog", "cat"]


@pytest.mark.parametrize("name", ["freight train", "test_tubes", "validation", "dev-board"])
def test_a_class_folder_that_is_taken_for_a_split_is_refused_and_the_cure_loads_all(tmp_path: Path, name: str) -> None:
    folder = _folder(tmp_path / "images", ["cat", "dog", name])
    with pytest.raises(
        ValueError, match=r"8 of 12 images below .* were not loaded, those in cat, dog: .*data.data_files=\{train: '.*/\*\*'\}"
    ):
        _open(folder)
    data = _open(None, data_files={"train": f"{folder}/**"})
    assert data.classes == sorted(["cat", "dog", name])


def test_linked_folders_and_unread_files_are_refused(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "images", ["cat", "dog"])
    os.symlink(_folder(tmp_path / "elsewhere", ["owl"]) + "/owl", f"{folder}/owl")
    with pytest.raises(ValueError, match=r"4 of 12 images .*those in owl: datasets does not follow links to folders"):
        _open(folder)
    other = _folder(tmp_path / "other", ["cat", "dog"])
    Path(other, "cat", "4.heic").write_bytes(b"image")
    with pytest.raises(ValueError, match=r"datasets loads no files that end in .heic"):
        _open(other)


def test_an_empty_class_folder_is_mentioned_and_splits_in_folders_are_read(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "images", ["cat", "dog"])
    Path(folder, "owl").mkdir()
    assert _open(folder).remarks[0] == "class owl: 0 rows, its folder is empty"
    for split in ("train", "test"):
        image_folder(tmp_path / "splits" / split, classes=2, each=4)
    data = hub_images(
        DataSource("imagefolder", data_dir=str(tmp_path / "splits")), SplitNames(test="test"), None, ImageTransform(8), 0, 0.0
    )
    assert (data.has_test, len(data.test)) == (True, 8)  # type: ignore[arg-type]
    assert data.counts["test"] == (4, 4)


def test_splits_with_other_columns_and_columns_of_other_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    one = parquet(tmp_path / "rows.parquet", [encoded(0)] * 8, [0, 1] * 4)
    other = parquet(tmp_path / "b" / "rows.parquet", [encoded(0)] * 8, [0, 1] * 4, "photo", "kind")
    files = {"train": str(one), "validation": str(other)}
    with pytest.raises(ValueError, match=r"data.name = 'parquet' cannot be opened .*column"):
        hub_images(DataSource("parquet", data_files=files), SplitNames(validation="validation"), None, ImageTransform(8), 0, 0.0)
    with pytest.raises(ValueError, match=r"column 'label' holds .*, not images .*set data.image_column"):
        hub_images(DataSource("parquet", data_files=str(one), image_column="label"), SplitNames(), None, ImageTransform(8), 0, 0.0)
