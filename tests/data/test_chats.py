"""Chats: which columns are read, forms of messages, what the template is given, and where the learned tokens end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from laconic.data.rows import BadRows
from laconic.data.source import DataSource, SplitNames
from laconic.data.text.columns import find_columns
from laconic.data.text.documents import Document, encoder_for
from laconic.data.text.splits import TextData, TextSettings, hub_text, streamed_text
from laconic.data.text.tokenizer import END, with_template
from tests.data.texts import chats, jsonl, small_tokenizer

CHAT = [{"role": "user", "content": "Who slept?"}, {"role": "assistant", "content": "A fox."}]
SHAREGPT = [{"from": "human", "value": "Who slept?"}, {"from": "gpt", "value": "A fox."}]
PARTS = [{"role": turn["role"], "content": [{"type": "text", "text": part} for part in turn["content"].partition(" ")]} for turn in CHAT]
# An answer is closed by the marker of the next turn, as in GLM and Vicuna.
OPEN_ENDED = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WITH_TOOLS = (
    "{% if tools %}Tools:{% for tool in tools %} {{ tool['name'] }}{% endfor %}.{% endif %}"
    "{% if tone is defined %}Be {{ tone }}.{% endif %}" + OPEN_ENDED
)


def _document(row: dict[str, Any], template: str | None = None, requested: str | None = None) -> tuple[Document, str, str]:
    """The document of a row, its text, and the learned part of the text."""
    tokenizer = small_tokenizer(template=True)
    if template is not None:
        tokenizer.chat_template = template
    encoder = encoder_for(find_columns(list(row), {}, [row], requested), tokenizer, 200)
    document = encoder.texts({name: [value] for name, value in row.items()})[0]
    learned = document.tokens if document.learned is None else document.tokens[document.learned]
    return document, tokenizer.decode(document.tokens), tokenizer.decode(learned)


@pytest.mark.parametrize(
    "row",
    [
        {"id": "a7", "conversations": SHAREGPT},
        {"conversations": SHAREGPT, "source": "web", "score": 3.5},
        {"id": "a7", "turns": CHAT},
        {"messages": PARTS},
        {"messages": [*PARTS[:1], CHAT[1]]},
        {"conversations": [{**turn, "loss": None, "role": None} for turn in SHAREGPT]},
    ],
    ids=["sharegpt", "sharegpt with names", "other name", "content parts", "mixed", "keys of other rows"],
)
def test_chats_in_every_usual_form_give_the_same_document(row: dict[str, Any]) -> None:
    expected = _document({"messages": CHAT})
    assert _document(row)[1:] == expected[1:]
    assert expected[2] == f"A fox.{END}"


@pytest.mark.parametrize(
    ("row", "lost"),
    [
        ({"prompt": "Who slept?", "chosen": CHAT, "rejected": CHAT}, "chosen, rejected"),
        ({"messages": CHAT, "rejected": CHAT}, "rejected"),
        ({"id": "a7", "dialogue": ["Who slept?", "A fox."]}, "dialogue"),
        ({"id": "a7", "translation": {"en": "fox", "fr": "renard"}}, "translation"),
        ({"text": "rendered", "conversations": SHAREGPT}, "conversations"),
    ],
)
def test_columns_with_texts_that_would_not_be_read_are_refused(row: dict[str, Any], lost: str) -> None:
    with pytest.raises(ValueError, match=f"columns {lost} of the data hold lists or mappings of texts, which would not be read beside"):
        find_columns(list(row), {}, [row], None)
    found = find_columns(list(row), {}, [row], next(iter(row)))
    assert next(iter(row)) in (found.text, found.chat)


def test_what_is_read_and_what_is_guessed_is_said() -> None:
    def note(row: dict[str, Any]) -> str:
        return find_columns(list(row), {}, [row], None).note

    assert note({"text": "a"}) == "data: texts of column 'text'"
    assert note({"conversations": SHAREGPT, "tools": [], "source": "web"}) == (
        "data: chats of column 'conversations' with tools; not read: source"
    )
    assert note({"body": "a", "score": 2}) == (
        "data: texts of column 'body', guessed because it is the only one that fits: data.text_column names another; not read: score"
    )
    assert note({"prompt": "a", "completion": "b", "id": 1}) == "data: prompts and completions; not read: id"


@pytest.mark.parametrize("stream", [False, True])
def test_the_columns_of_files_are_recognised_by_their_rows(tmp_path: Path, stream: bool) -> None:
    rows = [{"id": f"row {index}", "conversations": SHAREGPT} for index in range(30)]
    source, settings = DataSource("json", data_files=jsonl(tmp_path / "rows.jsonl", rows)), TextSettings(64, held_out=4)
    opened = streamed_text if stream else hub_text
    data: TextData = opened(source, SplitNames(), lambda texts: small_tokenizer(template=True), settings)
    assert "A fox." in data.tokenizer.decode(data.train[0]["input_ids"])
    assert data.notes == ("data: chats of column 'conversations'; not read: id",)


TOOL = {"name": "search", "parameters": {"x": None}}


@pytest.mark.parametrize("tools", [[TOOL], '[{"name": "search"}]'])
def test_what_belongs_to_the_prompt_is_given_to_the_template(tools: Any) -> None:
    row = {"messages": CHAT, "tools": tools, "chat_template_kwargs": {"tone": "kind"}, "system": "Short."}
    document, text, learned = _document(row, WITH_TOOLS)
    assert text.startswith("Tools: search.Be kind.<system>Short.<user>Who slept?")
    assert learned == f"A fox.{END}"
    for name in ("tools", "chat_template_kwargs"):
        only = {"messages": CHAT, name: row[name]}
        assert "which the chat template does not read" in _document(only, OPEN_ENDED)[0].bad
    assert not _document({"messages": CHAT, "tools": []}, OPEN_ENDED)[0].bad
    assert _document({"messages": CHAT, "tools": "[search"}, WITH_TOOLS)[0].bad == "tools that are not JSON"
    assert document.bad == ""


def test_other_speakers_and_parts_are_named() -> None:
    assert _document({"conversations": [*SHAREGPT, {"from": "narrator", "value": "x"}]})[0].bad.startswith("message from 'narrator'")
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, CHAT[1]]
    assert _document({"messages": image})[0].bad == "message with a part of type 'image_url', and only text is read"


@pytest.mark.parametrize("turns", [CHAT, [*CHAT, *CHAT], [*CHAT, CHAT[0]]], ids=["one", "two", "open"])
def test_the_learned_tokens_end_with_a_stop_though_the_template_writes_none(turns: list[dict[str, Any]]) -> None:
    document, _, learned = _document({"messages": turns}, OPEN_ENDED)
    assert learned.endswith(f"A fox.{END}")
    assert document.learned is not None
    assert bool(document.learned[-1])
    # A template that writes a stop is not changed.
    assert _document({"messages": turns})[1].count(END) == len(turns)


THINKING = OPEN_ENDED.replace("<assistant>{% endif %}", "<assistant><think>{% endif %}")


def test_a_prompt_that_opens_a_thought_is_named_with_the_way_on(tmp_path: Path) -> None:
    bad = _document({"messages": CHAT}, THINKING)[0].bad
    assert bad.startswith("chat template begins an answer with '<think>' when it is generated, and writes it otherwise in a chat")
    assert "data.chat_template" in bad
    (tmp_path / "own.jinja").write_text(OPEN_ENDED)
    tokenizer = small_tokenizer(template=True)
    tokenizer.chat_template = THINKING
    for given in (str(tmp_path / "own.jinja"), OPEN_ENDED):
        assert with_template(tokenizer, given).chat_template == OPEN_ENDED
    with pytest.raises(ValueError, match=r"data.chat_template = 'none.jinja' does not exist"):
        with_template(tokenizer, "none.jinja")
    with pytest.raises(ValueError, match="data.chat_template is not a Jinja template: line 1"):
        with_template(tokenizer, "{% for %}")


def test_the_allowed_share_of_bad_rows_holds_for_every_split_by_itself_and_no_split_may_predict_nothing(tmp_path: Path) -> None:
    good: list[dict[str, Any]] = chats(40)
    wrong = [{"messages": [{"role": "user", "content": "Who?"}]} for _ in range(2)]
    files = {"train": jsonl(tmp_path / "train.jsonl", good), "validation": jsonl(tmp_path / "validation.jsonl", wrong)}

    def opened(share: float) -> TextData:
        source, names = DataSource("json", data_files=files), SplitNames(validation="validation")
        return hub_text(source, names, lambda texts: small_tokenizer(template=True), TextSettings(64, max_bad_fraction=share))

    with pytest.raises(BadRows, match="bad rows in the validation data: 2 of 2 rows: 2 × no answer of the assistant"):
        opened(0.1)
    with pytest.raises(ValueError, match="no token of the validation data is predicted: 2 rows, 2 of them bad"):
        opened(1.0)
