"""Phases of training that leave an ordinary model: bags of tokens, and stages that act in a part of the steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from laconic.data.rows import BadRowCount, collate
from laconic.data.text.packing import Corpus, PackedRows, Tokens
from laconic.data.text.splits import TextData
from laconic.modules.tokens.labels import IGNORE_TOKEN
from laconic.trainer.build.build import build
from laconic.trainer.build.opened_data import check_rows
from laconic.trainer.build.validate import validate
from laconic.trainer.compare.arms import arms_of
from laconic.trainer.measure.phase_costs import mean_phase_ratio
from laconic.trainer.measure.results import training_ratio
from laconic.trainer.recipe.baselines import load_baselines
from laconic.trainer.recipe.files import load
from laconic.trainer.recipe.phases import PhasePlan, PhaseRecipe
from laconic.trainer.run import train, train_arm
from laconic.trainer.tasks.causal_lm import CausalLM
from tests.trainer.stopping import train_until

TEXT = [
    "baselines=[]",
    "model.config.vocab_size=400",
    "data.sequence_length=32",
    "data.train_samples=6",
    "data.eval_samples=1",
    "data.batch_size=2",
]


def _text(quick: list[str]) -> list[str]:
    return [*(item for item in quick if not item.startswith("data.")), *TEXT]


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=40, tie_word_embeddings=True, initializer_range=0.3, **sizes)
    return LlamaForCausalLM(config).double()


def _batch(bag: int | None, prompts: bool = False) -> dict[str, Any]:
    """Two rows of 8 places of four documents, of which the later ones have prompts that are not learned."""
    draws = np.random.default_rng(0)
    lengths = np.asarray([11, 9, 6, 5])
    ids = draws.integers(0, 40, lengths.sum()).astype(np.int32)
    learned = [np.arange(lengths.sum()) % 5 != 0] if prompts else None
    rows = PackedRows(Corpus([ids], lengths, learned), Tokens(8, 0, np.ones(40, np.int64)), whole=False)
    rows = rows if bag is None else rows.with_bags(bag)
    return collate([rows[index] for index in range(2)])


def _gradients(model: LlamaForCausalLM, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def _reference(model: LlamaForCausalLM, batch: dict[str, Any]) -> Tensor:
    """Mean of -log p of each token of the next bag, one document of one row at a time, with a model that no documents are packed for."""
    losses = []
    for ids, labels, documents in zip(batch["input_ids"], batch["labels"], batch["documents"], strict=True):
        for document in range(int(documents.max()) + 1):
            bags = [[int(token) for token in bag] for bag in ids[documents == document]]
            means = torch.stack([torch.stack([model.model.embed_tokens.weight[token] for token in bag]).mean(0) for bag in bags])
            logits = model(inputs_embeds=means[None]).logits[0]
            for place, following in enumerate(labels[documents == document][1:]):
                losses += [-logits[place].log_softmax(-1)[int(token)] for token in following if token != IGNORE_TOKEN]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("bag", [2, 3])
def test_a_bag_is_the_mean_of_its_embeddings_and_predicts_each_token_of_the_next(bag: int, prompts: bool) -> None:
    model, batch = _model(), _batch(bag, prompts)
    found = CausalLM._read(model, batch)
    # The layers run on bags.
    assert found.hidden_states.shape == (2 * 8, 16)
    loss, expected = CausalLM.loss(model, batch), _reference(model, batch)
    # The head's logits are in float32.
    assert float((loss - expected).detach().abs()) < 1e-6
    for ours, theirs in zip(_gradients(model, loss), _gradients(model, expected), strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-6


def test_a_bag_of_one_token_is_ordinary_training_bit_for_bit() -> None:
    model = _model().float()
    ordinary, bags = (CausalLM.loss(model, _batch(bag)) for bag in (None, 1))
    assert torch.equal(ordinary, bags)
    assert all(torch.equal(one, other) for one, other in zip(_gradients(model, ordinary), _gradients(model, bags), strict=True))


PHASES = "phases=[{share: 0.5, superposition: 4}, {share: 0.25, patch_level: 2}, {}]"


@pytest.mark.slow
def test_a_run_resumed_before_or_after_a_border_of_phases_ends_bit_for_bit_like_an_unbroken_one(
    tmp_path: Path, quick: list[str], console: Console
) -> None:
    shared = [*_text(quick), PHASES, "trainer.max_steps=4", "trainer.accumulate=2", "model.config.attention_dropout=0.1"]

    def weights(folder: Path, resume: str | None = None) -> dict[str, Tensor]:
        train_arm(load("llm_pretrain_dense", [*shared, f"output={folder}"]), "arm", folder, console, resume=resume)
        return load_file(folder / "model" / "model.safetensors")

    unbroken = weights(tmp_path / "whole")
    # In the first phase, at its end, and at the end of the second.
    for step in (1, 2, 3):
        broken = tmp_path / str(step)
        train_until(step, load("llm_pretrain_dense", [*shared, f"output={broken}"]), broken, console)
        resumed = weights(broken, resume="auto")
        assert all(torch.equal(value, resumed[name]) for name, value in unbroken.items()), step


@pytest.mark.slow
def test_the_report_and_the_lines_have_each_phase_and_the_model_is_an_ordinary_one(
    tmp_path: Path, quick: list[str], console: Console
) -> None:
    recipe = load("llm_pretrain_dense", [*_text(quick), PHASES, "trainer.max_steps=8"])
    trained = train_arm(recipe, "dense", tmp_path / "run", console)
    arm = trained.arm
    bags, patches, ordinary = arm.phases
    assert [phase["phase"] for phase in arm.phases] == ["superposition 4", "patch_level 2", "ordinary"]
    assert [phase["steps"] for phase in arm.phases] == [4, 2, 2]
    # Four times the text in a step, for the price of a step; the usual text for half of it.
    assert bags["amount"] / 4 > 3.5 * ordinary["amount"] / 2
    assert patches["amount"] / 2 > 0.9 * ordinary["amount"] / 2
    assert bags["macs"] == 2 * ordinary["macs"] == 4 * patches["macs"]
    assert arm.train_macs_ratio == pytest.approx(7 / 8)
    assert arm.train_macs == sum(phase["macs"] for phase in arm.phases)
    assert arm.train_seconds == pytest.approx(sum(phase["seconds"] for phase in arm.phases))
    lines = (tmp_path / "run" / "log.txt").read_text()
    assert "phases: 4 steps superposition 4, 2 steps patch_level 2, 2 steps ordinary" in lines
    assert all(f"step {step}/8  {name}  loss" in lines for step, name in ((4, "superposition 4"), (5, "patch_level 2"), (7, "ordinary")))
    assert type(trained.parts.model) is LlamaForCausalLM
    # Published: two thirds in patches.
    for patch, cost in ((2, 0.6667), (4, 0.5), (8, 0.4167)):
        plan = PhasePlan.of([PhaseRecipe(share=2 / 3, patch_level=patch), PhaseRecipe()], None, 300)
        assert plan is not None
        assert mean_phase_ratio(trained.parts, plan) == pytest.approx(cost, abs=5e-5)


def test_stages_act_in_their_phases_only_and_leave_an_ordinary_model(tmp_path: Path, quick: list[str], console: Console) -> None:
    # Tokens that go around a span of layers, as in TREAD (arXiv 2501.04765).
    overrides = [
        *quick,
        "baselines=[]",
        "model.config.num_hidden_layers=4",
        "compression={stages: [{layer: 1, scorer: random, selector: top_k}], restore: {layer: 3, by: rejoin}}",
        "phases=[{share: 0.5, keep: 0.25}, {}]",
        "trainer.max_steps=4",
    ]
    report = train(load("vit_digits_dense", overrides), overrides, console)
    part, whole = report.phases
    assert (part["phase"], whole["phase"]) == ("keep 0.25", "ordinary")
    assert part["macs_ratio"] < 0.8
    assert whole["macs_ratio"] == 1
    assert report.train_macs_ratio == pytest.approx((part["macs_ratio"] + 1) / 2)
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    kept = [line.split("/4  ")[1].split("  loss")[0] + line.split(" keep")[-1][:6] for line in lines if " step " in line and "loss" in line]
    assert kept == ["keep 0.25 0.250"] * 2 + ["ordinary 1.000"] * 2
    assert "compression" not in (tmp_path / "run" / "model" / "config.json").read_text()


def test_a_step_belongs_to_the_phase_that_its_share_gives_it() -> None:
    plan = PhasePlan.of([PhaseRecipe(share=0.3, superposition=4), PhaseRecipe(share=0.3, keep=0.5), PhaseRecipe()], None, 10)
    assert plan is not None
    assert [plan.number(step) for step in range(12)] == [0] * 3 + [1] * 3 + [2] * 6
    with pytest.raises(ValueError, match=r"phases.0 has no step: its share, 0.01, of 10 steps is less than one"):
        PhasePlan.of([PhaseRecipe(share=0.01, superposition=4), PhaseRecipe()], None, 10)


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("vit_digits_dense", ["phases=[{share: 0.5, superposition: 4}, {}]"], "task = image_classification has .*: only task causal_lm"),
        ("text_classify_dense", ["phases=[{share: 0.5, patch_level: 4}, {}]"], "task = text_classification has .*: only task causal_lm"),
        ("llm_pretrain", ["phases=[{share: 0.5, superposition: 4}, {}]"], "stages of compression decide for tokens: train without"),
        ("llm_pretrain", ["phases=[{share: 0.5, keep: 0.5}, {}]"], "phases.0.keep = 0.5 and budget both set the keep"),
        ("llm_lora_dense", ["phases=[{share: 0.5, superposition: 4}, {}]"], "lora.mode = 'lora' freezes them: remove lora, or set"),
        ("llm_pretrain_dense", ["phases=[{share: 0.5, keep: 0.5}, {}]"], "phases.0.keep = 0.5 is for stages without a keep of their own"),
        ("llm_pretrain_dense", ["phases=[{share: 0.5, patch_level: 4}, {}]"], "data.batch_size = 2 is no multiple of it"),
        ("llm_pretrain_dense", ["phases=[{share: 1, superposition: 4}]"], "phases.0 is superposition 4, and the last phase is ordinary"),
        ("llm_pretrain_dense", ["phases=[{share: 0.5, superposition: 4}, {share: 0.4}]"], "shares of phases add up to 0.9, not to 1"),
        ("llm_pretrain_dense", ["phases=[{superposition: 4}, {}]"], "2 phases have no share"),
        ("llm_pretrain_dense", ["phases=[{share: 1, superposition: 4}, {}]"], "add up to 1, and one phase without a share gets the rest"),
        ("llm_pretrain_dense", ["phases=[{share: 0.5, superposition: 4, keep: 0.5}, {}]"], "a phase has one of superposition and keep"),
        ("llm_pretrain_dense", ["phases=[{share: 0.5}, {}]"], "phases has no effect"),
        ("llm_pretrain_dense", ["phases=[{share: 0.5, superposition: 1}, {}]"], "superposition = 1: .* greater than or equal to 2"),
        ("llm_pretrain_dense", ["phases=[{share: 0.5, patch_level: 1}, {}]"], "patch_level = 1: .* greater than or equal to 2"),
        (
            "llm_pretrain_dense",
            ["phases=[{share: 0.5, superposition: 4}, {}]", "trainer.max_steps=null", "trainer.max_epochs=1"],
            "trainer.max_epochs counts ordinary rows: set trainer.max_steps",
        ),
    ],
)
def test_phases_that_do_not_go_together_are_refused_with_the_cure(recipe: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(recipe, ["baselines=[]", *overrides])


def test_a_stage_with_an_effect_at_full_length_is_refused(quick: list[str]) -> None:
    stages = "compression={stages: [{layer: 1, site: around, scorer: linear, selector: top_k, estimator: gate}]}"
    with pytest.raises(ValueError, match=r"stage 'around_1' has an effect on tokens that are kept"):
        build(load("vit_digits_dense", ["phases=[{share: 0.5, keep: 0.5}, {}]", stages, *quick]).recipe)


def test_rows_of_bags_that_are_fewer_than_a_batch_are_refused_before_training(quick: list[str]) -> None:
    overrides = [*_text(quick), "data.train_samples=2", "data.batch_size=8", "data.sequence_length=512"]
    with pytest.raises(
        ValueError, match=r"^phases.0.superposition = 16: rows of bags are 16 times as long as others, .* fewer than a batch of 8"
    ):
        validate(load("llm_pretrain_dense", [*overrides, "phases=[{share: 0.5, superposition: 16}, {}]"]).recipe)
    # As many bags a row, and a batch of fewer rows.
    validate(load("llm_pretrain_dense", [*overrides, "phases=[{share: 0.5, patch_level: 8}, {}]"]).recipe)


def test_bags_that_predict_no_token_are_refused_and_few_are_a_remark(quick: list[str]) -> None:
    lengths = np.asarray([3, 4, 2, 4] * 40)
    rows = PackedRows(Corpus([np.ones(lengths.sum(), np.int32)], lengths), Tokens(8, 0, np.ones(40, np.int64)), whole=False)
    data = TextData(train=rows, validation=rows, test=rows, tokenizer=None, length=8, counted=BadRowCount(0.0))

    def remarks(phase: str, data: TextData = data) -> list[str]:
        return check_rows(load("llm_pretrain_dense", [*_text(quick), f"phases=[{{share: 0.5, {phase}}}, {{}}]"]).recipe, data)

    with pytest.raises(
        ValueError, match=r"^phases.0.superposition = 4 predicts no token: no document has more than 4 tokens, .* smaller bag"
    ):
        remarks("superposition: 4")
    # Five of thirteen, less what rows begin with that go on with a document.
    assert remarks("patch_level: 2") == [
        "phases.0.patch_level = 2 predicts 34 % of the tokens, as the first bag of a document is not predicted: take a smaller bag, or longer "
        "documents"
    ]
    longer = replace(data, train=PackedRows(Corpus(rows.corpus.tokens, np.asarray([52] * 10)), rows.tokens, whole=False))
    assert remarks("superposition: 4", longer) == []


def test_a_family_without_a_cost_model_has_no_ratio_of_phases(quick: list[str]) -> None:
    parts = build(load("llm_patch_level", [*_text(quick), "trainer.max_steps=6"]).recipe)
    assert training_ratio(parts) == pytest.approx(2 / 3)
    assert training_ratio(replace(parts, cost=None)) is None
    assert training_ratio(replace(parts, cost=None, phases=None)) == 1.0


@pytest.mark.parametrize(("given", "steps"), [([], 1200), (["trainer.max_steps=900"], 600), (["trainer.max_steps=1"], 1)])
def test_the_dense_control_arm_of_phases_has_its_share_of_other_steps(given: list[str], steps: int) -> None:
    found = load_baselines(load("llm_patch_level", given), given)
    assert [arm.recipe.trainer.max_steps for arm in found.arms] == [steps]
    assert found.notes == []
    # As an arm of a comparison it is the same recipe.
    (compared,) = arms_of("llm_patch_level", ["llm_pretrain_dense"], given)[1]
    assert compared.load(0).trainer.max_steps == steps


def test_other_phases_leave_the_dense_control_arm_as_it_is_with_a_note() -> None:
    given = ["phases.0.share=0.5"]
    found = load_baselines(load("llm_patch_level", given), given)
    assert [arm.recipe.trainer.max_steps for arm in found.arms] == [1200]
    (note,) = found.notes
    assert note.startswith(
        "control arm llm_pretrain_dense has a length that does not follow phases, which is set: its train_macs may differ"
    )
