"""Long prompts with short answers: the embedded questions about functions, and prompts from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from laconic.data.embedded.function_prompts import FACTS, known_functions
from laconic.data.rows import BadRows, collate
from laconic.data.source import DataSource, SplitNames
from laconic.data.text.prompt_splits import PromptData, hub_prompts
from laconic.data.text.prompts import THIRDS, FunctionPrompts, kinds_of
from laconic.data.text.splits import TextSettings
from tests.data.texts import jsonl, small_tokenizer

NO = -100
SOURCE = '''
class Box:
    def open(self, key, slowly="yes, slowly"):
        """Opens."""
        if key is None:
            return None
        return key

    def size(self):
        return self.width * 2

    def __len__(self, key):
        return self.width * 3


def find(name, place):
    yield name


def at(name, place=None): return name
'''


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A library of files whose functions have names of their own."""
    folder = tmp_path / "library"
    folder.mkdir()
    for number in range(60):
        text = "".join(f"def f{number}_{at}(x, y{at}={number}.{at}):\n    return x + {number * at + 2}\n\n" for at in range(6))
        (folder / f"m{number}.py").write_text(text)
    (folder / "broken.py").write_text("def :")
    return folder


def _prompts(library: Path, split: str = "train", **settings: Any) -> FunctionPrompts:
    given = {"lengths": (360, 640), "questions": 2, "rows": 12, "seed": 3, **settings}
    return FunctionPrompts(known_functions(split, root=library), small_tokenizer(), **given)


def test_facts_go_on_with_a_functions_beginning_and_are_no_guess(tmp_path: Path) -> None:
    # The name of a file decides its split.
    for number in range(9):
        (tmp_path / f"{number}.py").write_text(SOURCE)
    found = {function.name: function for function in known_functions("train", limit=5, root=tmp_path)}
    assert {(fact.kind, fact.question, fact.answer) for function in found.values() for fact in function.facts} == {
        ("default", "def open(self, key, slowly=", '"yes, slowly"):'),
        ("parameter", "def find(name,", " place):"),
        ("returned", "def size(self):\n    return", " self.width * 2\n"),
    }
    assert set(FACTS) == {"returned", "parameter", "default"}
    assert found["size"].source == "def size(self):\n    return self.width * 2"
    assert set(found) == {"open", "size", "__len__", "find", "at"}


def test_a_prompt_has_the_function_that_it_asks_about_where_its_kind_says(library: Path) -> None:
    rows, tokenizer = _prompts(library), small_tokenizer()
    for index in range(len(rows)):
        row = rows[index]
        ids, answer = row["input_ids"], row["turns"] >= 0
        kind = kinds_of((360, 640))[int(row["kinds"])]
        length, third = int(kind.split()[0]), THIRDS.index(kind.partition(", ")[2])
        assert length * 0.6 < len(ids) <= length == (360, 640)[index // 2 % 2]
        assert torch.equal(row["labels"] == NO, torch.arange(len(ids)) < int(answer.nonzero()[0]))
        assert (int(row["labels"][-1]), int(row["turns"][-1])) == (tokenizer.eos_token_id, -1)
        context, example, question = tokenizer.decode(ids[~answer]).removesuffix(tokenizer.eos_token).rsplit("\n\n", 2)
        told = tokenizer.decode(ids[answer])
        assert rows.asked(index) == [(question, told.strip())]
        name = question.split("(")[0].removeprefix("def ")
        (source,) = [part for part in context.split("\n\ndef ") if part.startswith(f"{name}(")]
        assert f"def {source}\n".startswith(question + told)
        assert not example.startswith(f"def {name}("), "the example answers another question"
        start = len(tokenizer(context[: context.index(f"\n\ndef {name}(")], add_special_tokens=False)["input_ids"])
        whole = len(tokenizer(context, add_special_tokens=False)["input_ids"])
        # A boundary may fall between tokens that the pieces do not have.
        assert any(min(2, int(3 * (start + slip) / whole)) == third for slip in (-3, 0, 3))


def test_rows_are_the_same_every_time_and_questions_in_a_row_share_their_functions(library: Path) -> None:
    rows, again = _prompts(library), _prompts(library)
    assert all(torch.equal(rows[index]["input_ids"], again[index + 12]["input_ids"]) for index in range(12))
    first, second, other = (rows[index]["input_ids"] for index in (0, 1, 4))
    shared = int((first[: len(second)] != second[: len(first)]).nonzero()[0])
    assert shared > 60
    assert not torch.equal(first[:20], other[:20])
    assert not torch.equal(_prompts(library, seed=4)[0]["input_ids"][:20], first[:20])


def test_no_function_is_in_two_splits_and_lengths_without_functions_are_refused(library: Path) -> None:
    names = [{function.name for function in known_functions(split, root=library)} for split in ("train", "validation", "test")]
    assert len(set.union(*names)) == sum(map(len, names)) == 360
    with pytest.raises(ValueError, match="data.lengths has 64, and too few functions of the library have so few tokens"):
        _prompts(library, lengths=(64,), questions=16)


def _files(tmp_path: Path, rows: list[dict[str, Any]], allowed: float = 0.0, length: int = 64) -> PromptData:
    source = DataSource("json", None, jsonl(tmp_path / "rows.jsonl", rows), None, None)
    names = SplitNames("train", None, None, 0.5)
    return hub_prompts(source, names, lambda _: small_tokenizer(template=True), TextSettings(length, max_bad_fraction=allowed))


@pytest.mark.parametrize("chat", [False, True])
def test_prompts_of_files_have_a_row_each_and_number_their_answers(tmp_path: Path, chat: bool) -> None:
    said = [{"role": "user", "content": "Who slept?"}, {"role": "assistant", "content": "A fox."}]
    rows = [{"messages": [*said, *said]} if chat else {"prompt": "Who slept?", "completion": " A fox."} for _ in range(6)]
    data = _files(tmp_path, rows)
    batch = collate([data.train[0], data.validation[0]])  # type: ignore[index]
    assert sorted(set(batch["turns"].flatten().tolist())) == ([-1, 0, 1] if chat else [-1, 0])
    assert torch.equal(batch["turns"] >= 0, batch["labels"] != NO)
    asked: Any = data.train
    assert [(question.count("Who slept?"), "A fox." in answer) for question, answer in asked.asked(0)] == [(1, True)] * (1 + chat)
    assert data.tokenizer.decode(batch["input_ids"][0][batch["turns"][0] == 0]).strip() == f"A fox.{data.tokenizer.eos_token}"


def test_long_rows_and_texts_without_prompts_are_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "Who slept? " * (1 + 20 * (at == 1)), "completion": " A fox."} for at in range(4)]
    with pytest.raises(BadRows, match="row longer than data.sequence_length"):
        _files(tmp_path, rows)
    with pytest.raises(ValueError, match="has texts without prompts.*give columns prompt and completion.*task=causal_lm"):
        _files(tmp_path, [{"text": "Nobody."} for _ in range(4)])
