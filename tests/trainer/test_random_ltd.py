"""random-LTD: fewer tokens in the middle layers while it trains, and an ordinary model afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from laconic import stages_of
from laconic.data.rows import collate
from laconic.trainer.build.build import build
from laconic.trainer.evaluate import evaluate
from laconic.trainer.recipe.files import load
from laconic.trainer.run import _leaves_unused, train
from laconic.trainer.run_folder import RunFolder
from laconic.trainer.tasks.base import task_named

TINY = [
    "baselines=[]",
    "data.sequence_length=32",
    "budget.increment=0.25",
    "model.config.num_hidden_layers=8",
    "model.config.num_attention_heads=2",
    "model.config.num_key_value_heads=2",
    "model.config.vocab_size=400",
    "trainer.max_steps=8",
    "data.train_samples=6",
    "data.eval_samples=1",
]


def _quick(quick: list[str]) -> list[str]:
    return [*quick, *TINY]


def test_every_middle_layer_draws_its_own_tokens_as_many_as_the_schedule_says(quick: list[str]) -> None:
    parts = build(load("llm_random_ltd", _quick(quick)).recipe)
    assert parts.budget is not None
    batch = collate([parts.data.train[index] for index in range(4)])
    # One document a row, so that a row has one count.
    batch = batch | {"position_ids": torch.arange(32).expand(4, -1), "documents": torch.zeros(4, 32, dtype=torch.long)}
    parts.model.train()
    processed = []
    for step in range(8):
        trace = parts.budget.trace(step, batch["sample_ids"])
        task_named(parts.recipe.task).loss(parts.model, batch, trace=trace).backward()
        kept = [routing.kept_mask for routing in trace.routings.values()]
        counts = {int(count) for mask in kept for count in mask.sum(-1)}
        assert len(counts) == 1
        processed.append(counts.pop())
        if processed[-1] < 32:
            assert not any(torch.equal(kept[0], other) for other in kept[1:])
        assert [trace.flow().layer_tokens[index].attention for index in (0, 7)] == [32, 32]
    # From a quarter on, a stair of a quarter at a time; the whole after 5.6 of 8 steps.
    assert processed == [8, 8, 16, 16, 24, 24, 32, 32]


def test_the_trained_model_is_an_ordinary_one_that_answers_as_the_run_was_evaluated(
    tmp_path: Path, quick: list[str], console: Console
) -> None:
    overrides = [*_quick(quick), "trainer.bench_rounds=2"]
    report = train(load("llm_random_ltd", overrides), overrides, console)
    folder = tmp_path / "run" / "model"
    plain, loaded = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(plain) is LlamaForCausalLM
    assert not any(loaded.values())
    assert "compression" not in json.loads((folder / "config.json").read_text())
    again = evaluate(str(tmp_path / "run"), RunFolder.open(tmp_path / "run").read_recipe(), console)
    assert list(again["variants"]) == ["dense"]
    assert again["variants"]["dense"]["perplexity"] == report.quality["compressed"]
    # Fewer tokens in training alone, and the report says so.
    assert report.macs_ratio == 1.0
    assert report.train_macs_ratio is not None
    assert report.train_macs_ratio < 0.9
    # There is no step of a compressed model left to measure.
    assert report.step_time["paired"] is None


def test_evaluation_is_at_full_length_and_bit_equal_to_the_model_without_stages(quick: list[str]) -> None:
    parts = build(load("llm_random_ltd", _quick(quick)).recipe)
    plain = build(load("llm_pretrain_dense", [item for item in _quick(quick) if not item.startswith("budget")]).recipe)
    batch = collate([parts.data.test[index] for index in range(4)])
    model = parts.model.eval()
    ids = {key: batch[key] for key in ("input_ids", "position_ids")}
    assert len(stages_of(model)) == 6
    assert torch.equal(model(**ids).logits, plain.model.eval()(**ids).logits)
    assert model.generate(batch["input_ids"][:2, :5], max_new_tokens=3, do_sample=False).shape == (2, 8)


def test_a_stair_larger_than_the_target_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"budget.increment = 2.0 must be in \[0, 1\)"):
        load("llm_random_ltd", ["budget.increment=2"])


@pytest.mark.parametrize(
    ("budget", "unused"),
    [
        ("{measure: keep, target: 1, start: 0.5, schedule: step, schedule_until: 0.5}", True),
        ("{measure: keep, target: 0.5, schedule: linear}", True),
        ("{measure: keep, target: 0.5, start: 0.75, schedule: linear}", False),
    ],
)
def test_ranks_are_told_of_a_predictor_that_trains_nothing_at_full_length(
    budget: str, unused: bool, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = "compression={stages: [{layer: 1, scorer: learned, selector: predictor}]}"
    parts = build(load("vit_digits_dense", [*quick, stages, f"budget={budget}"]).recipe)
    module = task_named(parts.recipe.task).module(parts)
    # DDP crashes in the first step that leaves a parameter without gradient, unless it was told.
    without = set()
    for step in range(2):
        monkeypatch.setattr(type(module), "global_step", step)
        parts.model.zero_grad(set_to_none=True)
        parts.model.train()
        module.losses(collate([parts.data.train[index] for index in range(4)]))["loss"].backward()
        without |= {name for name, parameter in parts.model.named_parameters() if parameter.grad is None}
    assert bool(without) == unused
    monkeypatch.setattr(type(module), "global_step", 0)
    monkeypatch.setattr("laconic.trainer.run.collective", SimpleNamespace(world_size=lambda: 2))
    assert _leaves_unused(module, parts) == unused
