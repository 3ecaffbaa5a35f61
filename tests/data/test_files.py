"""Broken files of text: one message with the file and the line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from laconic.data.rows import collate
from laconic.data.source import DataSource, SplitNames
from laconic.data.text.files import BrokenFile, file_fault
from laconic.data.text.splits import TextData, TextSettings, hub_text, streamed_text
from tests.data.texts import SENTENCES, jsonl, small_tokenizer

ROWS = "".join(f'{{"text": "{sentence}"}}\n' for sentence in SENTENCES[:30])
BROKEN = [
    ("cut.jsonl", "json", (ROWS + '{"text": "A fo').encode(), "cut.jsonl, line 31: not a JSON value: .*it may be cut"),
    ("middle.jsonl", "json", (ROWS + "{text}\n" + ROWS).encode(), "middle.jsonl, line 31: not a JSON value: '{text}'$"),
    ("wide.jsonl", "json", ROWS.encode("utf-16"), "wide.jsonl is UTF-16: convert it to UTF-8"),
    ("wide.txt", "text", "A fox.\n".encode("utf-16"), "wide.txt is UTF-16"),
    ("latin.txt", "text", "A fox.\nLe café.\n".encode("latin-1"), "latin.txt, line 2: byte 0xe9 is not UTF-8"),
    ("wide.csv", "csv", "text\nA fox.\n".encode("utf-16"), "wide.csv is UTF-16"),
]


def _open(path: Path, builder: str, stream: bool = False) -> TextData:
    source, settings = DataSource(builder, data_files=str(path)), TextSettings(64, sample_by="line", held_out=4)
    opened: Any = streamed_text if stream else hub_text
    data: TextData = opened(source, SplitNames(), lambda texts: small_tokenizer(), settings)
    return data


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("name", "builder", "content", "message"), BROKEN, ids=[name for name, *_ in BROKEN])
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, name: str, builder: str, content: bytes, message: str, stream: bool) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BrokenFile, match=rf"(?s)data.name = '{builder}' cannot be opened from .*{message}"):
        _open(tmp_path / name, builder, stream)


def test_a_stream_that_breaks_later_says_so_too(tmp_path: Path) -> None:
    path = Path(jsonl(tmp_path / "rows.jsonl", [{"text": sentence} for sentence in SENTENCES] * 40))
    data = _open(path, "json", stream=True)
    with path.open("a") as file:
        file.write('{"text": "A fo')
    with pytest.raises(BrokenFile, match=r"rows.jsonl, line 1921: not a JSON value"):
        collate([data.train[index] for index in range(3000)])


def test_whole_files_have_no_fault(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[\n{"text": "a"},\n{"text": "b"}\n]\n')
    (tmp_path / "rows.jsonl").write_text(ROWS)
    assert file_fault(tmp_path / "rows.json") is None
    assert file_fault(tmp_path / "rows.jsonl") is None
    (tmp_path / "rows.json").write_text('[\n{"text": "a"},\n{"text": \n')
    assert str(file_fault(tmp_path / "rows.json")).endswith("rows.json, line 4: Expecting value")


@pytest.mark.parametrize("stream", [False, True])
def test_a_byte_order_mark_is_no_character_of_the_text(tmp_path: Path, stream: bool) -> None:
    (tmp_path / "rows.txt").write_bytes(b"\xef\xbb\xbf" + "\n".join(SENTENCES).encode())
    data = _open(tmp_path / "rows.txt", "text", stream)
    texts = [data.tokenizer.decode(rows[index]["input_ids"]) for rows in (data.train, data.validation) for index in range(3)]
    assert any(SENTENCES[0][:20] in text for text in texts)
    assert not any("\ufeff" in text for text in texts)
