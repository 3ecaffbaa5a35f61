"""Parts of vision-language models: which are frozen, and the learning rate of each."""

from __future__ import annotations

from typing import Any

import pytest

from laconic import CompressionConfig, StageConfig, Trace, compress
from laconic.modules.backbones import adapter_of
from laconic.modules.compress import checkpoint_activations
from laconic.trainer.build.build import build
from laconic.trainer.build.optimization import parameter_groups
from laconic.trainer.build.part_rates import described, groups_of, rates_of
from laconic.trainer.build.trainable import parameter_counts
from laconic.trainer.build.validate import validate
from laconic.trainer.recipe.files import load
from tests.matrix import image_text, visual
from tests.trainer.small_recipes import small

QUICK = ["trainer.max_steps=2", "data.batch_size=4", "data.eval_batch_size=4", "data.train_samples=4", "data.eval_samples=2", "trainer.bench_rounds=0"]  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of vlm_digits that start from a tiny trained folder."""
    return small("vlm_digits", tmp_path_factory.mktemp("start"), QUICK)


@pytest.mark.parametrize(
    "family", ["llava", *(pytest.param(name, marks=[] if name == "qwen3_vl" else pytest.mark.slow) for name in image_text.FAMILIES)]
)
def test_every_parameter_is_of_one_part_and_the_language_model_has_its_embeddings_and_head(family: str) -> None:
    model = visual.dense() if family == "llava" else image_text.dense(family)
    parts = adapter_of(model).parts(model)
    assert list(parts) == [name for name, _ in model.named_parameters()]
    assert set(parts.values()) == {"vision", "projector", "text"}
    of = {part: {name for name, found in parts.items() if found == part} for part in set(parts.values())}
    assert of["text"] == {name for name in parts if name.startswith(("model.language_model", "model.text_model", "lm_head"))}
    # What follows the tower's layers, mergers and connectors, is the projector.
    assert all(any(word in name for word in ("project", "merger", "connector", "newline")) for name in of["projector"])
    assert not any(word in name for name in of["vision"] for word in ("multi_modal", "merger", "connector"))


def test_a_part_has_its_rate_routers_keep_theirs_and_weight_decay_stays() -> None:
    stages = [StageConfig(layer=0, keep=0.5, stack="vision"), StageConfig(layer=1, keep=0.5, scope="visual", stack="text")]
    model = compress(visual.dense(), CompressionConfig(stages))
    plain, by_part = (
        {id(p): group for group in parameter_groups(model, 1.0, 7.0, 0.1, part_lr=given) for p in group["params"]}
        for given in (None, {"vision": 0.25, "text": 0.5})
    )
    for name, parameter in model.named_parameters():
        part = name.split(".")[1] if name.startswith("model.") else "text"
        expected = {"vision_tower": 0.25, "multi_modal_projector": 1.0}.get(part, 0.5)
        assert by_part[id(parameter)]["lr"] == (7.0 if ".stages." in name else expected), name
        assert by_part[id(parameter)]["weight_decay"] == plain[id(parameter)]["weight_decay"]
    assert rates_of(parameter_groups(model, 1.0, 7.0, 0.1, part_lr={"vision": 0.25})) == {"vision": 0.25, "router": 7.0, "backbone": 1.0}


@pytest.mark.parametrize("checkpointed", [False, True])
def test_no_gradient_is_computed_in_a_frozen_tower_without_a_trained_part_before_it(checkpointed: bool) -> None:
    model = compress(visual.dense(), CompressionConfig([StageConfig(layer=0, keep=0.5, stack="projector")])).train()
    for name, part in adapter_of(model).parts(model).items():
        model.get_parameter(name).requires_grad_(part == "text" or ".stages." in name)
    if checkpointed:
        checkpoint_activations(model)
    seen: list[bool] = []
    model.model.vision_tower.encoder.layers[0].register_forward_hook(lambda *given: seen.append(given[-1].requires_grad))
    model.model.multi_modal_projector.register_forward_hook(lambda *given: seen.append(given[-1].requires_grad))
    given = visual.whole()
    model(**given, labels=visual.labels(given["input_ids"]), trace=Trace(), use_cache=False).loss.backward()
    # The router before the projector trains, and its gradient passes through the frozen projector.
    assert seen == [False, True]
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad or parameter.grad is None
        assert not (".stages." in name and "weight" in name) or parameter.grad is not None


def _recipe(start: list[str], *given: str) -> Any:
    return load("vlm_digits", [*start, *given]).recipe


def test_a_recipe_freezes_a_part_and_says_what_trains_at_which_rate(start: list[str]) -> None:
    recipe = _recipe(start, "optimizer.part_lr={vision: 0, projector: 1.0e-3}", "optimizer.lr=2.0e-5", "optimizer.router_lr=0.01")
    parts = build(recipe)
    counts = parameter_counts(parts.model)
    rates = rates_of(groups_of(parts.model, recipe.optimizer))
    assert {name: count["trainable"] > 0 for name, count in counts.items()} == {
        "lora": False, "routers": True, "vision": False, "projector": True, "text": True,
    }  # fmt: skip
    assert rates == {"projector": 1e-3, "backbone": 2e-5, "router": 0.01}
    found = validate(recipe)
    assert found.groups == counts
    assert found.rates == rates
    assert found.trainable == sum(count["trainable"] for count in counts.values())
    line = described(counts, rates)
    assert f"vision 0 of {counts['vision']['total']:,}, frozen; projector" in line
    assert line.endswith(f"text {counts['text']['total']:,} of {counts['text']['total']:,} at 2e-05")
    assert "routers " in line
    assert " at 0.01" in line


@pytest.mark.slow
def test_lora_goes_into_the_parts_that_are_named_each_at_its_rate(start: list[str]) -> None:
    recipe = _recipe(start, "lora={r: 2, parts: [vision, text], modules_to_save: [multi_modal_projector]}", "optimizer.lora_lr=0.1",
                     "optimizer.part_lr={vision: 0.3, projector: 0.2}")  # fmt: skip
    model = build(recipe).model
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    assert {name.split(".")[1] for name in adapted} == {"vision_tower", "language_model"}
    assert all(".layers." in name for name in adapted)
    assert rates_of(groups_of(model, recipe.optimizer)) == {"lora_vision": 0.3, "projector": 0.2, "router": 0.01, "lora": 0.1}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name or "multi_modal_projector" in name for name in trained)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["optimizer.part_lr={tower: 1}"], "optimizer.part_lr names 'tower', which is no part of a llava: the parts are vision, projector, text"),
        (["lora.parts=[head]"], "lora.parts names 'head', which is no part of a llava"),
        (["optimizer.part_lr={text: 1}", "optimizer.layer_decay=0.5"], "part_lr and optimizer.layer_decay = 0.5 both decide"),
        (["lora={}", "optimizer.part_lr={vision: 1}"], "optimizer.part_lr.vision = 1.0 has no effect: lora.mode = 'lora' freezes .*lora.parts"),
        (["lora={}", "optimizer.part_lr={text: 0}"], "optimizer.part_lr.text = 0 freezes what lora trains there, .*out of lora.parts"),
        (["compression=null", "optimizer.part_lr={vision: 0, projector: 0, text: 0}"], "0 for every part, .*nothing would train"),
        (["optimizer.part_lr={vision: -1}"], "optimizer.part_lr.vision = -1: input should be greater than or equal to 0"),
    ],
)  # fmt: skip
def test_what_is_no_part_or_has_no_effect_is_refused(start: list[str], given: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate(_recipe(start, *given))


def test_a_model_of_one_part_is_refused_with_the_key_to_use() -> None:
    with pytest.raises(ValueError, match="part_lr is for models of several parts .*, and a vit has one: remove it, and set optimizer.lr"):
        validate(load("vit_digits_dense", ["optimizer.part_lr={vision: 0}"]).recipe)
