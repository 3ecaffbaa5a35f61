"""Chats about images: every form that people store, what a model reads of them, and rows that cannot be used."""

from __future__ import annotations

import base64
import copy
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from laconic.data.chats.encoder import ChatEncoder
from laconic.data.chats.messages import chat_of, images_of
from laconic.data.chats.processor import load_processor, made_processor
from laconic.data.chats.splits import ChatColumns, ChatRows, digit_questions, hub_chats
from laconic.data.embedded.digit_questions import QUARTERS, QUESTIONS, DigitQuestions
from laconic.data.embedded.scattered_digits import source_digits
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
        "inline": (
            {
                "chat": _asked(
                    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(_bytes(picture)).decode()}"}},
                    TEXT_PART,
                )
            },
            None,
        ),
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
        assert torch.equal(item["images"]["pixel_values"], expected["images"]["pixel_values"]), name


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
    assert torch.equal(made["pixel_values"], item["images"]["pixel_values"])


WRONG: dict[str, tuple[Any, Any]] = {
    r"2 image placeholder\(s\) in the messages and 1 image\(s\)": (_asked("<image><image>\nWhat is this?"), [_picture(1)]),
    r"0 image placeholder\(s\) in the messages and 1 image\(s\)": (_asked("What is this?"), [_picture(1)]),
    r"1 image placeholder\(s\) in the messages and 0 image\(s\)": (_asked(IMAGE_PART, TEXT_PART), None),
    "image file that does not exist": (_asked(IMAGE_PART, TEXT_PART), "nowhere.png"),
    "image given as an address, which is not fetched": (_asked({"type": "image", "url": "https://a.b/c.png"}, TEXT_PART), None),
    "undecodable image .OSError": (_asked(IMAGE_PART, TEXT_PART), "iVBORw0KGgo" * 1000),
    "undecodable image": (_asked(IMAGE_PART, TEXT_PART), b"no picture"),
    "int without an image in place of one: name the column of images": (_asked(IMAGE_PART, TEXT_PART), 7),
    "dict without an image in place of one": (_asked(IMAGE_PART, TEXT_PART), [{"bytes": None, "path": None}]),
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
    assert [round(float(image.mean()), 3) for image in batch["pixel_values"]] == [round(value / 255, 3) for value in (1, 2, 3)]
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
        assert torch.equal(ours["images"]["pixel_values"], theirs["images"]["pixel_values"])
    with pytest.raises(ValueError, match=r"data.image_column = 'picture' is missing from the data: its columns are images, messages"):
        hub_chats(source, SplitNames(), processor, 200, None, "picture", Path())


def test_a_saved_processor_reads_alike(processor: Any, tmp_path: Path) -> None:
    data = digit_questions(4, 2, processor, 400)
    data.save_beside(tmp_path)
    again = digit_questions(4, 2, load_processor(str(tmp_path)), 400)
    ours, theirs = data.train[1], again.train[1]
    assert torch.equal(ours.pop("images")["pixel_values"], theirs.pop("images")["pixel_values"])
    assert all(bool((torch.as_tensor(value) == theirs[key]).all()) for key, value in ours.items())
    with pytest.raises(ValueError, match=r"no processor in '/nowhere/x'.*set data.processor"):
        load_processor("/nowhere/x")


def _turns(row: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Kind, question and answer of each turn."""
    texts = [message["content"] if isinstance(message["content"], str) else message["content"][1]["text"] for message in row["messages"]]
    return list(zip(row["kinds"], texts[::2], texts[1::2], strict=True))


def _quarter(picture: Any, place: int) -> np.ndarray:
    half = np.asarray(picture).shape[0] // 2
    return np.asarray(picture)[..., 0][half * (place // 2) :, half * (place % 2) :][:half, :half]


def test_digit_questions_depend_on_their_index_alone_and_answers_agree_with_the_listing() -> None:
    data, again = DigitQuestions("train", 900), DigitQuestions("train", 900)
    seen: Counter[tuple[str, str]] = Counter()
    for index in range(900):
        row = data[index]
        if index < 20:
            assert row["messages"] == again[index]["messages"]
            assert np.array_equal(np.asarray(row["images"][0]), np.asarray(again[index]["images"][0]))
        turns = _turns(row)
        assert turns[0][0] == "counting"
        if turns[-1][0] == "listing":
            listed = dict(zip(QUARTERS, turns[-1][2].split(","), strict=True))
        else:
            assert turns[-1][0] == "naming"
            named = {part[2:]: part[0] for part in turns[-1][2].split("\n")}
            assert list(named.values()) == sorted(named.values())
            listed = {name: named.get(name, "-") for name in QUARTERS}
        count = sum(digit != "-" for digit in listed.values())
        assert turns[0][2] == str(count)
        lit = {name: bool(_quarter(row["images"][0], place).any()) for place, name in enumerate(QUARTERS)}
        assert all(lit[name] for name, digit in listed.items() if digit != "-")
        # A scrambled digit lights a quarter too.
        assert sum(lit.values()) - count in (0, 1)
        found = [(kind, question, answer) for kind, question, answer in turns if kind in ("reading", "locating")]
        assert len(found) == min(2, count - 1)
        assert len({kind for kind, _, _ in found}) == 1
        told = set()
        for kind, question, answer in found:
            digit = answer if kind == "reading" else question.split('"')[1]
            place = answer if kind == "locating" else question.removeprefix("Which digit is at the ")[:-1]
            assert listed[place] == digit
            told.add(digit)
        ((_, question, answer),) = [turn for turn in turns if turn[0] == "presence"]
        digit = question.split('"')[1]
        assert (answer == "yes") == (digit in listed.values())
        assert digit not in told
        seen[str(count), answer] += 1
    # Whatever the count, yes and no are alike frequent.
    for count in "234":
        yes, no = seen[count, "yes"], seen[count, "no"]
        assert 0.4 < yes / (yes + no) < 0.6
        assert yes + no > 200
    assert set(QUESTIONS) == {"reading", "counting", "locating", "presence", "listing", "naming"}
    with pytest.raises(ValueError, match="split = 'dev' must be one of train, validation, test"):
        DigitQuestions("dev", 3)


def test_a_digit_is_where_a_question_says() -> None:
    data, (images, labels) = DigitQuestions("test", 200), source_digits("test")
    checked = 0
    for index in range(200):
        row = data[index]
        for kind, question, answer in _turns(row):
            if kind != "reading":
                continue
            quarter = _quarter(row["images"][0], QUARTERS.index(question.removeprefix("Which digit is at the ")[:-1]))
            # The picture of some source digit of that number stands there, in cells of four pixels.
            windows = np.lib.stride_tricks.sliding_window_view(quarter, (8, 8))[::4, ::4].reshape(-1, 64)
            sources = (images[labels == int(answer)] * 255).round().astype(np.uint8).reshape(-1, 64)
            assert {window.tobytes() for window in windows} & {source.tobytes() for source in sources}
        checked += 1
    assert checked > 60


LLAVA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{{ '\\n' }}{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def _sentencepiece(begin: bool) -> Any:
    """A tokenizer that joins a space to the next word, as Llama's does, with or without a token in front of every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer: Any = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>", "<image>"]
    words = ["USER: What is this? ASSISTANT: A square. USER: Really? ASSISTANT: Yes."] * 3
    tokenizer.train_from_iterator(words, trainers.BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False))
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("begin", [True, False], ids=["bos", "no_bos"])
def test_every_answer_is_learned_where_a_space_belongs_to_the_next_word(begin: bool, processor: Any) -> None:
    tokenizer = _sentencepiece(begin)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    llava = LlavaProcessor(processor.image_processor, tokenizer, PATCH, "full", LLAVA, num_additional_image_tokens=0)
    more = [{"role": "user", "content": [{"type": "text", "text": "Really?"}]}, {"role": "assistant", "content": "Yes."}]
    messages, held = chat_of([*_asked(IMAGE_PART, TEXT_PART), *more])
    item = ChatEncoder(llava, 200)(messages, images_of(_picture(1), held, Path()))
    ids, turns = item["input_ids"], item["turns"]
    assert [tokenizer.decode(ids[turns == turn]).strip() for turn in (0, 1)] == ["A square.", "Yes.</s>"]
    # The tokenizer's own first token is there once.
    assert (ids == tokenizer.bos_token_id).sum() == int(begin)
    assert bool(ids[0] == tokenizer.bos_token_id) is begin


def test_a_processor_that_cannot_serve_is_refused(processor: Any) -> None:
    for template, message in ((None, "no chat template: set data.chat_template"), ("{{ messages[0]['content'] }}", "writes no <image>")):
        other = copy.copy(processor)
        other.chat_template, other.tokenizer = template, copy.copy(processor.tokenizer)
        other.tokenizer.chat_template = None
        with pytest.raises(ValueError, match=message):
            ChatEncoder(other, 100)
    endless = copy.copy(processor)
    endless.tokenizer = copy.copy(processor.tokenizer)
    endless.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no eos_token"):
        ChatEncoder(endless, 100)
