"""Text: documents and their borders, packing, what is learned, bad rows, streams, the embedded library and its tokenizer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from laconic.data.embedded.python_functions import library_functions
from laconic.data.embedded.python_library import library_files
from laconic.data.loader import ResumableLoader
from laconic.data.rows import BadRows, collate
from laconic.data.source import DataSource, SplitNames
from laconic.data.splits import DataModule
from laconic.data.text.columns import find_columns
from laconic.data.text.documents import Encoder, encoder_for
from laconic.data.text.packing import PADDING, Corpus, PackedRows, Tokens, keep_whole
from laconic.data.text.splits import TextData, TextSettings, hub_text, python_functions, python_library, streamed_text
from laconic.data.text.tokenizer import END, load_tokenizer, token_bytes, trained_tokenizer
from laconic.modules.tokens.labels import IGNORE_TOKEN
from tests.data.texts import SENTENCES, chats, jsonl, small_tokenizer


def _corpus(lengths: list[int]) -> Corpus:
    """Documents whose tokens count on from one to the next, in two arrays that do not end with a document."""
    whole = np.arange(sum(lengths), dtype=np.int32)
    return Corpus([whole[:7], whole[7:]], np.asarray(lengths))


def _rows(rows: PackedRows) -> list[dict[str, Any]]:
    return [rows[index] for index in range(len(rows))]


def _tokens(length: int = 8) -> Tokens:
    return Tokens(length, 99, np.ones(100, np.int64))


@pytest.mark.parametrize("whole", [False, True])
def test_every_token_is_in_one_row_and_filler_is_only_at_the_end(whole: bool) -> None:
    corpus = _corpus([5, 8, 1, 3, 6, 2, 7])
    rows = _rows(PackedRows(corpus, _tokens(), whole))
    seen = []
    for row in rows:
        real = row["documents"] != PADDING
        assert real.tolist() == sorted(real.tolist(), reverse=True)
        assert set(row["input_ids"][~real].tolist()) <= {99}
        assert set(row["position_ids"][~real].tolist()) <= {0}
        assert set(row["labels"][~real].tolist()) <= {IGNORE_TOKEN}
        assert row["tokens"] == int(real.sum())
        seen += row["input_ids"][real].tolist()
    assert sorted(seen) == list(range(32))
    # Only the last of the rows that are cut end to end may have room left; whole documents leave as little as they can.
    assert len(rows) == math.ceil(32 / 8)


def test_positions_and_documents_start_again_at_every_border_and_no_document_predicts_the_next() -> None:
    corpus = _corpus([5, 8, 1, 10])
    rows = _rows(PackedRows(corpus, _tokens(), whole=False))
    assert [row["position_ids"].tolist() for row in rows] == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 4, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert [row["documents"].tolist() for row in rows] == [[0] * 5 + [1] * 3, [0] * 5 + [1] + [2] * 2, [0] * 8]
    for row in rows:
        first = row["position_ids"] == 0
        assert torch.equal(row["labels"], torch.where(first, IGNORE_TOKEN, row["input_ids"]))
        assert row["predicted"] == int((~first).sum()) == row["bytes"]


def test_whole_documents_are_never_cut_and_fill_rows_well() -> None:
    lengths = [int(size) for size in np.random.default_rng(0).integers(1, 65, 400)]
    corpus = _corpus(lengths)
    plan = keep_whole(corpus, 64)
    assert sorted((plan.stop - plan.start).tolist()) == sorted(lengths)
    assert len(plan.first) - 1 <= 1.1 * sum(lengths) / 64


def _encoder(columns: list[str], template: bool = False, limit: int = 64) -> Encoder:
    return encoder_for(find_columns(columns, {}, (), None), small_tokenizer(template), limit)


def test_a_text_ends_with_the_end_of_text_and_bytes_are_counted_from_its_tokens() -> None:
    tokenizer = small_tokenizer()
    document = encoder_for(find_columns(["text"], {}, (), None), tokenizer, 64).texts({"text": ["Le café — naïve 🦊"]})[0]
    assert document.tokens[-1] == tokenizer.eos_token_id
    assert document.learned is None
    assert token_bytes(tokenizer)[document.tokens].sum() == len("Le café — naïve 🦊".encode())


def test_bytes_of_tokens_of_other_kinds_of_tokenizers() -> None:
    class Pieces:
        all_special_ids = (0,)

        def __len__(self) -> int:
            return 4

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return ["</s>", "▁café", "<0xC3>", "##ing"]

    assert token_bytes(Pieces()).tolist() == [0, 6, 1, 3]


def test_of_prompt_and_completion_only_the_completion_is_learned() -> None:
    encoder = _encoder(["prompt", "completion"])
    document = encoder.texts({"prompt": ["Who slept?"], "completion": [" A fox slept."]})[0]
    assert document.learned is not None
    assert encoder.tokenizer.decode(document.tokens[document.learned]) == " A fox slept." + END
    assert encoder.tokenizer.decode(document.tokens[~document.learned]) == "Who slept?"


def test_of_a_chat_every_answer_is_learned_and_nothing_else() -> None:
    encoder = _encoder(["messages"], template=True, limit=200)
    turns = ["Who slept?", "A fox.", "Where?", "In the yard."]
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(turns)]
    document = encoder.texts({"messages": [messages]})[0]
    assert document.learned is not None
    assert encoder.tokenizer.decode(document.tokens[document.learned]) == f"A fox.{END}In the yard.{END}"
    pair = {"prompt": [messages[:3]], "completion": [messages[3:]]}
    last = _encoder(["prompt", "completion"], template=True, limit=200).texts(pair)[0]
    assert last.learned is not None
    assert encoder.tokenizer.decode(last.tokens[last.learned]) == f"In the yard.{END}"


def test_turns_that_a_template_writes_otherwise_later_on_are_not_learned() -> None:
    encoder = _encoder(["messages"], template=True, limit=200)
    # As templates do that leave the thoughts of earlier answers out.
    encoder.tokenizer.chat_template = (
        "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] if loop.last or message['role'] == 'user' else '…' }}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(("a?", "b.", "c?", "d."))]
    document = encoder.texts({"messages": [messages]})[0]
    assert document.learned is not None
    assert encoder.tokenizer.decode(document.tokens[document.learned]) == "d." + END


BAD = [
    ({"text": [None, " ", 3]}, {}, ["missing text", "empty text", "int in place of a text"]),
    ({"prompt": ["a", None, "a"], "completion": [None, "b", " "]}, {}, ["missing completion", "missing prompt", "empty completion"]),
    ({"prompt": ["word " * 99], "completion": ["b"]}, {}, ["prompt fills data.sequence_length and leaves no room for its answer"]),
    (
        {"messages": [None, [{"role": "user", "content": "a"}], [{"content": "a"}], [{"role": "user", "content": None}]]},
        {"template": True},
        ["no messages", "no answer of the assistant", "message without role", "message without text"],
    ),
]


@pytest.mark.parametrize(("rows", "options", "reasons"), BAD, ids=[" ".join(rows) for rows, *_ in BAD])
def test_a_bad_row_says_what_is_wrong_with_it(rows: dict[str, list[Any]], options: dict[str, Any], reasons: list[str]) -> None:
    documents = _encoder(list(rows), **options).texts(rows)
    assert [document.bad for document in documents] == reasons
    assert all(len(document.tokens) == 0 for document in documents)


def test_what_the_columns_do_not_offer_is_named() -> None:
    with pytest.raises(ValueError, match=r"data.text_column = 'txt' is missing from the data: its columns are text, label"):
        find_columns(["text", "label"], {}, (), "txt")
    with pytest.raises(ValueError, match=r"no text found in the data: set data.text_column to one of a, b, or provide messages"):
        find_columns(["a", "b"], {}, (), None)
    with pytest.raises(ValueError, match="has no chat template: set data.tokenizer"):
        _encoder(["messages"])


def _open(path: str, builder: str = "json", stream: bool = False, template: bool = False, **settings: Any) -> TextData:
    source, options = DataSource(builder, data_files=path), TextSettings(length=64, **settings)
    if stream:
        return streamed_text(source, SplitNames(), lambda texts: small_tokenizer(template), options)
    return hub_text(source, SplitNames(fraction=0.25), lambda texts: small_tokenizer(template), options)


def test_jsonl_parquet_and_text_files_give_the_same_documents(tmp_path: Path) -> None:
    rows = [{"text": sentence} for sentence in SENTENCES]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.txt").write_text("\n\n".join(SENTENCES))
    opened = [
        _open(jsonl(tmp_path / "rows.jsonl", rows)),
        _open(str(tmp_path / "rows.parquet"), "parquet"),
        _open(str(tmp_path / "rows.txt"), "text", sample_by="line"),
        _open(str(tmp_path / "rows.txt"), "text", sample_by="paragraph"),
    ]
    for split in ("train", "validation"):
        ids = [torch.stack([row["input_ids"] for row in _rows(getattr(data, split))]) for data in opened]
        assert all(torch.equal(ids[0], other) for other in ids[1:])
    with pytest.raises(ValueError, match="too few to hold one out for validation: .*data.sample_by=paragraph"):
        _open(str(tmp_path / "rows.txt"), "text")


def test_bad_rows_are_counted_by_reason_and_stop_past_the_allowed_fraction(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": sentence} for sentence in SENTENCES]
    rows[3], rows[8], rows[9] = {"text": None}, {"text": "  "}, {"text": ""}
    path = jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(BadRows, match=r"3 of 36 rows: 1 × missing text \(first at row 1\), 2 × empty text"):
        _open(path)
    data = _open(path, max_bad_fraction=0.1)
    counted = data.bad_rows(0.1)
    counted.add(5, [])
    assert sum(counted.reasons.values()) == 3
    assert data.counted.seen == 48


def test_chats_are_packed_whole_with_their_prompts_masked(tmp_path: Path) -> None:
    data = _open(jsonl(tmp_path / "chats.jsonl", chats(40)), template=True)
    for row in _rows(data.train):  # type: ignore[arg-type]
        for document in range(int(row["documents"].max()) + 1):
            labels = row["labels"][row["documents"] == document]
            assert labels[0] == IGNORE_TOKEN
            assert (labels != IGNORE_TOKEN).any()


def test_a_stream_gives_the_same_rows_on_any_number_of_processes_and_goes_on_where_it_was(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": sentence} for sentence in SENTENCES]
    rows[20] = {"text": None}
    path = jsonl(tmp_path / "rows.jsonl", rows)

    def batches(rank: int = 0, world_size: int = 1, skip: int = 0) -> list[dict[str, Any]]:
        data = _open(path, stream=True, max_bad_fraction=0.5, held_out=8)
        assert data.train_rows is None
        order = data.train_batches(2, 20 // world_size, 0, rank, world_size)
        loader = ResumableLoader(data.train, order, collate_fn=collate)
        loader.load_state_dict(loader.state_dict() | {"taken": skip})
        return list(loader)

    whole = batches()
    ids = [row for batch in whole for row in batch["input_ids"]]
    # More than one epoch: the stream starts anew, in another order.
    assert sum(batch["rows"] for batch in whole) > 40
    assert {row.reason for batch in whole for row in batch["bad"]} == {"missing text"}
    assert all(torch.equal(ours["input_ids"], theirs["input_ids"]) for ours, theirs in zip(batches(skip=7), whole[7:], strict=True))
    for rank in (0, 1):
        for step, batch in enumerate(batches(rank, 2)):
            first = (step * 2 + rank) * 2
            assert torch.equal(batch["input_ids"], torch.stack(ids[first : first + 2]))


def test_a_tokenizer_is_trained_on_the_beginning_of_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LACONIC_CACHE", str(tmp_path / "cache"))
    path = jsonl(tmp_path / "rows.jsonl", [{"text": sentence} for sentence in SENTENCES])
    settings = TextSettings(length=64, held_out=8)
    data = streamed_text(DataSource("json", data_files=path), SplitNames(), lambda texts: trained_tokenizer(texts or (), 400), settings)
    # Pairs that only the texts could teach it.
    assert len(data.tokenizer(" counted to ten under a bridge")["input_ids"]) < 12


def test_a_stream_holds_its_first_rows_out(tmp_path: Path) -> None:
    data = _open(jsonl(tmp_path / "rows.jsonl", [{"text": sentence} for sentence in SENTENCES]), stream=True, held_out=8)
    held_out = data.tokenizer.decode(torch.cat([row["input_ids"] for row in _rows(data.validation)]))  # type: ignore[arg-type]
    trained = data.tokenizer.decode(torch.cat([data.train[index]["input_ids"] for index in range(60)]))
    assert all(sentence in held_out and sentence[-20:] not in trained for sentence in SENTENCES[:8])


def test_no_file_of_the_library_is_in_two_splits_and_they_do_not_depend_on_how_many_are_taken() -> None:
    names = {split: [name for name, _ in library_files(split)] for split in ("train", "validation", "test")}
    assert sum(map(len, names.values())) == len(set().union(*names.values()))
    assert [name for name, _ in library_files("train", 5)] == names["train"][:5]
    assert all(len(found) > 10 for found in names.values())
    folders = {part for found in names.values() for name in found for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages", "encodings", "__pycache__"}


def test_the_library_is_packed_with_a_tokenizer_of_its_own_which_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LACONIC_CACHE", str(tmp_path / "cache"))
    settings = TextSettings(length=64)
    data = python_library(6, 2, lambda texts: trained_tokenizer(texts or (), 400), settings)
    assert len(data.tokenizer) == 400
    assert data.has_test
    files = list((tmp_path / "cache").iterdir())
    assert len(files) == 1
    before = files[0].stat().st_mtime_ns
    again = python_library(6, 2, lambda texts: trained_tokenizer(texts or (), 400), settings)
    assert files[0].stat().st_mtime_ns == before
    assert torch.equal(data.train[1]["input_ids"], again.train[1]["input_ids"])
    path = library_files("validation", 1)[0][1]
    text = path.read_text("utf-8", "replace")
    start = data.tokenizer.decode(data.validation[0]["input_ids"])
    assert text.startswith(start[:100])


SOURCE = '''
class Fox:
    """Not a function."""

    @property
    def name(self):
        """What it is called."""
        def inner():
            """Not by itself."""
            return self._name
        return inner()

    def silent(self):
        return None

def only():
    """Nothing follows."""

async def sleep(hours):
    "One line."
    await rest(hours)
'''


def test_functions_end_their_prompt_with_the_docstring_and_are_split_as_their_files(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"fox_{number}.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("def f(:")
    rows = {split: list(library_functions(split, tmp_path)) for split in ("train", "validation", "test")}
    for split, found in rows.items():
        assert len(found) == 2 * len([name for name, _ in library_files(split, root=tmp_path) if name != "broken.py"])
    name, sleep = rows["train"][:2]
    assert name["prompt"] == '@property\ndef name(self):\n    """What it is called."""\n'
    assert name["completion"].startswith("    def inner():\n")
    assert name["completion"].endswith("    return inner()\n")
    assert sleep == {"prompt": 'async def sleep(hours):\n    "One line."\n', "completion": "    await rest(hours)\n"}


def test_of_functions_the_body_is_learned_and_each_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": "def f():\n", "completion": "    return 1\n"}, {"prompt": "def f(" + "a, " * 99, "completion": "    pass\n"}] * 3
    monkeypatch.setattr("laconic.data.text.splits.library_functions", lambda split: rows)
    tokenizer = small_tokenizer()
    data = python_functions(2, 9, lambda texts: tokenizer, TextSettings(64))
    assert sum(int(row["documents"].max()) + 1 for row in _rows(data.train)) == 2
    assert sum(int(row["documents"].max()) + 1 for row in _rows(data.test)) == 3
    row = data.train[0]
    first = (row["documents"] == 0) & (row["labels"] != IGNORE_TOKEN)
    assert tokenizer.decode(row["input_ids"][first]) == "    return 1\n" + END


def test_a_tokenizer_without_an_end_or_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.tokenizer = '.*none' cannot be loaded"):
        load_tokenizer(str(tmp_path / "none"))
    small_tokenizer().save_pretrained(tmp_path / "saved")
    assert load_tokenizer(str(tmp_path / "saved" / "tokenizer.json")).eos_token == END
    with pytest.raises(ValueError, match=r"model.config.vocab_size = 200 must be at least 300"):
        trained_tokenizer(SENTENCES, 200)


def test_batches_of_text_are_shuffled_by_the_seed_and_shared_out(tmp_path: Path) -> None:
    data = _open(jsonl(tmp_path / "rows.jsonl", [{"text": sentence} for sentence in SENTENCES]))
    first, again, other = (next(iter(DataModule(data, 4, 4, 8, 0, seed).train_dataloader())) for seed in (0, 0, 1))
    assert torch.equal(first["sample_ids"], again["sample_ids"])
    assert not torch.equal(first["sample_ids"], other["sample_ids"])
    assert first["input_ids"].shape == (4, 64)
    assert (first["rows"], first["bad"]) == (0, [])
    assert first["tokens"] == int((first["documents"] >= 0).sum())
