"""Parameter groups: every parameter once, and the learning rate that its layer should have."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import get_scheduler

from laconic.trainer.build.optimization import learning_rate_schedule, parameter_groups
from tests.matrix import BACKBONES, LAYERS, METHODS, compressed, dense, stack_of


@pytest.mark.parametrize("family", BACKBONES)
def test_layer_decay_falls_from_the_head_to_the_embeddings_and_leaves_routers_alone(family: str) -> None:
    model = compressed(family, METHODS[0], 0.5, 0.6)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {
        names[id(parameter)]: group["lr"]
        for group in parameter_groups(model, lr=1.0, router_lr=7.0, weight_decay=0.1, layer_decay=0.5)
        for parameter in group["params"]
    }
    assert rates.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    depths = {
        names[id(parameter)]: LAYERS - index for index, layer in enumerate(stack_of(model).layers) for parameter in layer.parameters()
    }
    for name, rate in rates.items():
        if ".stages." in name:
            assert rate == 7.0
        elif "embeddings" in name or "pre_layrnorm" in name:
            assert rate == 0.5 ** (LAYERS + 1)
        else:
            assert rate == 0.5 ** depths.get(name, 0), name
    assert {".stages." in name for name in rates} == {True, False}


def test_the_first_groups_learning_rate_is_the_recipes() -> None:
    assert parameter_groups(compressed("vit", METHODS[0], 0.5, 0.6), lr=1.0, router_lr=7.0, layer_decay=0.5)[0]["lr"] == 1.0


def test_weight_decay_is_the_same_with_and_without_layer_decay() -> None:
    model = dense("vit")
    plain, layered = (
        {id(p): group["weight_decay"] for group in parameter_groups(model, 1.0, None, 0.1, decay) for p in group["params"]}
        for decay in (None, 0.7)
    )
    assert plain == layered
    assert [group["name"] for group in parameter_groups(model, 1.0, None, 0.1)] == ["backbone_no_decay", "backbone"]


def test_a_model_without_an_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="optimizer.layer_decay needs a transformers model"):
        parameter_groups(torch.nn.Linear(2, 2), 1.0, layer_decay=0.5)


def _optimizer() -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (1.0, 0.25)]
    return torch.optim.AdamW(groups, lr=1e-3)


@pytest.mark.parametrize("final", [0.0, 0.1])
@pytest.mark.parametrize(("total", "warmup"), [(1, 0.05), (7, 0.0), (40, 0.05), (40, 0.3), (5, 1.0)])
@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_the_learning_rate_warms_up_from_its_first_step_and_then_follows_its_curve(
    kind: str, total: int, warmup: float, final: float
) -> None:
    optimizer = _optimizer()
    schedule = learning_rate_schedule(optimizer, kind, total, warmup, final)
    steps = math.ceil(warmup * total)
    curves = {
        "cosine": lambda done: final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done)),
        "linear": lambda done: 1 - (1 - final) * done,
        "constant": lambda done: 1.0,
    }
    # One step more than there are: Lightning moves the schedule after the last step too.
    for step in range(total + 1):
        expected = (step + 1) / steps if step < steps else curves[kind]((step - steps) / max(1, total - steps))
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([expected, 0.25 * expected], rel=0, abs=2e-16)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("name", ["constant_with_warmup", "linear", "cosine", "cosine_with_min_lr"])
def test_the_warm_up_of_transformers_would_lose_the_first_step(name: str) -> None:
    # Why the warm-up is done by hand.
    options = {"min_lr_rate": 0.0} if name == "cosine_with_min_lr" else None
    optimizer = _optimizer()
    get_scheduler(name, optimizer, num_warmup_steps=4, num_training_steps=40, scheduler_specific_kwargs=options)
    assert optimizer.param_groups[0]["lr"] == 0
    learning_rate_schedule(optimizer := _optimizer(), "cosine", 40, 0.1)
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_an_unknown_schedule_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="optimizer.schedule = 'staircase' must be one of cosine, linear, constant"):
        learning_rate_schedule(_optimizer(), "staircase", 10)
