"""Labelled texts: embedded passages, any data set, batches of similar length, and rows that cannot be trained on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from laconic.data.embedded.python_passages import PACKAGES, PassageRows, library_texts
from laconic.data.labels.classes import KnownClasses
from laconic.data.loader import BucketedBatches, StepBatches
from laconic.data.rows import BadRows, collate
from laconic.data.source import DataSource, SplitNames
from laconic.data.text.labelled import Columns, LabelledText, frame_of, hub_labelled_text
from laconic.data.text.tokenizer import trained_tokenizer

WORDS = ["red green blue", "one two three four five", "north"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return trained_tokenizer(WORDS * 20, 300, framed=True)


def _rows(lengths: int = 64, seed: int = 0) -> PassageRows:
    packages = [np.full(100, label + 10, np.int32) for label in range(3)]
    return PassageRows(packages, np.full(500, 99, np.int32), (1, 2), 40, lengths, seed)


def test_a_row_is_a_passage_of_its_class_somewhere_in_text_of_none() -> None:
    rows, places, found = _rows(), set(), Counter[int]()
    for index in range(40):
        item = rows[index]
        ids = item["input_ids"]
        assert (int(ids[0]), int(ids[-1])) == (1, 2)
        assert len(ids) == rows.lengths[index] == len(item["attention_mask"])
        passage = (ids == item["labels"] + 10).nonzero().flatten()
        assert len(passage) == rows.passage
        assert torch.equal(passage, passage[0] + torch.arange(len(passage)))
        assert int((ids == 99).sum()) == len(ids) - 2 - rows.passage
        places.add(int(passage[0]))
        found[int(item["labels"])] += 1
    assert {int(length) for length in rows.lengths} <= set(range(32, 65))
    assert len(places) > 15
    assert set(found) == {0, 1, 2}
    # The same row in every epoch, and others with another seed.
    assert torch.equal(rows[43]["input_ids"], rows[3]["input_ids"])
    assert not torch.equal(_rows(seed=1).lengths, rows.lengths)


def test_the_splits_of_the_library_share_no_text_and_every_class_is_in_each() -> None:
    texts = {split: library_texts(split) for split in ("train", "validation", "test")}
    pieces = {split: {text for package in (*found.packages, found.around) for text in package} for split, found in texts.items()}
    assert all(len(found.packages) == len(PACKAGES) and all(found.packages) for found in texts.values())
    # Some pieces are alike: licences and imports.
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert len(pieces[one] & pieces[other]) <= 3
    assert len(pieces["train"]) > 5 * len(pieces["test"])


def test_a_library_without_a_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "asyncio").mkdir()
    (tmp_path / "asyncio" / "events.py").write_text("x = 1\n" * 4000)
    with pytest.raises(ValueError, match=r"has no source of email, http.*needs a complete standard library"):
        library_texts("train", tmp_path)


def test_batches_hold_rows_of_similar_length_and_every_row_once_an_epoch() -> None:
    lengths = torch.from_numpy(np.random.default_rng(0).integers(10, 200, 640))
    bucketed = BucketedBatches(lengths, 8, 160, seed=3)
    batches = list(bucketed)
    assert sorted(index for batch in batches[:80] for index in batch) == list(range(640))
    assert sorted(index - 640 for batch in batches[80:] for index in batch) == list(range(640))
    assert [sorted(i % 640 for i in batch) for batch in batches[:80]] != [sorted(i % 640 for i in batch) for batch in batches[80:]]

    def padded(found: list[list[int]]) -> float:
        return sum(int(lengths[torch.tensor(batch) % 640].max()) * len(batch) for batch in found) / (2 * int(lengths.sum()))

    assert padded(batches) < 1.05 < 1.4 < padded(list(StepBatches(640, 8, 160, seed=3)))
    # Long batches do not all come last.
    means = [float(lengths[torch.tensor(batch) % 640].float().mean()) for batch in batches[:80]]
    assert abs(np.corrcoef(means, range(80))[0, 1]) < 0.5
    # Two ranks share what one would see, and a run that goes on repeats nothing.
    ranks = [list(BucketedBatches(lengths, 4, 160, seed=3, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [one + other for one, other in zip(*ranks, strict=True)] == batches
    again = BucketedBatches(lengths, 8, 160, seed=3)
    again.start = 150
    assert list(again) == batches[150:]


def test_a_batch_is_filled_up_to_its_longest_row() -> None:
    rows = _rows()
    batch = collate([rows[index] for index in range(4)])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (4, int(rows.lengths[:4].max()))
    assert torch.equal(batch["attention_mask"].sum(1), rows.lengths[:4])
    assert not bool(batch["input_ids"][batch["attention_mask"] == 0].any())
    assert batch["labels"].shape == (4,)


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> DataSource:
    path.write_text("\n".join(map(json.dumps, rows)))
    return DataSource("json", data_files=str(path))


def _open(source: DataSource, tokenizer: Any, columns: Columns, length: int = 16, bad: float = 0.0) -> LabelledText:
    return hub_labelled_text(source, SplitNames(fraction=0.25), columns, length, lambda texts: tokenizer, bad)


def test_any_data_set_with_texts_and_labels_is_read_cut_and_framed(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"sentence": WORDS[i % 3] * (1 + i % 4), "label": ["a", "b"][i % 2]} for i in range(24)]
    data = _open(_jsonl(tmp_path / "rows.jsonl", rows), tokenizer, Columns())
    assert data.classes == ["a", "b"]
    assert (len(data.train), len(data.validation), data.has_test, data.length) == (18, 6, False, 16)  # type: ignore[arg-type]
    frame = frame_of(tokenizer)
    for index in range(18):
        item = data.train[index]
        assert (int(item["input_ids"][0]), int(item["input_ids"][-1])) == frame
        assert len(item["input_ids"]) <= 16
    lengths = data.validation.lengths  # type: ignore[attr-defined]
    assert lengths.tolist() == sorted(lengths.tolist())


def test_pairs_have_segments_and_share_the_length(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": WORDS[0] * 5, "other": WORDS[1] * 5, "label": i % 3} for i in range(8)]
    data = _open(_jsonl(tmp_path / "rows.jsonl", rows), tokenizer, Columns(second="other"), length=20)
    item = data.train[0]
    segments, ids = item["token_type_ids"].tolist(), item["input_ids"].tolist()
    assert len(ids) == 20
    assert segments == sorted(segments)
    assert 5 < sum(segments) < 15
    assert ids.count(frame_of(tokenizer)[1]) == 2
    assert data.classes == ["0", "1", "2"]


BAD = [
    ({"text": None, "label": 0}, "missing text"),
    ({"text": "  ", "label": 0}, "empty text"),
    ({"text": "red", "label": None}, "missing label"),
    ({"text": "red", "label": 7}, "label out of range"),
]


@pytest.mark.parametrize(("row", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_bad_rows_are_named_left_out_and_stop_the_run_past_their_share(
    tmp_path: Path, tokenizer: Any, row: dict[str, Any], reason: str
) -> None:
    good = [{"text": WORDS[i % 3], "label": i % 2} for i in range(19)]
    source, columns = _jsonl(tmp_path / "rows.jsonl", [*good, row]), Columns(num_labels=2)
    with pytest.raises(BadRows, match=reason):
        _open(source, tokenizer, columns)
    # The allowed share holds for each split by itself.
    data = _open(source, tokenizer, columns, bad=0.2)
    assert len(data.train) + len(data.validation) == 19  # type: ignore[arg-type]
    counted = data.bad_rows(0.2)
    assert (counted.seen, list(counted.reasons.values())) == (20, [1])
    # Rows that are read again are not counted again.
    assert collate([data.train[0]])["rows"] == 0


def test_what_is_missing_is_named(tmp_path: Path, tokenizer: Any) -> None:
    source = _jsonl(tmp_path / "rows.jsonl", [{"a": "x", "b": "y", "label": i % 2} for i in range(8)])
    with pytest.raises(ValueError, match="no text found in the data: set data.text_column to one of a, b$"):
        _open(source, tokenizer, Columns())
    with pytest.raises(ValueError, match="data.second_text_column = 'c' is missing"):
        _open(source, tokenizer, Columns(text="a", second="c"))
    with pytest.raises(ValueError, match="data.label_column = 'lable' is missing.*did you mean 'label'"):
        _open(source, tokenizer, Columns(text="a", label="lable"))
    with pytest.raises(ValueError, match=r"an encoder needs a first token, \[CLS\]"):
        _open(source, trained_tokenizer(WORDS * 20, 300), Columns(text="a"))


def test_labels_of_texts_are_mapped_by_name_and_those_without_rows_are_said(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": WORDS[i % 3], "label": ["b", "c"][i % 2]} for i in range(16)]
    source, columns = _jsonl(tmp_path / "rows.jsonl", rows), Columns()
    known = KnownClasses(("c", "a", "b"), "the run", "")
    data = hub_labelled_text(source, SplitNames(fraction=0.25), columns, 16, lambda texts: tokenizer, 0.0, known)
    assert data.classes == ["c", "a", "b"]
    assert {int(data.train[row]["labels"]) for row in range(len(data.train))} == {0, 2}  # type: ignore[arg-type]
    assert "class a: 0 rows in train" in data.remarks
    numbers = _jsonl(tmp_path / "numbers.jsonl", [{"text": WORDS[i % 3], "label": [3, 1000][i % 2]} for i in range(16)])
    assert _open(numbers, tokenizer, columns).classes == ["3", "1000"]
    with pytest.raises(ValueError, match="a classifier needs 2 or more"):
        _open(_jsonl(tmp_path / "one.jsonl", [{"text": "red", "label": "x"}] * 8), tokenizer, columns)


def test_a_split_in_which_every_text_is_bad_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    good = _jsonl(tmp_path / "good.jsonl", [{"text": WORDS[i % 3], "label": i % 2} for i in range(16)])
    (tmp_path / "bad.jsonl").write_text(json.dumps({"text": " ", "label": 0}))
    files = {"train": str(good.data_files), "validation": str(tmp_path / "bad.jsonl")}
    with pytest.raises(BadRows, match="every row of the split for validation is bad"):
        hub_labelled_text(
            DataSource("json", data_files=files), SplitNames(validation="validation"), Columns(), 16, lambda texts: tokenizer, 1.0
        )
