"""What two processes do for test_strategies. Not a test itself; two_ranks.py starts them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from laconic.trainer.build.build import build
from laconic.trainer.distributed import collective
from laconic.trainer.distributed.deepspeed import deepspeed_config
from laconic.trainer.distributed.resume import remove_checkpoint
from laconic.trainer.distributed.strategies import resolved
from laconic.trainer.distributed.zero3 import gathered
from laconic.trainer.recipe.files import load
from laconic.trainer.run import silent, train_arm
from tests.trainer.conftest import QUICK

# Without a threshold everything that is small stays whole, and these models are small.
PARTITION = "trainer.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}"
STRATEGIES: dict[str, list[str]] = {
    "plain": ["trainer.strategy=plain"],
    "deepspeed_2": ["trainer.strategy=auto"],
    "deepspeed_3": ["trainer.strategy=deepspeed_3", PARTITION],
}
# Rows of the test split that leave the second rank without any in the last batch.
SHARED = [*QUICK, "baselines=[]", "trainer.max_steps=6", "data.eval_samples=17", "data.eval_batch_size=8"]
TWO = [*SHARED, "trainer.devices=2"]


def strategies(folder: Path) -> dict[str, Any]:
    """Every run of the tests, into folders of this one; called by both processes."""
    results: dict[str, Any] = {}
    for name, overrides in STRATEGIES.items():
        results[name] = broken(folder / name, "model", trained, [*TWO, "trainer.checkpoint_every=4", *overrides])
    results["same_first_weights"] = _same_first_weights()
    return results


def broken(folder: Path, weights: str, train: Callable[..., Any], overrides: list[str]) -> Any:
    """Trains, keeps the weights as ``unbroken``, and trains again as if it had been stopped before its last checkpoint; returns what the
    whole training returned.

    Args:
        folder: folder of the run.
        weights: ``model`` or ``adapter``.
        train: trains into a folder, with ``overrides`` and ``resume``.
        overrides: of the recipe.
    """
    with mock.patch("laconic.trainer.callbacks.checkpoints.remove_checkpoint"):
        result = train(folder, overrides)
    if collective.rank() == 0:
        shutil.copytree(folder / weights, folder / "unbroken")
        remove_checkpoint(max((folder / "checkpoints").glob("*.ckpt"), key=lambda path: int(path.stem)))
    collective.wait()
    train(folder, overrides, resume="auto")
    return result


def trained(folder: Path, overrides: list[str], resume: str | None = None, recipe: str = "vit_digits") -> dict[str, Any]:
    began = time.perf_counter()
    arm = train_arm(load(recipe, overrides), "arm", folder, silent(), resume=resume).arm
    return {"quality": arm.quality, "keep": arm.keep["achieved"], "seconds": time.perf_counter() - began}


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
