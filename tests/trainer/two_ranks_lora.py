"""What two processes do for test_lora_ranks. Not a test itself; two_ranks.py starts them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from laconic.modules.checkpoints.base_weights import weights_hash
from laconic.trainer.distributed import collective
from laconic.trainer.distributed.deepspeed import deepspeed_config
from laconic.trainer.distributed.strategies import resolved
from laconic.trainer.distributed.zero3 import broadcast_weights, gathered, save_trained, zero3_init
from laconic.trainer.recipe.files import load
from laconic.trainer.run import silent, train_arm
from tests.trainer.conftest import QUICK
from tests.trainer.two_ranks_strategies import PARTITION, broken

TINY = [item for item in QUICK if not item.startswith("model.config")]
SHARED = [*TINY, "baselines=[]", "trainer.max_steps=4", "optimizer.warmup=0"]
STRATEGIES = {
    "plain": ["trainer.strategy=plain"],
    "deepspeed_1": ["trainer.strategy=deepspeed_1"],
    "deepspeed_2": ["trainer.strategy=deepspeed_2"],
    "deepspeed_3": ["trainer.strategy=deepspeed_3", PARTITION],
}
TWO = ["trainer.devices=2", "trainer.checkpoint_every=2"]
# A language model: of a body of a function the bytes are most of the tokens, since the tokenizer learned from little.
LANGUAGE = ("plain", "deepspeed_2", "deepspeed_3")
TEXT = [*SHARED, "data.sequence_length=256", "data.train_samples=12", "data.eval_samples=4", "data.batch_size=2", "budget.target=0.8",
        "budget.schedule=constant", "compression.stages=[{layer: [1, 2], site: around, scorer: linear, selector: threshold}]"]  # fmt: skip
TEXT_BASE = [*QUICK, "model.config.num_hidden_layers=4", "model.config.vocab_size=400", "data.sequence_length=64", "data.train_samples=6",
             "data.eval_samples=2"]  # fmt: skip


def bases(folder: Path) -> None:
    """Trains what the runs with LoRA start from; called by one process, before there are two."""
    console = Console(quiet=True)
    train_arm(load("vit_lora_base", [*QUICK, f"output={folder / 'base'}"]), "dense", folder / "base", console)
    (folder / "hash.txt").write_text(weights_hash(folder / "base" / "model"))
    train_arm(load("llm_pretrain_dense", [*TEXT_BASE, f"output={folder}"]), "dense", folder / "text_base", console)


def lora(folder: Path) -> dict[str, Any]:
    """Every run of the tests, into folders of this one; called by both processes."""
    for name, strategy in STRATEGIES.items():
        overrides = [*SHARED, *TWO, *strategy, f"model.name={folder / 'base'}"]
        broken(folder / name, "adapter", _train, overrides)
    for name in LANGUAGE:
        overrides = [*TEXT, *TWO, *STRATEGIES[name], f"model.name={folder / 'text_base'}"]
        _train(folder / f"text_{name}", overrides, recipe="llm_lora")
    return {"tied": _tied(folder / "tied")}


def _train(folder: Path, overrides: list[str], resume: str | None = None, recipe: str = "vit_lora") -> None:
    train_arm(load(recipe, overrides), "arm", folder, silent(), resume=resume)


def _tied(folder: Path) -> list[str]:
    """A language model in pieces whose head is its embedding: saved whole, and refused where a piece is missing."""
    import deepspeed

    recipe = resolved(load("vit_digits", [*QUICK, "trainer.devices=2", *STRATEGIES["deepspeed_3"]]).recipe)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32, tie_word_embeddings=True
    )
    torch.manual_seed(0)
    whole: PreTrainedModel = LlamaForCausalLM(config)
    with zero3_init(deepspeed_config(recipe.trainer, recipe.data.batch_size)):
        pieces: PreTrainedModel = LlamaForCausalLM(config)
    pieces.tie_weights()
    for parameter in whole.model.layers.parameters():
        parameter.requires_grad_(False)
    broadcast_weights(pieces, whole if collective.rank() == 0 else None)
    save_trained(pieces, folder, None)
    if collective.rank() == 0:
        whole.save_pretrained(folder / "expected")
    state = gathered(pieces)
    said = []
    gather = deepspeed.zero.GatheredParameters
    deepspeed.zero.GatheredParameters = lambda parameters: contextlib.nullcontext()
    try:
        # What a gathering that did nothing would leave: parameters that look empty.
        gathered(pieces)
    except RuntimeError as error:
        said = [str(error)]
    deepspeed.zero.GatheredParameters = gather
    return [*said, *(str(name) for name in state)]
