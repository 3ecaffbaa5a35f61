"""LoRA beside routers: what it may touch, what trains, and that merging changes no answer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from laconic import Trace, add_lora, decompress, merge_lora, stages_of, train_only
from laconic.modules.checkpoints.lora import is_lora, lora_targets
from tests.matrix import BACKBONES, METHODS, compressed, dense, images, inputs, loss_of, traced
from tests.modules.adapted import LEARNED, adapted, base_folder

TRAINED = [method for method in METHODS if method.name in ("learned_key_bias", "evidence", "squeeze", "threshold", "around")]


def _trained(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("targets", [None, "all-linear", ".*"], ids=["family's default", "all-linear", "any name"])
@pytest.mark.parametrize("family", BACKBONES)
def test_routers_are_never_targets_and_train_in_full(family: str, targets: str | None) -> None:
    model = compressed(family, LEARNED, 0.5, 0.6)
    expected = dense(family)
    routers = {name for name, _ in model.named_parameters() if ".stages." in name}
    assert routers
    add_lora(model, LoraConfig(r=2, target_modules=targets))
    adapted = {name for name, _ in model.named_parameters() if is_lora(name)}
    assert adapted
    assert not any(".stages." in name for name in adapted)
    assert _trained(model) == routers | adapted
    # Frozen weights are those of the dense model, under the same names but for PEFT's base_layer.
    frozen = {name.replace(".base_layer", ""): value for name, value in model.named_parameters() if name not in routers | adapted}
    assert frozen.keys() == dict(expected.named_parameters()).keys()
    assert all(torch.equal(value, frozen[name]) for name, value in expected.named_parameters())


@pytest.mark.parametrize("family", BACKBONES)
def test_by_default_every_linear_map_of_the_layers_is_a_target_and_nothing_else(family: str) -> None:
    model = compressed(family, LEARNED, 0.5, 0.6)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(lora_targets(model, None)) == {name for name in linear if re.search(r"\.layers?\.\d", f".{name}") and ".stages." not in name}


@pytest.mark.parametrize("method", TRAINED, ids=lambda method: method.name)
def test_every_kind_of_method_trains_under_lora_and_its_frozen_weights_get_no_gradient(method: Any) -> None:
    model = compressed("vit", method, 0.5, 0.6)
    learned = {name for name, _ in model.named_parameters() if ".stages." in name}
    reached = {name for name in learned if _gradients(compressed("vit", method, 0.5, 0.6)).get(name) is not None}
    add_lora(model, LoraConfig(r=2, modules_to_save=["classifier"]))
    gradients = _gradients(model)
    assert {name for name, gradient in gradients.items() if gradient is not None and not is_lora(name)} == reached | {
        "classifier.weight",
        "classifier.bias",
    }
    assert all(gradients[name] is not None for name in gradients if is_lora(name))


def _gradients(model: Any) -> dict[str, Any]:
    model.train()
    trace = Trace(noise=1.0)
    loss = loss_of(model, images(), trace=trace)
    (loss if trace.auxiliary_loss is None else loss + trace.auxiliary_loss).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_gradient_checkpointing_changes_no_gradient_under_lora() -> None:
    found = []
    for recompute in (False, True):
        model = compressed("vit", LEARNED, 0.5, 0.6)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        add_lora(model, LoraConfig(r=2))
        found.append(_gradients(model))
    assert all(gradient is None or torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


def test_rank_and_alpha_patterns_rslora_and_dora_pass_through() -> None:
    model = compressed("vit", LEARNED, 0.5, 0.6)
    config = LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["q_proj", "fc1"],
        use_rslora=True,
        use_dora=True,
        rank_pattern={"fc1": 3},
        alpha_pattern={"fc1": 5},
    )
    add_lora(model, config)
    layer: Any = model.get_submodule("vit.layers.0")
    assert (layer.attention.q_proj.r["default"], layer.mlp.fc1.r["default"]) == (2, 3)
    assert layer.attention.q_proj.scaling["default"] == pytest.approx(4 / 2**0.5)
    assert layer.mlp.fc1.scaling["default"] == pytest.approx(5 / 3**0.5)
    assert "default" in layer.mlp.fc1.lora_magnitude_vector
    assert not hasattr(layer.mlp.fc2, "lora_A")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ["qproj"]}, r"lora.targets = \['qproj'\]: they match nothing .*q_proj.*all-linear"),
        ({"target_modules": ["local_global"]}, r"lora.targets = \['local_global'\]: they are parts of routers"),
        ({"target_modules": ["q_proj", "score"]}, r"lora.targets = \['score'\]: they are parts of routers"),
        ({"modules_to_save": ["clasifier"]}, r"lora.modules_to_save names 'clasifier', .*classifier, vit"),
        ({"target_modules": ["classifier"], "modules_to_save": ["classifier"]}, r"both name classifier"),
    ],
)
def test_a_wrong_name_is_told_and_changes_nothing(config: dict[str, Any], message: str) -> None:
    model = compressed("vit", LEARNED, 0.5, 0.6)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        add_lora(model, LoraConfig(r=2, **config))
    assert [name for name, _ in model.named_modules()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["vit", "layers", "a.b", "default"])
def test_a_name_that_would_meet_others_is_refused(name: str) -> None:
    model = add_lora(compressed("vit", LEARNED, 0.5, 0.6), LoraConfig(r=2))
    with pytest.raises(ValueError, match="must be a word, and none that a module or an adapter"):
        add_lora(model, LoraConfig(r=2), name)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", ["vit", "clip", "beit"])
def test_merging_changes_no_answer_and_leaves_a_model_that_saves_and_decompresses(family: str, dora: bool, tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", family)
    model = adapted(base, use_dora=dora, use_rslora=True)
    with torch.no_grad():
        before, trace = traced(model, images())
        assert (before - dense(family)(**inputs(model, images())).logits).abs().max() > 0.01
        merged = merge_lora(model)
        after, _ = traced(merged, images(), replay={name: routing.decision for name, routing in trace.routings.items()})
    assert merged is model
    assert (after - before).abs().max() <= 1e-5 * max(1.0, float(before.abs().max()))
    plain = {name for name, _ in dense(family).named_parameters()}
    assert {name for name, _ in model.named_parameters() if ".stages." not in name} == plain
    assert {name for name, _ in decompress(model).named_parameters()} == plain


def test_a_model_with_lora_is_not_saved_as_if_it_were_whole(tmp_path: Path) -> None:
    model = add_lora(compressed("vit", LEARNED, 0.5, 0.6), LoraConfig(r=2))
    with pytest.raises(ValueError, match=r"call laconic.save_adapter, or laconic.merge_lora first"):
        model.save_pretrained(tmp_path)


def test_routers_alone_train_where_nothing_else_is_asked_for() -> None:
    model = compressed("vit", LEARNED, 0.5, 0.6)
    train_only(model, ["classifier"])
    assert _trained(model) == {name for name, _ in model.named_parameters() if ".stages." in name or name.startswith("classifier")}
    assert stages_of(model)
