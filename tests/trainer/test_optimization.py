"""Parameter groups: every parameter once, and the learning rate that its layer should have."""

from __future__ import annotations

import pytest
import torch

from laconic.trainer.build.optimization import parameter_groups
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
