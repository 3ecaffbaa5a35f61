"""The estimated memory of a run, its closing measurement included, against what the run holds."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from laconic.trainer import run
from laconic.trainer.build.memory import RunMemory, run_memory
from laconic.trainer.build.parts import RunParts
from laconic.trainer.build.validate import Checked, _logits_bytes, validate
from laconic.trainer.losses.token_loss import WHOLE
from laconic.trainer.measure import bench
from laconic.trainer.measure.training_step import TrainingStep
from laconic.trainer.recipe.baselines import load_baselines
from laconic.trainer.recipe.files import load


def _checked(given: list[str]) -> dict[str, Checked]:
    loaded = load("vit_digits", given)
    return {arm.name: validate(arm.recipe) for arm in [*load_baselines(loaded, given).arms, loaded]}


def _bytes(optimizers: list[torch.optim.Optimizer]) -> int:
    """Weights, gradients and moments of what optimizers train; of a parameter in several of them, the last one counts."""
    of = {item: optimizer for optimizer in optimizers for group in optimizer.param_groups for item in group["params"]}
    states = [value for item, optimizer in of.items() for value in optimizer.state[item].values() if value.dim()]
    return sum(item.nbytes for item in (*of, *(item.grad for item in of if item.grad is not None), *states))


@pytest.mark.slow
def test_the_closing_measurement_holds_what_is_estimated_and_no_state_of_training(
    quick: list[str], console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [*(item for item in quick if "bench_rounds" not in item), "trainer.bench_rounds=1", "model.config.hidden_size=64"]
    held: dict[str, int] = {}
    steps: list[torch.optim.Optimizer] = []

    def measured(parts: Mapping[str, RunParts], *others: Any) -> Any:
        own = {item for arm in parts.values() for item in arm.model.parameters()}
        optimizers = [item for item in gc.get_objects() if isinstance(item, torch.optim.Optimizer)]
        held["weights"] = sum(item.nbytes for item in own)
        held["training"] = sum(item in own for optimizer in optimizers for item in optimizer.state)
        held["training"] += sum(item.grad is not None for item in own)
        found = bench_models(parts, *others)
        held["bench"] = _bytes(steps)
        return found

    class Recorded(TrainingStep):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            steps.append(self.optimizer)

    bench_models = run.bench_models
    monkeypatch.setattr(run, "bench_models", measured)
    monkeypatch.setattr(bench, "TrainingStep", Recorded)
    loaded, checked = load("vit_digits", given), _checked(given)
    assert run.train(loaded, given, console) is not None
    memory = run_memory(checked, loaded.recipe)
    activations = max(item.dense_activation_bytes for item in checked.values())
    assert held["training"] == 0
    assert memory.models == 7
    assert memory.bench - activations - sum(item.weight_bytes for item in checked.values()) == pytest.approx(held["bench"], rel=0.02)
    assert sum(item.weight_bytes for item in checked.values() if item.keep) == pytest.approx(held["weights"], rel=0.02)


def test_logits_count_up_to_the_part_that_a_loss_holds() -> None:
    cost: Any = SimpleNamespace(main=SimpleNamespace(tokens=256, hidden=576, head_macs_per_token=576 * 49152))
    recipe = load("vit_digits").recipe
    for rows, values in ((1, 256 * 49152), (100, WHOLE)):
        assert _logits_bytes(cost, recipe.model_copy(update={"data": recipe.data.model_copy(update={"batch_size": rows})})) == 12 * values


def test_a_run_that_exceeds_the_memory_is_told_what_to_change() -> None:
    memory = RunMemory(3 * 2**30, 9 * 2**30, 13)
    assert memory.remark(16 * 2**30) == "the whole run takes about 9.00 GiB at its peak, in the closing measurement of 13 models"
    assert memory.remark(8 * 2**30).endswith("; this machine has 8.0 GiB: set trainer.bench_rounds=0")
    assert memory.remark(2**30).endswith("; this machine has 1.0 GiB: make data.batch_size smaller")
