"""Short answers to long prompts: what is counted is what generation gives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from laconic import CompressionConfig, StageConfig, Trace, compress
from laconic.data.text.prompts import kinds_of
from laconic.trainer.losses.answer_loss import AnswerLoss
from laconic.trainer.metrics.prompt_accuracy import PromptAccuracy
from laconic.trainer.tasks.base import task_named
from tests.matrix.decoders import dense, spread, tokens

NEW = 4
SCORERS: list[tuple[str, dict[str, Any]]] = [
    ("last_query", {}),
    ("learned", {}),
    ("uniform_grid", {}),
    ("query_similarity", {}),
    ("update", {"site": "around"}),
    ("random", {}),
]


def _batch(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Prompts with their answers, padded at the end; the token after an answer is learned and no part of it."""
    ids = [torch.cat([prompt, answer, torch.tensor([5])]) for prompt, answer in rows]
    turns = [torch.tensor([-1] * len(prompt) + [0] * len(answer) + [-1]) for prompt, answer in rows]
    labels = [torch.where(torch.arange(len(row)) < len(prompt), -100, row) for row, (prompt, _) in zip(ids, rows, strict=True)]
    padded = {
        "input_ids": pad_sequence(ids, True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True),
        "labels": pad_sequence(labels, True, -100),
        "turns": pad_sequence(turns, True, -1),
    }
    return padded | {"kinds": torch.tensor([[0], [4], [0]][: len(rows)]), "sample_ids": torch.arange(len(rows))}


@pytest.mark.parametrize(("scorer", "settings"), SCORERS, ids=[name for name, _ in SCORERS])
def test_the_answers_that_count_as_right_are_those_that_are_generated(scorer: str, settings: dict[str, Any]) -> None:
    stage = StageConfig(layer=1, keep=0.4, scope="prompt", scorer=scorer, protect={"first": 1, "last": 3}, **settings)
    model, task = spread(compress(dense("llama"), CompressionConfig([stage]))), task_named("prompt_answers")
    prompts = [tokens(1, length, seed=length)[0] for length in (22, 17, 20)]
    made = [model.generate(prompt[None], max_new_tokens=NEW, do_sample=False)[0, len(prompt) :] for prompt in prompts]
    # The draws of a random scorer are those of a row's number, which is 0 for each in generation.
    batches = (
        [_batch([row]) for row in zip(prompts, made, strict=True)]
        if scorer == "random"
        else [_batch(list(zip(prompts, made, strict=True)))]
    )

    def accuracy(changed: bool) -> float:
        quality = PromptAccuracy()
        for batch in batches:
            given = {name: value.clone() for name, value in batch.items()}
            if changed:
                last = (given["turns"][0] == 0).nonzero()[-1]
                given["input_ids"][0, last] = given["labels"][0, last] = 2 + (given["input_ids"][0, last] == 2)
            trace = Trace(sample_ids=given["sample_ids"])
            quality.add(task.forward(model, given, trace=trace), given)
            kept, present = trace.routings[stage.key].counts()
            # A count for each row.
            assert kept / present == pytest.approx(0.4, abs=0.03)
        return quality.value

    assert accuracy(False) == 1
    # One token of one answer is another one.
    assert accuracy(True) == (0 if scorer == "random" else pytest.approx(2 / 3))


def test_accuracy_is_reported_by_length_and_by_place() -> None:
    quality, kinds = PromptAccuracy(), kinds_of([256, 512])
    right = torch.tensor([True, True, False, True, False])
    # The last token of row 1 is learned and no part of its answer.
    out = AnswerLoss(
        torch.tensor(10.0), torch.zeros(5, 3), right, torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 0, 0, 0, -1]), torch.zeros(5, 2)
    )
    quality.add(out, {"kinds": torch.tensor([[0], [4], [3]]), "sample_ids": torch.arange(3)})
    data: Any = SimpleNamespace(kinds=kinds, test=SimpleNamespace(asked=lambda row: [("What?", f"{row}.")]))
    found = quality.details(data)
    assert found["loss"] == pytest.approx(2.0)
    assert found["answers"] == {
        "256 tokens": {"accuracy": 1.0, "answers": 1},
        "first third": {"accuracy": 1.0, "answers": 2},
        "512 tokens": {"accuracy": 0.5, "answers": 2},
        "middle third": {"accuracy": 0.0, "answers": 1},
    }
    assert [(answer.row, answer.kind, answer.right, answer.reference) for answer in quality.answered(data)] == [
        (0, "256 tokens, first third", True, "0."),
        (1, "512 tokens, middle third", False, "1."),
        (2, "512 tokens, first third", True, "2."),
    ]
