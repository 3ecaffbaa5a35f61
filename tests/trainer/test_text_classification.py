"""Texts classified from a recipe: the embedded passages, a family's own weights, and what does not belong there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from laconic import Trace, stages_of
from laconic.data.rows import collate
from laconic.data.text.tokenizer import trained_tokenizer
from laconic.modules.cost.cost import CostModel
from laconic.trainer.build.build import build
from laconic.trainer.build.validate import validate
from laconic.trainer.errors import RecipeError
from laconic.trainer.evaluate import evaluate, inspect_run
from laconic.trainer.export.base import format_named
from laconic.trainer.export.capture import check_static
from laconic.trainer.export.card import facts, write_card
from laconic.trainer.export.export import export
from laconic.trainer.export.source import ExportSource, Settings
from laconic.trainer.measure.tables import cost_of_model, cost_of_recipe
from laconic.trainer.recipe.files import load
from laconic.trainer.run import train
from laconic.trainer.run_folder import RunFolder
from laconic.trainer.tasks.base import task_named
from tests.trainer.export_runs import written_run

pytestmark = pytest.mark.usefixtures("few_passages")
TINY = ["baselines=[]", "model.config.vocab_size=400", "model.config.num_attention_heads=2", "data.sequence_length=48"]


def test_a_run_is_evaluated_with_the_tokenizer_it_was_trained_with_and_shown(tmp_path: Path, quick: list[str], console: Console) -> None:
    overrides = [*quick, *TINY, "trainer.bench_rounds=2"]
    report = train(load("text_classify", overrides), overrides, console)
    run = tmp_path / "run"
    assert report.quality["metric"] == "accuracy"
    assert report.throughput["unit"] == "tokens"
    assert report.step_time["of_oracle"] is not None
    # Rows are of 24 to 48 tokens; the target is met for the longest.
    assert report.macs_ratio == pytest.approx(0.3, abs=0.06)
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert tokenizer("x = 1").input_ids[0] == tokenizer.cls_token_id
    again = evaluate(str(run), RunFolder.open(run).read_recipe(), console)
    assert again["variants"]["compressed"]["accuracy"] == report.quality["compressed"]
    assert set(again["variants"]) == {"compressed", "random", "uniform_grid", "dense"}
    shares = inspect_run(
        str(run), RunFolder.open(run).read_recipe(), "import asyncio\nloop = asyncio.new_event_loop()", tmp_path / "page.html"
    )
    assert 0 < shares["before_0"] < 1
    assert "<span" in (tmp_path / "page.html").read_text()


def test_card_and_cost_of_a_model_count_rows_of_its_own_length(tmp_path: Path, quick: list[str]) -> None:
    overrides = [*quick, *TINY, "data.sequence_length=192"]
    model = build(load("text_classify", overrides).recipe).model
    run = written_run(tmp_path / "run", model, "text_classify", *overrides)
    ratio = cost_of_recipe("text_classify", overrides)["macs_ratio"]
    assert ratio == CostModel(model, size=192)().macs_ratio
    # What the family is counted at where nothing says how long its texts are.
    assert abs(ratio - CostModel(model)().macs_ratio) > 1e-3
    for folder in (run, run / "model"):
        assert cost_of_model(str(folder))["macs_ratio"] == ratio
    source, form = ExportSource.open(str(run)), format_named("merged")
    write_card(source, form, Settings(), facts(source), form.usage(source.model), tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert f"| macs_ratio (MACs ÷ dense) | {ratio:.4f} requested" in card
    assert "pipeline_tag: text-classification" in card


@pytest.mark.slow
def test_a_graph_takes_rows_of_the_recipes_length(tmp_path: Path, quick: list[str]) -> None:
    """All sizes of a graph but the number of rows are fixed, and its cost is stated for this length."""
    overrides = [*quick, *TINY, "data.sequence_length=96"]
    model = build(load("text_classify_dense", overrides).recipe).model
    run = written_run(tmp_path / "run", model, "text_classify_dense", *overrides)
    record = export(str(run), str(tmp_path / "out"), "torch-export")
    assert record["input_shapes"] == {"input_ids": [96], "attention_mask": [96]}
    ids = torch.randint(300, (3, 96))
    graph = torch.export.load(tmp_path / "out" / "model.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(
            graph(input_ids=ids, attention_mask=torch.ones_like(ids)), model.eval()(ids).logits, atol=1e-5, rtol=1e-5
        )


def _bert(tmp_path: Path) -> Any:
    tokenizer = trained_tokenizer(["red green blue one two three"] * 20, 300, framed=True)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, pad_token_id=3
    )
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    rows = [{"first": "red green " * (1 + i % 5), "second": "one two", "label": ["yes", "no", "maybe"][i % 3]} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tokenizer


def _pairs(tmp_path: Path) -> list[str]:
    return [
        "model.config=null",
        f"model.name={tmp_path / 'bert'}",
        "data.name=json",
        f"data.data_files={tmp_path / 'rows.jsonl'}",
        "data.text_column=first",
        "data.second_text_column=second",
        "data.sequence_length=32",
        "data.batch_size=4",
        "trainer.max_steps=2",
        "budget.target=0.7",
        "baselines=[]",
    ]


def test_a_folder_of_weights_learns_pairs_with_their_segments(tmp_path: Path) -> None:
    _bert(tmp_path)
    parts = build(load("text_classify", _pairs(tmp_path)).recipe)
    assert type(parts.model).__name__ == "CompressedBertForSequenceClassification"
    assert parts.model.config.id2label == {0: "maybe", 1: "no", 2: "yes"}
    saved = BertForSequenceClassification.from_pretrained(tmp_path / "bert")
    assert torch.equal(parts.model.bert.embeddings.word_embeddings.weight, saved.bert.embeddings.word_embeddings.weight)
    batch = collate([parts.data.train[index] for index in range(4)])
    parts.model.eval()
    assert list(stages_of(parts.model)) == ["before_0"]
    trace = Trace()
    with_segments = task_named(parts.recipe.task).forward(parts.model, batch, trace=trace).logits
    without = (
        task_named(parts.recipe.task)
        .forward(parts.model, batch | {"token_type_ids": torch.zeros_like(batch["token_type_ids"])}, trace=Trace())
        .logits
    )
    assert not torch.equal(with_segments, without)
    assert trace.flow().valid is not None
    assert task_named(parts.recipe.task).amount(batch) == int(trace.flow().valid.sum())
    parts.model.train()
    task_named(parts.recipe.task).loss(parts.model, batch, trace=(taught := Trace())).backward()
    assert taught.auxiliary_loss is not None
    # Padded rows keep numbers of their own, under top-k too, and a graph needs one.
    with pytest.raises(RecipeError, match="in stage before_0 .*differs between rows.*use merged or standalone"):
        check_static(parts.model.eval(), task_named(parts.recipe.task).probe(parts.model.config, 32), "onnx")


MISTAKES = [
    (
        ["data.name=python_library"],
        r"is for text without labels \(task = causal_lm\), and task = text_classification .*: use python_passages",
    ),
    (
        ["data.name=scattered_digits"],
        "is for images .*, and task = text_classification has texts with one label each: use python_passages",
    ),
    (["data.mean=[0.5]"], r"data.mean is for images .*, and task = text_classification has texts with one label each: remove it"),
    (["data.streaming=true"], r"data.streaming is for text without labels \(task = causal_lm\)"),
    (["model.config.model_type=vit"], "vit has no sequence classifier in transformers"),
    (["model.config.model_type=llama"], "the 'llama' adapter does not serve LlamaForSequenceClassification"),
    (["data.sequence_length=4096"], "data.sequence_length = 4096 is more than the model's max_position_embeddings = 512"),
    (["data.name=json"], "needs data.data_files or data.data_dir"),
]


@pytest.mark.parametrize(("overrides", "message"), MISTAKES, ids=[item[0] for item, _ in MISTAKES])
def test_a_mistake_names_the_key_and_the_cure(overrides: list[str], message: str) -> None:
    if overrides[0].startswith("model.config.model_type"):
        overrides = [f"model.config={{model_type: {overrides[0].rpartition('=')[2]}}}"]
    with pytest.raises(ValueError, match=message):
        validate(load("text_classify", overrides).recipe)


def test_other_tasks_refuse_the_keys_of_pairs() -> None:
    for name in ("llm_pretrain_dense", "vit_digits"):
        with pytest.raises(ValueError, match=r"data.second_text_column is for texts with one label each \(task = text_classification\)"):
            validate(load(name, ["data.second_text_column=b"]).recipe)
