"""A model of two stacks: ViT-MAE with its decoder. Stages, restores and attention are those of one stack each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ViTMAEForPreTraining

from laconic import CompressionConfig, StageConfig, Trace, compress, decompress
from laconic.modules.backbones import adapter_of
from laconic.modules.cost.cost import CostModel
from laconic.modules.tokens.ragged import ATTENTION
from tests.modules.test_masked_images import LAYERS, PATCHES, VISIBLE, dense, images

ADAPTIVE: dict[str, Any] = {"scorer": {"name": "learned", "detach": True}, "selector": "threshold"}
PLAIN, BY_STACK = {"layer": LAYERS, "by": "rejoin"}, {"": {"layer": LAYERS, "by": "rejoin"}}


def _attention(model: ViTMAEForPreTraining) -> dict[str, set[str]]:
    """What the layers of each stack will run, by what their attention reads."""
    stacks = adapter_of(model).stacks(model)
    return {stack.name: {layer.attention.config._attn_implementation for layer in stack.layers} for stack in stacks}


def test_the_stacks_have_their_own_layers_adapters_and_settings() -> None:
    model = dense()
    encoder, decoder = adapter_of(model).stacks(model)
    assert (encoder.name, decoder.name) == ("", "decoder")
    assert (list(encoder.layers), list(decoder.layers)) == (list(model.vit.layers), list(model.decoder.decoder_layers))
    assert (encoder.config.hidden_size, decoder.config.hidden_size) == (16, 8)
    assert encoder.adapter.sites
    assert not decoder.adapter.sites
    assert [stack.name for stack in adapter_of(model.vit).stacks(model.vit)] == [""]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            {"stack": "decoder"},
            r"stage 'decoder.before_1': stack = 'decoder' offers no site for a stage: .*hands them nothing but the tokens",
        ),
        ({"stack": "text"}, r"stage 'text.before_1': stack = 'text' does not exist in this model: its stacks are '', 'decoder'"),
    ],
)
def test_a_stage_where_there_can_be_none_is_refused_and_changes_nothing(stage: dict[str, str], message: str) -> None:
    model = dense()
    with pytest.raises(ValueError, match=message):
        compress(model, CompressionConfig([StageConfig(layer=1, keep=0.5, **stage)], PLAIN))  # type: ignore[arg-type]
    assert type(model) is ViTMAEForPreTraining
    assert not hasattr(model.config, "compression")


@pytest.mark.parametrize("parts", [{"scorer": "random"}, ADAPTIVE], ids=["static", "adaptive"])
def test_a_restore_by_stack_is_the_plain_one_bit_for_bit(parts: dict[str, Any]) -> None:
    stages, results = [StageConfig(layer=1, keep=0.5, **parts)], []
    for restore in (PLAIN, BY_STACK):
        config = CompressionConfig(stages, restore)
        assert config.to_dict()["restore"] == PLAIN
        torch.manual_seed(3)
        model = compress(dense(), config).train()
        model(images(), trace=Trace()).loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        out = model.eval()(images(), trace=Trace(step=5))
        results.append((gradients, out.loss, out.logits))
    (one, *of_one), (other, *of_other) = results
    assert all(map(torch.equal, of_one, of_other))
    assert {name: torch.equal(gradient, other[name]) for name, gradient in one.items()} == dict.fromkeys(other, True)


@pytest.mark.parametrize(
    ("restore", "message"),
    [
        ({"": PLAIN, "text": PLAIN}, r"compression.restore.text: there is no such stack in this model: its stacks are '', 'decoder'"),
        ({"": PLAIN, "decoder": {"layer": 2}}, r"compression.restore.decoder has nothing to do: no stage makes the sequence shorter"),
        ({"": {"layer": LAYERS, "how": "x"}}, r"compression\.restore\.how is not a key"),
        ({"": {"by": "rejoin"}}, r"compression\.restore\.layer is missing"),
    ],
)
def test_a_restore_of_another_stack_is_refused(restore: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress(dense(), CompressionConfig([StageConfig(layer=1, keep=0.5)], restore))


def test_restores_of_two_stacks_are_written_and_read_again() -> None:
    restores = {"vision": {"layer": 3, "by": "unmerge"}, "text": {"layer": 2, "by": "rejoin"}}
    stages = [StageConfig(layer=1, keep=0.5, stack=stack) for stack in restores]
    config = CompressionConfig(stages, restores)
    assert config.restore is None
    assert [stage.key for stage in config.stages] == ["vision.before_1", "text.before_1"]
    again = CompressionConfig.from_dict(config.to_dict())
    assert again == config
    assert again.to_dict()["restore"] == restores


def test_rows_are_packed_in_the_stack_that_has_an_adaptive_stage_alone() -> None:
    model = compress(dense(), CompressionConfig([StageConfig(layer=1, keep=0.5, **ADAPTIVE)], PLAIN))
    assert _attention(model) == {"": {ATTENTION}, "decoder": {"sdpa"}}
    encoder, decoder = adapter_of(model).stacks(model)
    assert (encoder.attention, decoder.attention) == (ATTENTION, "sdpa")
    assert [layer.plan.packs for layer in encoder.layers] == [True] * LAYERS
    assert [layer.plan.packs or not layer.plan.dense for layer in decoder.layers] == [False, False]
    seen = _batches(model)
    model.train()(images(), trace=Trace())
    model.eval()
    trace = Trace()
    model(images(), trace=trace)
    kept = trace.routings["before_1"].kept
    assert isinstance(kept, Tensor)
    assert len(set(kept.tolist())) > 1
    # The encoder's layers behind the stage see one row; the decoder's see all rows.
    assert seen["vit"][-1] == 1
    assert set(seen["decoder"]) == {3}
    decompress(model)
    assert _attention(model) == {"": {"sdpa"}, "decoder": {"sdpa"}}
    assert type(model) is ViTMAEForPreTraining


def _batches(model: ViTMAEForPreTraining) -> dict[str, list[int]]:
    """Rows that the MLP of the middle layer of each stack was given, by stack."""
    seen: dict[str, list[int]] = {"vit": [], "decoder": []}
    for name, layer in (("vit", model.vit.layers[1]), ("decoder", model.decoder.decoder_layers[1])):
        layer.mlp.register_forward_pre_hook(lambda _, args, to=seen[name]: to.append(args[0].shape[0]))
    return seen


def test_the_attention_of_the_stack_with_stages_can_be_changed_afterwards() -> None:
    torch.manual_seed(3)
    model = compress(dense(), CompressionConfig([StageConfig(layer=1, keep=0.5, **ADAPTIVE)], PLAIN))
    expected = model(images(), trace=Trace()).logits
    for name, packs in (("eager", False), ("sdpa", True)):
        model.set_attn_implementation(name)
        assert [layer.plan.packs for layer in model.vit.layers] == [packs] * LAYERS
        assert not any(layer.plan.packs for layer in model.decoder.decoder_layers)
        torch.testing.assert_close(model(images(), trace=Trace()).logits, expected, atol=1e-5, rtol=1e-4)
    assert _attention(model) == {"": {ATTENTION}, "decoder": {"sdpa"}}


def test_cost_has_a_shape_by_stack_and_counts_the_one_without_stages_dense() -> None:
    plain = CostModel(dense())
    cost = CostModel(compress(dense(), CompressionConfig([StageConfig(layer=1, keep=0.5, scorer="random")], PLAIN)))
    assert {name: shape.routable for name, shape in cost.shapes.items()} == {"": VISIBLE, "decoder": PATCHES}
    assert cost.shape == cost.shapes[""] == plain.shape
    assert list(cost().stacks) == [""]
    assert [tokens.mlp for tokens in cost().layers] == [19, 10, 10]
    # Layers of the encoder alone are cheaper, and a random choice costs nothing.
    saved = plain.shape.model_macs(plain.shape.dense_layers()) - plain.shape.model_macs(cost().layers)
    assert cost().dense_macs - cost().macs == saved > 0
