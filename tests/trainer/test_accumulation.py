"""An optimizer step has the gradient of the mean over all its tokens or pixels, however many batches and ranks share them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import seed_everything
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from laconic.data.rows import collate
from laconic.trainer.build.build import build
from laconic.trainer.recipe.files import load
from laconic.trainer.run import train_arm
from laconic.trainer.tasks.base import task_named
from tests.data.texts import jsonl
from tests.trainer.conftest import QUICK

SMALL = [item for item in QUICK if not item.startswith(("data.", "trainer.max_steps"))]
MODEL = ["model.config.vocab_size=400", "data.sequence_length=128", "trainer.precision=fp32", "optimizer.warmup=0", "optimizer.lr=1e-3"]


@pytest.fixture
def pairs(tmp_path: Path) -> list[str]:
    """Overrides with prompts and completions of very different lengths: rows predict from some 10 to 100 tokens."""
    rows = [
        {"prompt": f"Count to {index % 7}: " + "x " * (8 * (index % 7)), "completion": "one two " * (1 + index % 5)} for index in range(60)
    ]
    saved = build(load("llm_pretrain_dense", [*SMALL, *MODEL, "data.train_samples=4", "data.eval_samples=2", "trainer.max_steps=1"]).recipe)
    saved.data.save_beside(tmp_path / "tokenizer")
    files = [f"data.data_files={jsonl(tmp_path / 'rows.jsonl', rows)}", f"data.tokenizer={tmp_path / 'tokenizer'}", "data.name=json"]
    return [*SMALL, *MODEL, *files]


def _gradients(overrides: list[str], steps: int) -> list[Tensor]:
    """The gradient of each of the first optimizer steps, in float64 and without a change of the weights."""
    parts = build(load("llm_pretrain_dense", [*overrides, f"trainer.max_steps={steps}"]).recipe)
    module, found = task_named(parts.recipe.task).module(parts).double(), []
    accumulate = parts.recipe.trainer.accumulate
    for number, batch in enumerate(parts.data_module().train_dataloader()):
        # As Lightning does.
        (module.losses(batch)["loss"] / accumulate).backward()
        if (number + 1) % accumulate == 0:
            found.append(torch.cat([p.grad.flatten() for p in parts.model.parameters() if p.grad is not None]))
            parts.model.zero_grad()
    return found


def test_four_batches_of_one_row_have_the_gradient_of_one_batch_of_four(pairs: list[str]) -> None:
    whole = _gradients([*pairs, "data.batch_size=4"], 3)
    parted = _gradients([*pairs, "data.batch_size=1", "trainer.accumulate=4"], 3)
    assert len(whole) == len(parted) == 3
    for one, other in zip(whole, parted, strict=True):
        assert float((one - other).norm() / one.norm()) < 1e-6


def test_a_run_of_parts_ends_like_a_run_of_whole_batches_and_reports_the_same_losses(
    tmp_path: Path, pairs: list[str], console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(name: str, *more: str, resume: str | None = None) -> tuple[dict[str, Tensor], list[str]]:
        train_arm(load("llm_pretrain_dense", [*pairs, "trainer.max_steps=4", *more]), "dense", tmp_path / name, console, resume=resume)
        lines = (tmp_path / name / "log.txt").read_text().splitlines()
        losses = [line.partition("loss ")[2].split()[0] for line in lines if "  loss " in line]
        return load_file(tmp_path / name / "model" / "model.safetensors"), losses

    whole, expected = trained("whole", "data.batch_size=4")
    parts = ["data.batch_size=1", "trainer.accumulate=4"]
    parted, losses = trained("parted", *parts)
    assert losses == expected
    assert all((value - parted[name]).norm() <= 1e-3 * value.norm() for name, value in whole.items())
    # As if it had been killed after the third step.
    monkeypatch.setattr("laconic.trainer.callbacks.checkpoints.remove_checkpoint", lambda path: None)
    trained("broken", *parts, "trainer.checkpoint_every=2")
    (tmp_path / "broken" / "checkpoints" / "4.ckpt").unlink()
    again, _ = trained("broken", *parts, "trainer.checkpoint_every=2", resume="auto")
    assert all(torch.equal(value, again[name]) for name, value in parted.items())


def test_pixels_without_a_class_have_no_weight_in_a_step() -> None:
    items = [{"labels": torch.zeros(2, 2), "sample_ids": torch.tensor(index), "predicted": index} for index in (1, 3)]
    assert [collate([item])["terms"] for item in items] == [1, 3]
    assert collate(items)["terms"] == 4
    assert collate([{"sample_ids": torch.tensor(0)}])["terms"] == 1


def test_equal_batches_are_not_changed_by_their_weight(quick: list[str]) -> None:
    parts = build(load("vit_digits", [*quick, "trainer.accumulate=2"]).recipe)
    module: Any = task_named(parts.recipe.task).module(parts)
    for batch in parts.data_module().train_dataloader():
        seed_everything(0, verbose=False)
        weighed = module.losses(batch)["task_loss"]
        seed_everything(0, verbose=False)
        assert torch.equal(weighed, module.losses({key: value for key, value in batch.items() if not key.startswith("step_")})["task_loss"])
