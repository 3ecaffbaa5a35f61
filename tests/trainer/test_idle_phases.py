"""Phases without a keep are ordinary training, whatever the scorer of the stages is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from laconic.data.rows import collate
from laconic.trainer.build.build import build
from laconic.trainer.recipe.files import load
from laconic.trainer.tasks.base import task_named

STAGES = {
    "straight_through": "{layer: 1, scorer: learned, selector: top_k}",
    "evidence": "{layer: 1, scorer: evidence, selector: top_k}",
    "around": "{layer: [1, 2], site: around, share: true, scorer: learned, selector: top_k}",
}


def _step(overrides: list[str]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Losses of the first training step, and its gradients."""
    parts = build(load("vit_digits_dense", overrides).recipe)
    parts.model.train()
    losses = task_named(parts.recipe.task).module(parts).losses(collate([parts.data.train[row] for row in range(8)]))
    losses["loss"].backward()
    return losses, {name: value.grad for name, value in parts.model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("stages", ["straight_through", "evidence", "around"])
def test_a_phase_without_a_keep_has_the_loss_and_the_gradients_of_the_dense_model(quick: list[str], stages: str) -> None:
    shared = [*quick, "baselines=[]", "trainer.max_steps=4", "model.config.num_hidden_layers=3"]
    phases = ["phases=[{share: 0.5}, {share: 0.25, keep: 0.5}, {}]", f"compression={{stages: [{STAGES[stages]}]}}"]
    (dense, expected), (losses, gradients) = _step(shared), _step([*shared, *phases])
    assert torch.equal(losses["loss"], dense["loss"])
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], value) for name, value in expected.items())
    # Of a phase with a keep the router learns.
    _, acting = _step([*shared, phases[1], "phases=[{share: 0.5, keep: 0.5}, {}]"])
    assert acting.keys() > expected.keys()
