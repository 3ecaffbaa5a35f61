"""Language models: runs on the library and on chats, their tokenizers, and what is refused."""

from __future__ import annotations

import json
import math
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from laconic import Trace
from laconic.data.rows import collate
from laconic.trainer.build.build import build
from laconic.trainer.build.validate import validate
from laconic.trainer.errors import RecipeError
from laconic.trainer.evaluate import evaluate, inspect_run
from laconic.trainer.export.export import export
from laconic.trainer.measure.tables import cost_of_model
from laconic.trainer.recipe.files import load
from laconic.trainer.run import rehearse, train, train_arm
from laconic.trainer.run_folder import RunFolder
from laconic.trainer.tasks.base import task_named
from tests.data.texts import chats, jsonl, small_tokenizer
from tests.trainer.small_recipes import of_files
from tests.trainer.stopping import train_until

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.fixture
def tiny(quick: list[str]) -> list[str]:
    """Overrides that make a language model's recipe tiny."""
    unfit = ("data.train_samples", "data.eval_samples")
    return [
        *(item for item in quick if not item.startswith(unfit)),
        "model.config.vocab_size=400",
        "data.sequence_length=64",
        "data.train_samples=6",
        "data.eval_samples=2",
    ]


@pytest.mark.usefixtures("quick_exports")
def test_a_run_on_the_library_is_reported_evaluated_exported_and_generates(tmp_path: Path, tiny: list[str], console: Console) -> None:
    report = train(load("llm_pretrain_dense", tiny), tiny, console).to_dict()
    run = tmp_path / "run"
    assert json.loads((run / "report.json").read_text()) == json.loads(json.dumps(report))
    quality = report["quality"]
    assert (quality["metric"], quality["higher_is_better"], quality["split"]) == ("perplexity", False, "test")
    assert quality["dense"] == pytest.approx(math.exp(quality["loss"]))
    assert quality["bits_per_byte"] == pytest.approx(quality["loss"] * quality["tokens"] / math.log(2) / quality["bytes"])
    assert report["throughput"]["unit"] == "tokens"
    assert report["throughput"]["per_second"] > 0
    assert "tokens/s" in (run / "log.txt").read_text()
    evaluated = evaluate(str(run), RunFolder.open(run).read_recipe(), console)
    assert evaluated["variants"]["dense"]["perplexity"] == pytest.approx(quality["dense"], rel=1e-5)
    assert export(str(run), str(tmp_path / "out"))["max_abs_logit_diff"] <= 1e-5
    for folder in (run / "model", tmp_path / "out"):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        inputs = tokenizer("def main(", return_tensors="pt")
        assert model.config.eos_token_id == tokenizer.eos_token_id
        assert model.generate(**inputs, max_new_tokens=4, do_sample=False).shape[1] <= inputs["input_ids"].shape[1] + 4
    with pytest.raises(ValueError, match="is a dense model: every layer processes every token, so there is nothing to inspect"):
        inspect_run(str(run), RunFolder.open(run).read_recipe(), None, tmp_path / "page.html")


def test_a_trained_model_is_evaluated_with_its_own_tokenizer(tmp_path: Path, tiny: list[str], console: Console) -> None:
    train_arm(load("llm_pretrain_dense", tiny), "dense", tmp_path / "run", console)
    # As if another version of Python had trained another one meanwhile.
    recipe = RunFolder.open(tmp_path / "run").read_recipe(["data.train_samples=5"])
    parts = build(recipe)
    task = task_named(recipe.task)
    own = task.open_data(task.of_run(recipe, RunFolder.open(tmp_path / "run")), parts.model.config)
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").get_vocab() == own.tokenizer.get_vocab()  # type: ignore[attr-defined]
    assert parts.data.tokenizer.get_vocab() != own.tokenizer.get_vocab()  # type: ignore[attr-defined]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_resumed_run_on_text_ends_like_an_unbroken_one(
    tmp_path: Path, tiny: list[str], console: Console, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = [item for item in tiny if not item.startswith(("output", "trainer.max_steps"))]
    shared += ["trainer.max_steps=4", "data.batch_size=2", "model.config.attention_dropout=0.1"]
    if streaming:
        path = jsonl(tmp_path / "rows.jsonl", [{"text": f"Row {i} has a text of its own, number {i * i}." * 3} for i in range(40)])
        shared = [item for item in shared if not item.startswith("data.train_samples")]
        shared += ["data.name=json", f"data.data_files={path}", "data.streaming=true"]

    def weights(folder: Path, resume: str | None = None) -> dict[str, Tensor]:
        train_arm(load("llm_pretrain_dense", [*shared, f"output={folder}"]), "dense", folder, console, resume=resume)
        return load_file(folder / "model" / "model.safetensors")

    unbroken = weights(tmp_path / "whole")
    train_until(3, load("llm_pretrain_dense", [*shared, f"output={tmp_path / 'broken'}"]), tmp_path / "broken", console)
    resumed = weights(tmp_path / "broken", resume="auto")
    assert all(torch.equal(value, resumed[name]) for name, value in unbroken.items())


def test_a_routed_run_is_evaluated_as_deployed_and_looking_ahead_and_shown(
    tmp_path: Path, tiny: list[str], console: Console, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    deep = [item for item in tiny if "num_hidden_layers" not in item]
    overrides = [*deep, "model.config.num_hidden_layers=3", "baselines=[]", "budget.target=0.8"]
    overrides += ["compression.stages=[{layer: 1, site: around, scorer: linear, selector: predictor}]"]
    report = train(load("llm_pretrain", overrides), overrides, console)
    run = str(tmp_path / "run")
    variants = evaluate(run, RunFolder.open(run).read_recipe(), console)["variants"]
    assert set(variants) == {"compressed", "lookahead", "random", "uniform_grid", "dense"}
    assert variants["compressed"]["perplexity"] == pytest.approx(report.quality["compressed"], rel=1e-4)
    # Top-k of every document; the predictor's threshold meets it on average alone.
    assert variants["lookahead"]["keep"]["around_1"] == pytest.approx(report.keep["requested"]["around_1"], abs=0.05)
    kept = inspect_run(run, RunFolder.open(run).read_recipe(), "if so: pass", tmp_path / "page.html")
    assert set(kept) == {"around_1"}
    assert (tmp_path / "page.html").read_text().count("<span style") == len(
        AutoTokenizer.from_pretrained(tmp_path / "run" / "model")("if so: pass")["input_ids"]
    )
    monkeypatch.setattr(sys, "argv", ["decoding", run, "--prompt", "32", "--new", "3", "--rounds", "2", "--batch", "1", "2"])
    runpy.run_path(str(ROOT / "scripts" / "decoding"), run_name="__main__")
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown[1:]] == ["rows", "1", "2"]
    assert "32 tokens of a prompt, 3 new ones" in shown[0]


def test_a_gate_stays_with_the_weights(tmp_path: Path, tiny: list[str], console: Console) -> None:
    """At full length too, for whoever goes on from it, and beside the choice of a control."""
    deep = [item for item in tiny if "num_hidden_layers" not in item]
    stage = "{layer: 1, site: around, scorer: linear, selector: threshold, estimator: {name: gate, start: 1}}"
    overrides = [*deep, "model.config.num_hidden_layers=3", "baselines=[]", f"compression.stages=[{stage}]"]
    ends_whole = ["budget={measure: keep, schedule: linear, start: 0.5, target: 1.0, schedule_until: 0.5}"]
    train(load("llm_pretrain", [*overrides, *ends_whole]), overrides, console)
    run = str(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["compression"] is not None
    variants = evaluate(run, RunFolder.open(run).read_recipe(), console)["variants"]
    # Every token goes through, and the gate is the same: so is the answer.
    assert variants["random"]["perplexity"] == pytest.approx(variants["compressed"]["perplexity"])
    assert variants["dense"]["perplexity"] != pytest.approx(variants["compressed"]["perplexity"])
    without = stage.replace(", estimator: {name: gate, start: 1}", "")
    going_on = [item for item in overrides if not item.startswith(("model.config", "compression"))]
    with pytest.raises(RecipeError, match="its estimator differ from those that"):
        build(load("llm_pretrain", [*going_on, f"model={{name: {run}}}", f"compression.stages=[{without}]"]).recipe)


def test_filler_is_no_token_of_a_stage(tiny: list[str]) -> None:
    deep = [item for item in tiny if "num_hidden_layers" not in item]
    stage = "compression.stages=[{layer: 1, site: around, scorer: linear, selector: predictor, protect: {first: 0}}]"
    parts = build(load("llm_pretrain", [*deep, "model.config.num_hidden_layers=3", "baselines=[]", "budget.target=0.8", stage]).recipe)
    last = collate([parts.data.validation[len(parts.data.validation) - 1]])  # type: ignore[arg-type]
    assert last["tokens"] < 64
    trace = Trace(lookahead=True)
    task_named(parts.recipe.task).forward(parts.model.eval(), last, trace=trace)
    assert trace.routings["around_1"].counts()[1] == last["tokens"]


def _chat_model(folder: Path) -> str:
    tokenizer = small_tokenizer(template=True)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    LlamaForCausalLM(LlamaConfig(**TINY, **ids, vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_shorter_prompts_are_evaluated_and_shown(tmp_path: Path, console: Console) -> None:
    overrides = [
        f"model.name={_chat_model(tmp_path / 'model')}",
        f"data.data_files={jsonl(tmp_path / 'chats.jsonl', chats(32))}",
        "data.sequence_length=128", "data.batch_size=2", "trainer.precision=fp32", "trainer.max_epochs=null", "trainer.max_steps=2",
        "trainer.bench_rounds=0", f"output={tmp_path / 'run'}",
        "compression={stages: [{layer: 1, scorer: random, scope: prompt, keep: 0.5}], restore: {layer: 2, by: rejoin}}",
    ]  # fmt: skip
    train(load("llm_finetune", overrides), overrides, console)
    run = str(tmp_path / "run")
    variants = evaluate(run, RunFolder.open(run).read_recipe(), console)["variants"]
    assert set(variants) >= {"compressed", "random", "uniform_grid", "dense"}
    kept = inspect_run(run, RunFolder.open(run).read_recipe(), "Who slept in the house?", tmp_path / "page.html")
    assert 0.3 < kept["before_1"] < 0.8


@pytest.mark.slow
def test_answers_of_chats_are_learned_from_a_folder(tmp_path: Path, console: Console) -> None:
    overrides = [
        f"model.name={_chat_model(tmp_path / 'model')}",
        f"data.data_files={jsonl(tmp_path / 'chats.jsonl', chats(32))}",
        "data.sequence_length=128",
        "data.batch_size=2",
        "trainer.precision=fp32",
        "trainer.max_epochs=12",
        "optimizer.lr=1e-2",
        f"output={tmp_path / 'run'}",
    ]
    report = train(load("llm_finetune", overrides), overrides, console)
    assert report.quality["dense"] < 20
    again = build(
        load("llm_finetune", [item.replace(str(tmp_path / "model"), str(tmp_path / "run" / "model")) for item in overrides]).recipe
    )
    assert again.data.tokenizer.chat_template == small_tokenizer(template=True).chat_template  # type: ignore[attr-defined]


def test_a_dry_run_and_a_validation_name_what_they_found(tiny: list[str], console: Console) -> None:
    assert rehearse(load("llm_pretrain_dense", tiny), tiny, console)["llm_pretrain_dense"]["loss"] > 0
    checked = validate(load("llm_pretrain_dense", tiny).recipe)
    assert checked.parameters == sum(p.numel() for p in build(load("llm_pretrain_dense", tiny).recipe).model.parameters())
    assert checked.train_rows is not None
    assert checked.macs_ratio == 1


def test_the_module_weighs_its_loss_by_the_tokens_of_all_ranks(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parts = build(load("llm_pretrain_dense", tiny).recipe)
    module, batch = task_named(parts.recipe.task).module(parts), collate([parts.data.train[index] for index in range(4)])
    alone = float(module.losses(batch)["loss"])
    assert alone == pytest.approx(float(task_named(parts.recipe.task).loss(parts.model, batch)))
    # Another rank predicts three times as many: its mean counts three times as much.
    monkeypatch.setattr("laconic.trainer.distributed.collective.world_size", lambda: 2)
    monkeypatch.setattr("laconic.trainer.distributed.collective.total", lambda counts: [4 * count for count in counts])
    assert float(module.losses(batch)["loss"]) == pytest.approx(alone / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.augmentation=flip"], r"data.augmentation is for images .*, and task = causal_lm has text without labels: remove it"),
        (["data.canvas.size=40"], r"data.canvas is for images"),
        (["distillation={teacher: dense_self}"], "is for image classifiers, and task = causal_lm"),
        (
            ["data.name=scattered_digits"],
            r"data.name = 'scattered_digits' is for images .*: use python_library, python_functions, text, json",
        ),
        (["data.streaming=true"], "python_library, which is small and local"),
        (["data.sample_by=line"], "data.sample_by = 'line' applies to data.name = 'text', and data.name = 'python_library'"),
        (["data.name=json"], "data.name = 'json' needs data.data_files or data.data_dir"),
        (["data.sequence_length=4096"], "data.sequence_length = 4096 is more than the model's max_position_embeddings = 1024"),
        (["model.config={model_type: vit}"], "vit has no causal language model in transformers: use llama"),
        (["data.tokenizer=nowhere"], "data.tokenizer = 'nowhere' cannot be loaded"),
    ],
)
def test_what_language_models_do_not_have_is_refused_with_the_cure(overrides: list[str], message: str, tiny: list[str]) -> None:
    with pytest.raises(ValueError, match=message):
        validate(load("llm_pretrain_dense", [*(of_files(tiny) if "data.name=json" in overrides else tiny), *overrides]).recipe)


@pytest.mark.parametrize("parts", ["scorer: linear, selector: top_k", "scorer: learned, selector: threshold"])
def test_what_cannot_be_deployed_is_refused_before_it_is_trained(parts: str, tiny: list[str]) -> None:
    deep = [*(item for item in tiny if "num_hidden_layers" not in item), "model.config.num_hidden_layers=3"]
    stage = f"compression={{stages: [{{layer: 1, site: around, {parts}}}]}}"
    with pytest.raises(ValueError, match="stages around_1 are non-causal.*scorer 'linear' and selector 'threshold'"):
        validate(load("llm_pretrain_dense", [*deep, stage, "budget={measure: keep, target: 0.5}"]).recipe)
    # At full length nothing is chosen any more.
    ends_whole = "budget={measure: keep, target: 1, start: 0.5, schedule: linear}"
    assert validate(load("llm_pretrain_dense", [*deep, stage, ends_whole]).recipe).keep == {"around_1": 1}


def test_keys_of_text_are_refused_for_images_and_a_tokenizer_must_fit(tmp_path: Path, tiny: list[str]) -> None:
    with pytest.raises(ValueError, match=r"data.sequence_length is for text .*, and task = image_classification has images .*: remove it"):
        validate(load("vit_digits", ["data.sequence_length=64"]).recipe)
    small_tokenizer().save_pretrained(tmp_path / "tokenizer")
    fit = [*tiny, f"data.tokenizer={tmp_path / 'tokenizer'}"]
    assert build(load("llm_pretrain_dense", fit).recipe).data.tokenizer.get_vocab() == small_tokenizer().get_vocab()  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"the tokenizer has 320 entries and the model 310: set model.config.vocab_size=320 or more"):
        build(load("llm_pretrain_dense", [*fit, "model.config.vocab_size=310"]).recipe)
    rows = jsonl(tmp_path / "rows.jsonl", [{"text": "One row of text."}] * 20)
    stream = ["data.name=json", f"data.data_files={rows}", "data.streaming=true", "trainer.max_steps=null", "trainer.max_epochs=1"]
    fit = [item for item in fit if not item.startswith("data.train_samples")]
    with pytest.raises(ValueError, match="trainer.max_epochs needs the number of training rows"):
        validate(load("llm_pretrain_dense", [*fit, *stream]).recipe)


def test_layers_with_windows_add_up_to_the_cost_of_the_model(tmp_path: Path) -> None:
    MistralForCausalLM(MistralConfig(**TINY, vocab_size=97, sliding_window=5)).save_pretrained(tmp_path)
    cost = cost_of_model(str(tmp_path))
    assert len({row["macs"] for row in cost["layers"]}) == 1
    for total, each in (("macs", "macs"), ("dense_macs", "dense_macs")):
        assert sum(row[each] for row in cost["layers"]) + cost["embed_macs"] + cost["head_macs"] == pytest.approx(cost[total], rel=1e-6)


def test_the_columns_that_are_read_are_in_the_log_and_in_a_validation(tmp_path: Path, tiny: list[str], console: Console) -> None:
    rows = [{"body": f"Row {index} has a text of its own.", "score": index} for index in range(40)]
    data = ["data.name=json", f"data.data_files={jsonl(tmp_path / 'rows.jsonl', rows)}", "data.batch_size=2"]
    note = "data: texts of column 'body', guessed because it is the only one that fits: data.text_column names another; not read: score"
    recipe = load("llm_pretrain_dense", [*of_files(tiny), *data])
    assert validate(recipe.recipe).remarks == [note]
    train_arm(recipe, "dense", tmp_path / "run", console)
    assert note in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize("streaming", [True, False])
def test_a_run_whose_file_has_grown_goes_on_with_its_own_tokenizer(
    tmp_path: Path, tiny: list[str], console: Console, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    rows = [{"text": f"Row {i} has a text of its own, number {i * i}." * 3} for i in range(40)]
    unfit = ("output", "trainer.max_steps", "data.train_samples", *(() if streaming else ("data.eval_samples",)))
    shared = [item for item in tiny if not item.startswith(unfit)]
    shared += ["trainer.max_steps=4", "trainer.checkpoint_every=2", "data.batch_size=2", "data.name=json", f"output={tmp_path / 'run'}"]
    shared += [f"data.data_files={jsonl(tmp_path / 'rows.jsonl', rows)}", f"data.streaming={str(streaming).lower()}"]
    monkeypatch.setattr("laconic.trainer.callbacks.checkpoints.remove_checkpoint", lambda path: None)
    run, recipe = RunFolder(tmp_path / "run"), load("llm_pretrain_dense", shared)
    whole = train_arm(recipe, "dense", run.path, console).parts.data.tokenizer.get_vocab()  # type: ignore[attr-defined]
    # As if it had been killed after its second step.
    (run.checkpoints / "4.ckpt").unlink()
    shutil.rmtree(run.path / "model")
    jsonl(tmp_path / "rows.jsonl", [*rows, *({"text": f"Quite other words grow here: {i} zebras quarrel." * 9} for i in range(400))])
    assert build(recipe.recipe).data.tokenizer.get_vocab() != whole  # type: ignore[attr-defined]
    if not streaming:
        with pytest.raises(RecipeError, match="the data have changed since the checkpoint was saved, in train, validation, test"):
            train_arm(recipe, "dense", run.path, console, resume="auto")
        return
    again = train_arm(recipe, "dense", run.path, console, resume="auto").parts.data.tokenizer  # type: ignore[attr-defined]
    assert again.get_vocab() == whole
    assert AutoTokenizer.from_pretrained(run.path / "model").get_vocab() == whole
    # Without the tokenizer the run is refused: its ids would mean other words.
    (run.checkpoints / "4.ckpt").unlink()
    shutil.rmtree(run.path / "model")
    shutil.rmtree(run.data)
    with pytest.raises(RecipeError, match="the data have changed since the checkpoint was saved, in validation, test: restore the files"):
        train_arm(recipe, "dense", run.path, console, resume="auto")


def test_a_checkpoint_of_an_unfinished_run_is_a_start_with_the_runs_tokenizer(tmp_path: Path, tiny: list[str], console: Console) -> None:
    first = train_arm(load("llm_pretrain_dense", tiny), "dense", tmp_path / "run", console).parts.data
    shutil.rmtree(tmp_path / "run" / "model")
    overrides = [item for item in tiny if not item.startswith("model.config")]
    start = f"model={{name: {tmp_path / 'run' / 'checkpoints' / '2.ckpt'}}}"
    going_on = build(load("llm_pretrain_dense", [*overrides, start, "data.train_samples=5"]).recipe).data
    assert going_on.tokenizer.get_vocab() == first.tokenizer.get_vocab()  # type: ignore[attr-defined]


def test_new_tokens_on_loaded_weights_are_added_by_key(tmp_path: Path, console: Console) -> None:
    tokenizer = small_tokenizer(template=True)
    before: Any = LlamaForCausalLM.from_pretrained(_chat_model(tmp_path / "model"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
    tokenizer.save_pretrained(tmp_path / "longer")
    overrides = [
        f"model.name={tmp_path / 'model'}", f"data.tokenizer={tmp_path / 'longer'}", "data.sequence_length=128", "data.batch_size=2",
        f"data.data_files={jsonl(tmp_path / 'chats.jsonl', chats(32))}", "trainer.precision=fp32", "trainer.max_epochs=null",
        "trainer.max_steps=2", "trainer.bench_rounds=0", "optimizer.lr=1e-9", "optimizer.weight_decay=0", f"output={tmp_path / 'run'}",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"the tokenizer has 322 entries and the model 320: set model.resize_vocabulary=true"):
        validate(load("llm_finetune", overrides).recipe)
    grown = [*overrides, "model.resize_vocabulary=true"]
    assert validate(load("llm_finetune", grown).recipe).parameters == sum(p.numel() for p in before.parameters()) + 2 * 2 * 32
    train_arm(load("llm_finetune", grown), "arm", tmp_path / "run", console)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert after.config.vocab_size == 322
    for old, new in ((before.get_input_embeddings(), after.get_input_embeddings()), (before.lm_head, after.lm_head)):
        torch.testing.assert_close(new.weight[:320], old.weight, atol=1e-6, rtol=0)
        assert bool(torch.isfinite(new.weight[320:]).all())
    with pytest.raises(RecipeError, match="changes weights that lora.mode = 'lora' freezes: resize them once in Python"):
        validate(load("llm_finetune", [*grown, "lora={r: 2}"]).recipe)
    with pytest.raises(ValueError, match="model.resize_vocabulary = true needs model.name"):
        load("llm_pretrain_dense", ["model.resize_vocabulary=true"])
