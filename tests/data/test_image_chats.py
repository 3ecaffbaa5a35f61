"""Chats about images: every form that people store, what a model reads of them, and rows that cannot be used."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from laconic.data.chats.encoder import ChatEncoder
from laconic.data.chats.messages import chat_of, images_of
from laconic.data.chats.processor import load_processor, made_processor
from laconic.data.chats.splits import ChatColumns, ChatRows, digit_questions, hub_chats
from laconic.data.embedded.digit_questions import QUARTERS, QUESTIONS, DigitQuestions
from laconic.data.rows import collate
from laconic.data.source import DataSource, SplitNames
from laconic.data.text.conversations import WrongRow
from laconic.modules.tokens.labels import IGNORE_TOKEN
from tests.data.texts import SENTENCES, jsonl

SIZE, PATCH = 24, 8
VISUAL = (SIZE // PATCH) ** 2


@pytest.fixture(scope="module")
def processor() -> Any:
    return made_processor([*SENTENCES, "What is this?"], 340, SIZE, PATCH, "full", 0)


def _picture(value: int, size: int = 30) -> Image.Image:
    return Image.fromarray(np.full((size, size, 3), value, np.uint8))


def _bytes(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def _asked(*content: Any, role: str = "role", text: str = "content") -> list[dict[str, Any]]:
    who = ("user", "assistant") if role == "role" else ("human", "gpt")
    return [{role: who[0], text: content[0] if len(content) == 1 else list(content)}, {role: who[1], text: "A square."}]


IMAGE_PART, TEXT_PART = {"type": "image"}, {"type": "text", "text": "What is this?"}


def _forms(folder: Path) -> dict[str, tuple[dict[str, Any], str | None]]:
    """Rows that say the same, and their image column."""
    picture = _picture(80)
    picture.save(folder / "a.png")
    return {
        "parts and a list": ({"chat": _asked(IMAGE_PART, TEXT_PART), "images": [picture]}, "images"),
        "parts and one image": ({"chat": _asked(IMAGE_PART, TEXT_PART), "image": picture}, "image"),
        "a placeholder": ({"chat": _asked("<image>\nWhat is this?"), "images": [{"bytes": _bytes(picture), "path": None}]}, "images"),
        "llava": ({"chat": _asked("<image>\nWhat is this?", role="from", text="value"), "image": "a.png"}, "image"),
        "llava as JSON": ({"chat": json.dumps(_asked("<image>\nWhat is this?", role="from", text="value")), "image": "a.png"}, "image"),
        "held by its part": ({"chat": _asked({"type": "image", "image": picture}, TEXT_PART)}, None),
        "path in its part": ({"chat": _asked({"type": "image", "path": "a.png"}, TEXT_PART)}, None),
        "bytes": ({"chat": _asked(IMAGE_PART, TEXT_PART), "image": _bytes(picture)}, "image"),
        # Arrow adds the keys of other rows.
        "keys of None": (
            {"chat": _asked({"type": "image", "text": None}, {**TEXT_PART, "image": None}), "images": [picture]},
            "images",
        ),
    }


def test_every_form_of_a_row_is_the_same_to_a_model(processor: Any, tmp_path: Path) -> None:
    encoder, found = ChatEncoder(processor, 200), {}
    for name, (row, column) in _forms(tmp_path).items():
        found[name] = ChatRows([row], ChatColumns("chat", column), encoder, tmp_path)[0]
    expected = found["parts and a list"]
    assert "bad" not in expected
    for name, item in found.items():
        assert "bad" not in item, (name, item)
        assert torch.equal(item["input_ids"], expected["input_ids"]), name
        assert torch.equal(item["pixel_values"][0], expected["pixel_values"][0]), name


def test_an_image_has_its_places_and_only_answers_are_learned(processor: Any) -> None:
    chat = [*_asked(IMAGE_PART, TEXT_PART), {"role": "user", "content": [TEXT_PART]}, {"role": "assistant", "content": "A square."}]
    messages, held = chat_of(chat)
    item = ChatEncoder(processor, 200)(messages, images_of(_picture(10), held, Path()))
    ids, labels, turns = item["input_ids"], item["labels"], item["turns"]
    assert int((ids == processor.image_token_id).sum()) == VISUAL
    assert bool((labels[ids == processor.image_token_id] == IGNORE_TOKEN).all())
    assert torch.equal(labels != IGNORE_TOKEN, turns >= 0)
    text = processor.tokenizer
    assert [text.decode(ids[turns == turn]) for turn in (0, 1)] == ["A square.<|endoftext|>"] * 2
    # What the library makes of the whole chat.
    whole = processor.apply_chat_template(messages, tokenize=False)
    made = processor(text=whole, images=[_picture(10)], return_tensors="pt")
    assert torch.equal(made["input_ids"][0], ids)
    assert torch.equal(made["pixel_values"], torch.stack(item["pixel_values"]))


WRONG: dict[str, tuple[Any, Any]] = {
    r"2 image placeholder\(s\) in the messages and 1 image\(s\)": (_asked("<image><image>\nWhat is this?"), [_picture(1)]),
    r"0 image placeholder\(s\) in the messages and 1 image\(s\)": (_asked("What is this?"), [_picture(1)]),
    r"1 image placeholder\(s\) in the messages and 0 image\(s\)": (_asked(IMAGE_PART, TEXT_PART), None),
    "image file that does not exist": (_asked(IMAGE_PART, TEXT_PART), "nowhere.png"),
    "image given as an address, which is not fetched": (_asked({"type": "image", "url": "https://a.b/c.png"}, TEXT_PART), None),
    "undecodable image": (_asked(IMAGE_PART, TEXT_PART), b"no picture"),
    "images both in the messages and in the image column": (_asked({"type": "image", "image": _picture(1)}, TEXT_PART), [_picture(1)]),
    "part of type 'video'": (_asked({"type": "video"}, TEXT_PART), None),
    "no messages": ([], None),
    "a text in place of messages": ("What is this?", None),
    "no answer of the assistant": (_asked(IMAGE_PART, TEXT_PART)[:1], [_picture(1)]),
    "row longer than data.sequence_length": (_asked("<image>" * 20 + "What is this?"), [_picture(1)] * 20),
}


@pytest.mark.parametrize("reason", WRONG)
def test_a_row_that_cannot_be_used_says_why(reason: str, processor: Any) -> None:
    chat, images = WRONG[reason]
    item = ChatRows([{"chat": chat, "images": images}], ChatColumns("chat", "images"), ChatEncoder(processor, 150), Path())[0]
    with pytest.raises(WrongRow, match=reason):
        raise WrongRow(item["bad"].reason)


def test_a_batch_joins_images_and_pads_texts(processor: Any) -> None:
    rows = [
        {"chat": _asked("What is this?"), "images": []},
        {"chat": _asked("<image>What is<image> this?"), "images": [_picture(1), _picture(2, 50)]},
        {"chat": _asked(IMAGE_PART, TEXT_PART), "images": [_picture(3)]},
    ]
    encoded = ChatRows(rows, ChatColumns("chat", "images"), ChatEncoder(processor, 200), Path())
    items = [encoded[index] for index in range(3)]
    batch = collate([*items, {"bad": (3, "x")}])
    assert batch["pixel_values"].shape == (3, 3, SIZE, SIZE)
    assert [round(float(image.mean()), 3) for image in batch["pixel_values"]] == [round(value / 127.5 - 1, 3) for value in (1, 2, 3)]
    length = max(len(item["input_ids"]) for item in items)
    assert batch["input_ids"].shape == batch["labels"].shape == (3, length)
    short = len(items[0]["input_ids"])
    assert bool((batch["labels"][0, short:] == IGNORE_TOKEN).all())
    assert not bool(batch["attention_mask"][0, short:].any())
    assert bool((batch["turns"][0, short:] == -1).all())
    assert batch["terms"] == sum(item["predicted"] for item in items)
    assert "pixel_values" not in collate(items[:1])


def test_data_sets_of_files_are_read_with_their_images(processor: Any, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        _picture(number * 20).save(folder / f"{number}.png")
    lines = [{"id": number, "image": f"{number}.png", "conversations": _asked("<image>\nWhat is this?", role="from", text="value")} for number in range(4)]  # fmt: skip
    source = DataSource("json", data_files=jsonl(tmp_path / "chats.jsonl", lines))
    of_lines = hub_chats(source, SplitNames(fraction=0.25), processor, 200, None, None, folder)
    table = {"images": [[_picture(number * 20)] for number in range(4)], "messages": [_asked("<image>\nWhat is this?")] * 4}
    features = datasets.Features(
        {"images": datasets.List(datasets.Image()), "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}]}
    )
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "chats.parquet")
    source = DataSource("parquet", data_files=str(tmp_path / "chats.parquet"))
    of_table = hub_chats(source, SplitNames(fraction=0.25), processor, 200, None, None, Path())
    assert "images of column 'images'" in of_table.notes[0]
    for index in range(3):
        ours, theirs = of_lines.train[index], of_table.train[index]
        assert torch.equal(ours["input_ids"], theirs["input_ids"])
        assert torch.equal(ours["pixel_values"][0], theirs["pixel_values"][0])
    with pytest.raises(ValueError, match=r"data.image_column = 'picture' is missing from the data: its columns are images, messages"):
        hub_chats(source, SplitNames(), processor, 200, None, "picture", Path())


def test_a_saved_processor_reads_alike(processor: Any, tmp_path: Path) -> None:
    data = digit_questions(4, 2, SIZE * 2, processor, 400)
    data.save_beside(tmp_path)
    again = digit_questions(4, 2, SIZE * 2, load_processor(str(tmp_path)), 400)
    for key, value in data.train[1].items():
        other = again.train[1][key]
        assert torch.equal(torch.stack(value), torch.stack(other)) if key == "pixel_values" else (torch.as_tensor(value) == other).all()
    with pytest.raises(ValueError, match=r"no processor in '/nowhere/x'.*set data.processor"):
        load_processor("/nowhere/x")


def test_digit_questions_depend_on_their_index_alone_and_answers_are_right() -> None:
    data = DigitQuestions("train", 600)
    again = DigitQuestions("train", 600)
    yes = number = 0
    for index in range(300):
        row = data[index]
        assert row["messages"] == again[index]["messages"]
        assert np.array_equal(np.asarray(row["images"][0]), np.asarray(again[index]["images"][0]))
        assert sorted(row["kinds"]) == sorted(QUESTIONS)
        answers = dict(zip(row["kinds"], (message["content"] for message in row["messages"][1::2]), strict=True))
        picture = np.asarray(row["images"][0])[..., 0]
        lit = {name: bool(picture[24 * (place // 2) :, 24 * (place % 2) :][:24, :24].any()) for place, name in enumerate(QUARTERS)}
        # A scrambled digit lights a quarter too.
        assert sum(lit.values()) - int(answers["counting"]) in (0, 1)
        assert lit[answers["locating"]]
        yes, number = yes + (answers["presence"] == "yes"), number + 1
    assert 0.4 < yes / number < 0.6
    with pytest.raises(ValueError, match="split = 'dev' must be one of train, validation, test"):
        DigitQuestions("dev", 3)
