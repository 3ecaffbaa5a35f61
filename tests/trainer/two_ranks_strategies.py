"""What two processes do for test_strategies. Not a test itself; two_ranks.py starts them."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch

from laconic.trainer.build.build import build
from laconic.trainer.callbacks.guards import NotANumber
from laconic.trainer.distributed import collective
from laconic.trainer.distributed.deepspeed import deepspeed_config
from laconic.trainer.distributed.strategies import resolved
from laconic.trainer.distributed.zero3 import gathered
from laconic.trainer.recipe.files import load
from laconic.trainer.run import silent, train_arm
from laconic.trainer.tasks.causal_lm import CausalLMModule
from tests.data.texts import jsonl, small_tokenizer
from tests.trainer.conftest import QUICK

# Without a threshold everything that is small stays whole, and these models are small.
PARTITION = "trainer.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}"
STRATEGIES: dict[str, list[str]] = {
    "plain": ["trainer.strategy=plain"],
    "deepspeed_1": ["trainer.strategy=deepspeed_1"],
    "deepspeed_2": ["trainer.strategy=auto"],
    "deepspeed_3": ["trainer.strategy=deepspeed_3", PARTITION],
    "deepspeed_2_offload": ["trainer.strategy=deepspeed_2", "trainer.offload=optimizer"],
    "deepspeed_3_offload": ["trainer.strategy=deepspeed_3", "trainer.offload=all", PARTITION],
}
# Rows of the test split that leave the second rank without any in the last batch.
SHARED = [*QUICK, "baselines=[]", "trainer.max_steps=6", "data.eval_samples=17", "data.eval_batch_size=8"]
TWO = [*SHARED, "trainer.devices=2"]
NAN = [*TWO, "optimizer.lr=1e30", "trainer.clip=0", "trainer.max_steps=30"]
DROPOUT = "model.config.hidden_dropout_prob=0.1"
SETTINGS = {
    "accumulate": ["trainer.strategy=deepspeed_2", "trainer.accumulate=2", "trainer.max_steps=3"],
    "bf16_2": ["trainer.strategy=deepspeed_2", "trainer.precision=bf16", "trainer.gradient_checkpointing=true"],
    "bf16_3": ["trainer.strategy=deepspeed_3", "trainer.precision=bf16", PARTITION],
    "checkpointing_3": ["trainer.strategy=deepspeed_3", "trainer.gradient_checkpointing=true", PARTITION],
    "learned_3": ["trainer.strategy=deepspeed_3", "compression.stages.0.scorer=learned", "compression.stages.0.layer=1",
                  "budget.target=0.8", "budget.regularizer=macs_squared", PARTITION],
    "learned_plain": ["trainer.strategy=plain", "compression.stages.0.scorer=learned", "compression.stages.0.layer=1",
                      "budget.target=0.8", "budget.regularizer=macs_squared"],
}  # fmt: skip
# Pretraining with masks: the masks are the same on any number of ranks, and positions are frozen parameters.
MASKED = ["compression.restore.layer=2", "model.config.decoder_hidden_size=8", "model.config.decoder_num_hidden_layers=1"]
# Few tokens, and routers that let hardly any through: in some step a layer of some rank has none.
TEXT = ["trainer.max_steps=4", "trainer.log_every=1", "trainer.bench_rounds=0", "baselines=[]", "model.config.vocab_size=300",
        "model.config.hidden_size=32", "model.config.intermediate_size=48", "model.config.num_hidden_layers=3", "trainer.pictures=0",
        "data.sequence_length=16", "data.train_samples=2", "data.eval_samples=1", "budget.target=0.8", "budget.regularizer=macs_squared",
        "compression.stages=[{layer: 1, site: around, scorer: {name: linear, bias: -1.6}, "
        "selector: {name: threshold, calibrate: false}}]"]  # fmt: skip
TWO_TEXT = [*TEXT, "trainer.devices=2", "data.batch_size=2"]
LANGUAGE = ("deepspeed_1", "deepspeed_2", "deepspeed_3")
# Answers of very different lengths: every batch of every rank predicts another number of tokens.
UNEVEN = [item for item in TEXT if not item.startswith(("data.", "budget.", "compression.", "model.config.vocab_size"))]
UNEVEN += ["data.name=json", "data.sequence_length=64", "model.config.vocab_size=320"]
TWO_UNEVEN = [*UNEVEN, "trainer.devices=2", "data.batch_size=1", "trainer.accumulate=2"]
ACCUMULATED = ("plain", "deepspeed_1", "deepspeed_2", "deepspeed_3")


def strategies(folder: Path) -> dict[str, Any]:
    """Every run of the tests, into folders of this one; called by both processes."""
    results: dict[str, Any] = {}
    for name, overrides in STRATEGIES.items():
        results[name] = _trained(folder / name, [*TWO, "trainer.checkpoint_every=4", *overrides])
        if collective.rank() == 0:
            shutil.copytree(folder / name / "model", folder / name / "unbroken")
        collective.wait()
        _trained(folder / name, [*TWO, "trainer.checkpoint_every=4", *overrides], resume="auto")
    for name, overrides in SETTINGS.items():
        results[name] = _trained(folder / name, [*TWO, *overrides])
    for name in ("plain", "deepspeed_2", "deepspeed_3"):
        results[f"masked_{name}"] = _trained(folder / f"masked_{name}", [*TWO, *MASKED, *STRATEGIES[name]], recipe="mae_digits")
    for name in ("plain", "deepspeed_3"):
        both = [*TWO, "trainer.checkpoint_every=4", DROPOUT, *STRATEGIES[name]]
        _trained(folder / f"dropout_{name}", both)
        if collective.rank() == 0:
            shutil.copytree(folder / f"dropout_{name}" / "model", folder / f"dropout_{name}" / "unbroken")
        collective.wait()
        _trained(folder / f"dropout_{name}", both, resume="auto")
    for name in LANGUAGE:
        results[f"text_{name}"] = collective.gather(_routed(folder / f"text_{name}", TWO_TEXT + STRATEGIES[name]))
    if collective.rank() == 0:
        uneven_files(folder / "uneven")
    collective.wait()
    for name in ACCUMULATED:
        _trained(folder / f"uneven_{name}", [*TWO_UNEVEN, *uneven(folder / "uneven"), *STRATEGIES[name]], recipe="llm_pretrain_dense")
    results["same_first_weights"] = _same_first_weights()
    for name in ("plain", "deepspeed_2", "deepspeed_3"):
        results[f"nan_{name}"] = collective.gather(_nan([*NAN, *STRATEGIES[name]], folder / f"nan_{name}"))
    return results


def uneven_files(folder: Path) -> None:
    """Writes prompts with answers of very different lengths, and a tokenizer."""
    folder.mkdir()
    rows = [{"prompt": f"Count to {index % 9}: ", "completion": "one two " * (1 + 5 * (index % 9 == 0))} for index in range(60)]
    jsonl(folder / "rows.jsonl", rows)
    small_tokenizer().save_pretrained(folder / "tokenizer")


def uneven(folder: Path) -> list[str]:
    """Overrides for these files."""
    return [f"data.data_files={folder / 'rows.jsonl'}", f"data.tokenizer={folder / 'tokenizer'}"]


def _trained(folder: Path, overrides: list[str], resume: str | None = None, recipe: str = "vit_digits") -> dict[str, Any]:
    began = time.perf_counter()
    arm = train_arm(load(recipe, overrides), "arm", folder, silent(), resume=resume).arm
    return {"quality": arm.quality, "keep": arm.keep["achieved"], "seconds": time.perf_counter() - began}


def _routed(folder: Path, overrides: list[str]) -> list[int]:
    """Tokens that the routed layer processed on this rank, step by step."""
    counts, losses = [], CausalLMModule.losses

    def counted(module: CausalLMModule, batch: dict[str, Any]) -> dict[str, Any]:
        found = losses(module, batch)
        counts.append(found["trace"].routings["around_1"].counts()[0])
        return found

    CausalLMModule.losses = counted  # type: ignore[method-assign]
    try:
        _trained(folder, overrides, recipe="llm_pretrain")
    finally:
        CausalLMModule.losses = losses  # type: ignore[method-assign]
    return counts


def _same_first_weights() -> bool:
    """Whether a model built in shards, router included, has the weights of a plain build bit for bit."""
    recipe = resolved(load("vit_digits", [*TWO, *STRATEGIES["deepspeed_3"]]).recipe)
    shards = build(recipe, shards=deepspeed_config(recipe.trainer, recipe.data.batch_size)).model
    assert all(parameter.numel() == 0 for parameter in shards.parameters())
    state, plain = gathered(shards), build(recipe).model.state_dict()
    same = collective.rank() != 0 or (
        state.keys() == plain.keys() and all(torch.equal(value, plain[name]) for name, value in state.items())
    )
    return all(collective.gather(same))


def _nan(overrides: list[str], folder: Path) -> str:
    try:
        train_arm(load("vit_digits", overrides), "arm", folder, silent())
    except NotANumber as error:
        return str(error)
    return "trained on"
