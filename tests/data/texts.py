"""Small texts and a tokenizer for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from laconic.data.embedded.digit_questions import DigitQuestions
from laconic.data.text.tokenizer import END, trained_tokenizer

SENTENCES = [
    f"{who} {what} {where}, and nobody {'knew' if number % 2 else 'asked'} why {number}."
    for number, (who, what, where) in enumerate(
        (who, what, where)
        for who in ("A fox", "The café owner", "My neighbour", "Nobody")
        for what in ("sang", "slept", "waited for rain", "counted to ten")
        for where in ("in the yard", "under a bridge", "at noon")
    )
]
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}" + END + "{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def small_tokenizer(template: bool = False) -> Any:
    tokenizer = trained_tokenizer(SENTENCES, 320)
    if template:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chats(number: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"Who slept in house {index}?"},
                {"role": "assistant", "content": SENTENCES[index % len(SENTENCES)]},
            ]
        }
        for index in range(number)
    ]


def chats_about_images(folder: Path, number: int) -> str:
    """A jsonl file of LLaVA's form, with the pictures in files beside it."""
    folder.mkdir()
    data, rows = DigitQuestions("train", number), []
    for index in range(number):
        row = data[index]
        row["images"][0].save(folder / f"{index}.png")
        said = [message["content"] for message in row["messages"]]
        said[0] = "<image>\n" + said[0][1]["text"]
        chat = [{"from": ("human", "gpt")[turn % 2], "value": text} for turn, text in enumerate(said)]
        rows.append({"image": f"{index}.png", "conversations": chat})
    return jsonl(folder / "chats.jsonl", rows)
