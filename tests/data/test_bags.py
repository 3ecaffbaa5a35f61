"""Rows of bags: several consecutive tokens that a model reads as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from laconic.data.loader import DataPhase, StepBatches
from laconic.data.source import DataSource, SplitNames
from laconic.data.text.packing import PADDING, Corpus, PackedRows, Tokens
from laconic.data.text.phases import PhasedBatches
from laconic.data.text.splits import TextSettings, streamed_text
from laconic.modules.tokens.labels import IGNORE_TOKEN
from tests.data.texts import jsonl, small_tokenizer

FILLER = 99


def _packed(lengths: list[int], bag: int, whole: bool) -> PackedRows:
    """Rows of 4 bags of documents whose tokens count on from one to the next."""
    corpus = Corpus([np.arange(sum(lengths), dtype=np.int32)], np.asarray(lengths))
    return PackedRows(corpus, Tokens(4, FILLER, np.ones(100, np.int64)).with_bags(bag), whole)


def _rows(lengths: list[int], bag: int, whole: bool) -> list[dict[str, Any]]:
    rows = _packed(lengths, bag, whole)
    return [rows[index] for index in range(len(rows))]


@pytest.mark.parametrize("whole", [False, True])
def test_every_token_is_in_one_bag_and_no_bag_has_tokens_of_two_documents(whole: bool) -> None:
    lengths = [5, 12, 1, 3, 7, 4]
    borders = np.cumsum(lengths)
    seen = []
    for row in _rows(lengths, 3, whole):
        assert row["input_ids"].shape == row["labels"].shape == (4, 3)
        for bag, place, document in zip(row["input_ids"], row["position_ids"], row["documents"], strict=True):
            tokens = bag[bag != FILLER]
            assert len({int(np.searchsorted(borders, int(token), "right")) for token in tokens}) == (document != PADDING)
            # What a document lacks for its last bag is at its end.
            assert (bag[: len(tokens)] == tokens).all()
            assert place == 0 or document != PADDING
            seen += tokens.tolist()
        assert row["tokens"] == int((row["input_ids"] != FILLER).sum())
    assert sorted(seen) == list(range(sum(lengths)))


def test_the_first_bag_of_a_document_is_not_predicted_and_positions_count_bags() -> None:
    first, second = _rows([5, 8], 2, whole=False)
    assert first["input_ids"].tolist() == [[0, 1], [2, 3], [4, FILLER], [5, 6]]
    assert first["labels"].tolist() == [[IGNORE_TOKEN] * 2, [2, 3], [4, IGNORE_TOKEN], [IGNORE_TOKEN] * 2]
    assert (first["position_ids"].tolist(), first["documents"].tolist()) == ([0, 1, 2, 0], [0, 0, 0, 1])
    assert (first["tokens"], first["predicted"], first["bytes"]) == (7, 3, 3)
    # The rest of the second document goes on as one of its own.
    assert second["labels"].tolist() == [[IGNORE_TOKEN] * 2, [9, 10], [11, 12], [IGNORE_TOKEN] * 2]
    assert second["documents"].tolist() == [0, 0, 0, PADDING]


@pytest.mark.parametrize("whole", [False, True])
def test_the_tokens_that_rows_predict_are_counted_without_reading_them(whole: bool) -> None:
    lengths = [5, 12, 1, 3, 7, 4]
    for bag in (3, 4, 12):
        assert _packed(lengths, bag, whole).predicted == sum(row["predicted"] for row in _rows(lengths, bag, whole))
    assert _packed(lengths, 12, whole).predicted == 0


def test_phases_read_what_one_process_reads_and_go_on_where_a_checkpoint_was() -> None:
    def batches(start: int = 0, rank: int = 0, world_size: int = 1) -> list[list[tuple[int, int]]]:
        parts = [StepBatches(length, size, 9, 0, rank, world_size) for length, size in ((16, 2 // world_size), (24, 4 // world_size))]
        phased = PhasedBatches(parts, [4, 5])
        phased.start = start
        return list(phased)

    whole = batches()
    assert len(whole) == 9
    assert [batch[0][0] for batch in whole] == [0] * 4 + [1] * 5
    assert [index for batch in whole[4:] for _, index in batch] == [
        index for batch in list(StepBatches(24, 4, 9, 0))[4:] for index in batch
    ]
    for start in range(10):
        assert batches(start) == whole[start:]
    ranks = batches(0, 0, 2), batches(0, 1, 2)
    assert [[*one, *other] for one, other in zip(*ranks, strict=True)] == whole


def test_a_stream_goes_on_with_ordinary_rows_where_its_rows_of_bags_ended(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [{"text": f"Row {index} has a text of its own." * (1 + index % 3)} for index in range(60)])
    data = streamed_text(
        DataSource("json", data_files=path), SplitNames(), lambda texts: small_tokenizer(), TextSettings(length=16, held_out=4)
    )
    rows, batches = data.train_phases([DataPhase(2, 2, 2), DataPhase(3, 4)], 0)
    found: Any = [rows.__getitems__(batch) for batch in batches]  # type: ignore[attr-defined]
    text = torch.cat([data.train[index]["input_ids"] for index in range(24)])
    # A place of a bag without a token is behind the last one of its document, the end of text.
    bags = torch.cat([row["input_ids"][row["documents"] >= 0].flatten() for batch in found[:2] for row in batch])
    end = data.tokenizer.eos_token_id
    again = torch.cat([torch.tensor([True]), (bags[1:] != end) | (bags[:-1] != end)])
    ordinary = torch.cat([row["input_ids"] for batch in found[2:] for row in batch])
    read = torch.cat([bags[again], ordinary])
    assert torch.equal(read, text[: len(read)])
    assert [len(batch) for batch in found] == [2, 2, 4, 4, 4]
    # Of two processes, from the second phase on.
    of_rank, second = data.train_phases([DataPhase(2, 1, 2), DataPhase(3, 2)], 0, 1, 2)
    second.start = 2
    for batch, both in zip(second, found[2:], strict=True):
        for mine, its in zip(of_rank.__getitems__(batch), both[2:], strict=True):  # type: ignore[attr-defined]
            assert torch.equal(mine["input_ids"], its["input_ids"])
