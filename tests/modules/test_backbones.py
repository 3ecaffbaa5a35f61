"""What each adapter says of its family, held against the family's own layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from laconic import CompressionConfig, StageConfig, Trace, compress, stages_of
from laconic.modules.backbones import adapter_for, families
from laconic.modules.backbones.head_means import mean_over_heads
from laconic.modules.backbones.model_adapter import ModelAdapter
from laconic.modules.backbones.vision import VisionLayers, VisionModel
from laconic.modules.cost.cost import CostModel
from laconic.modules.tokens.decision import Decision
from laconic.modules.tokens.state import TokenState
from tests.matrix import (
    BACKBONES,
    FAMILIES,
    IMAGE,
    METHODS,
    PATCH,
    Method,
    answer,
    compressed,
    dense,
    images,
    inputs,
    labels,
    masked_reference,
    stack_of,
    traced,
)
from tests.matrix.masked import with_layers_replaced

NOISY = {
    "vit": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
    "deit": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
    "dinov2": {"drop_path_rate": 0.4, "attention_probs_dropout_prob": 0.1},
    "dinov2_with_registers": {"drop_path_rate": 0.4},
    "clip": {"attention_dropout": 0.1},
    "siglip": {"attention_dropout": 0.1},
    "beit": {"drop_path_rate": 0.4, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
    "vit_mae": {"hidden_dropout_prob": 0.1},
}
RANDOM = next(method for method in METHODS if method.name == "random")
each_family = pytest.mark.parametrize("family", BACKBONES)


def _adapter(model: PreTrainedModel) -> type[VisionModel]:
    adapter = adapter_for(model.config.model_type, type(model).__name__)
    assert issubclass(adapter, VisionModel)
    return adapter


def _layer(family: str, index: int = 2, **settings: Any) -> tuple[type[VisionLayers], nn.Module, dict[str, Any]]:
    """A layer and its adapter, with the keyword arguments that its model hands it."""
    model = dense(family, **settings)
    stack = stack_of(model)
    assert issubclass(stack.adapter, VisionLayers)
    twin, recorded = with_layers_replaced(model)
    twin(**inputs(model, images()))
    return stack.adapter, stack.layers[index], {key: value for key, value in recorded.kwargs.items() if key != "attention_mask"}


def _run(layer: nn.Module, forward: Any, tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
    layer.zero_grad()
    hidden = torch.randn(3, tokens, 16, generator=torch.Generator().manual_seed(5), requires_grad=True)
    torch.manual_seed(7)
    out = forward(hidden)
    out.pow(3).sum().backward()
    assert hidden.grad is not None
    return out, {"input": hidden.grad, **{name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}}


@each_family
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_two_halves_are_the_layer_bit_for_bit(family: str, training: bool, masked: bool) -> None:
    adapter, layer, kwargs = _layer(family, **NOISY[family])
    layer.train(training)
    tokens = 36 + FAMILIES[family].prefix
    mask = torch.zeros(3, 1, tokens, tokens).masked_fill(torch.arange(tokens) % 5 == 4, torch.finfo(torch.float32).min)
    given = mask if masked else None
    valid = (torch.arange(tokens) % 5 != 4).expand(3, -1) if masked else None
    state = TokenState.initial(3, tokens, FAMILIES[family].prefix, valid, torch.device("cpu"))
    out, gradients = _run(layer, lambda hidden: layer(hidden, given, **kwargs), tokens)

    def halves(hidden: Tensor) -> Tensor:
        whole = adapter.layer_mask(layer, given, state, hidden.dtype, **kwargs)
        return adapter.mlp_half(layer, adapter.attention_half(layer, hidden, whole, **kwargs))

    ours, of_halves = _run(layer, halves, tokens)
    assert torch.equal(ours, out)
    assert {name: torch.equal(value, of_halves[name]) for name, value in gradients.items()} == dict.fromkeys(gradients, True)
    assert of_halves.keys() == gradients.keys()


@each_family
def test_the_noisy_layers_are_noisy_in_training(family: str) -> None:
    _, layer, kwargs = _layer(family, **NOISY[family])
    hidden = torch.randn(3, 36 + FAMILIES[family].prefix, 16)
    assert not torch.equal(layer.train()(hidden, None, **kwargs), layer.train()(hidden, None, **kwargs))


@each_family
def test_keys_are_those_that_the_attention_computes(family: str) -> None:
    adapter, layer, kwargs = _layer(family)
    seen: list[Tensor] = []
    attention = getattr(layer, adapter.attention)
    attention.k_proj.register_forward_hook(lambda module, given, out: seen.append(out))
    hidden = torch.randn(3, 36 + FAMILIES[family].prefix, 16)
    layer(hidden, None, **kwargs)
    keys = adapter.keys(layer, hidden)
    assert keys.shape == (3, 2, hidden.shape[1], 8)
    assert torch.equal(keys.transpose(1, 2).flatten(2), seen[0])
    torch.testing.assert_close(adapter.mean_keys(layer, hidden), keys.mean(1))


def test_means_over_heads_are_those_of_the_layer_that_stands_where_a_linear_one_was() -> None:
    plain, tokens = nn.Linear(16, 16), torch.randn(2, 5, 16)
    expected = plain(tokens).view(2, 5, 4, 4).mean(2)
    torch.testing.assert_close(mean_over_heads(plain, tokens, 4), expected)
    # Another class may compute something else: LoRA, 4-bit weights.
    torch.testing.assert_close(mean_over_heads(nn.Sequential(plain, nn.ReLU()), tokens, 4), plain(tokens).relu().view(2, 5, 4, 4).mean(2))


@each_family
def test_an_adapter_offers_the_sites_of_its_halves_and_names_its_leading_tokens(family: str) -> None:
    model = dense(family)
    adapter, layers = _adapter(model), stack_of(model).adapter
    assert layers.sites == ("before", "between", "around", "around_attention", "around_mlp")
    assert layers.leading(adapter.stack_config(model.config)) == FAMILIES[family].prefix
    assert adapter.takes_attention_mask is FAMILIES[family].padded
    assert adapter.image_input(model.config) == (IMAGE, IMAGE, 3)


@pytest.mark.parametrize(
    ("family", "method"),
    [(family, method) for family in BACKBONES for method in METHODS if method.name in FAMILIES[family].refuses],
    ids=lambda value: getattr(value, "name", value),
)
def test_methods_that_a_family_cannot_have_are_refused_by_name_and_change_nothing(family: str, method: Method) -> None:
    model = dense(family)
    with pytest.raises(ValueError, match=r"stage 'before_1': scorer '\w+'.* needs .*: take one"):
        compress(model, method.config(0.5, 0.5))
    assert type(model).__name__ == FAMILIES[family].architecture


def _tall(family: str) -> tuple[Tensor, dict[str, Any]]:
    """Images that are larger than the configured size and not square, and what makes the family take them."""
    pixels = torch.randn(3, 3, IMAGE + 3 * PATCH, IMAGE + PATCH, generator=torch.Generator().manual_seed(3))
    # DINOv2 interpolates by itself.
    return pixels, {} if family.startswith("dinov2") else {"interpolate_pos_encoding": True}


@each_family
def test_larger_images_with_interpolated_positions_are_dense_at_keep_1(family: str) -> None:
    pixels, how = _tall(family)
    plain, model = dense(family), compressed(family, METHODS[0], 1.0, 1.0)
    assert torch.equal(traced(model, pixels, **how)[0], answer(plain(**inputs(plain, pixels), **how)))


@each_family
@pytest.mark.parametrize("name", ["learned_fuse", "patch_energy", "uniform_grid", "evidence_pixels"])
def test_larger_images_are_scored_and_dropped_on_their_own_grid(family: str, name: str) -> None:
    if name in FAMILIES[family].refuses:
        name = "random"
    pixels, how = _tall(family)
    model = compressed(family, next(method for method in METHODS if method.name == name), 0.5, 0.6)
    logits, trace = traced(model, pixels, **how)
    assert trace.flow().grid == (9, 7)
    assert trace.flow().original == 63
    reference = masked_reference(dense(family), family, pixels, trace, **how)
    torch.testing.assert_close(logits, reference, atol=2e-5, rtol=1e-4)


@each_family
def test_cost_at_another_image_size_equals_a_counter(family: str) -> None:
    pixels, how = _tall(family)
    model = compressed(family, RANDOM, 0.5, 0.6, attn_implementation="eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        traced(model, pixels[:1], **how)
    ours = CostModel(model, size=(pixels.shape[2], pixels.shape[3]))
    assert ours.shape.routable == 63
    assert ours().macs == pytest.approx(counter.get_total_flops() / 2, rel=0.006)


@each_family
def test_rows_that_keep_different_counts_equal_the_rows_alone(family: str) -> None:
    """Filler of adaptive counts: out of attention, and out of heads that average or attend."""
    model = compressed(family, RANDOM, 0.5, 0.6)
    prefix = FAMILIES[family].prefix
    lists = [[*range(prefix), *(prefix + place for place in kept)] for kept in ([1, 4, 7, 9, 30], [0, 2, 35], [5, 6, 8, 20])]
    longest = max(map(len, lists))
    index = torch.tensor([one + [35 + prefix] * (longest - len(one)) for one in lists])
    valid = torch.tensor([[True] * len(one) + [False] * (longest - len(one)) for one in lists])
    everything = torch.arange(longest).expand(3, -1)
    together, trace = traced(model, images(), replay={"before_1": Decision(index, valid), "before_2": Decision(everything, valid)})
    assert trace.state is not None
    assert trace.state.valid is not None
    for row, one in enumerate(lists):
        replay = {"before_1": Decision(torch.tensor([one]), None), "before_2": Decision(torch.arange(len(one))[None], None)}
        alone, _ = traced(model, images()[row : row + 1], replay=replay)
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-4)


def test_the_attention_pool_of_siglip_does_not_see_filler() -> None:
    tower = dense("siglip").vision_model
    model = compress(copy.deepcopy(tower), CompressionConfig([StageConfig(layer=1, keep=0.5, scorer="random")]))
    index, valid = torch.tensor([[1, 4, 7], [2, 9, 35]]), torch.tensor([[True] * 3, [True, True, False]])
    out = model(pixel_values=images(2), trace=Trace(replay={"before_1": Decision(index, valid)}))
    for row, one in enumerate(([1, 4, 7], [2, 9])):
        alone = model(pixel_values=images(2)[row : row + 1], trace=Trace(replay={"before_1": Decision(torch.tensor([one]), None)}))
        torch.testing.assert_close(alone.pooler_output[0], out.pooler_output[row], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "shared_and_own"])
def test_the_bias_that_all_layers_of_a_beit_share_is_gathered(own: bool) -> None:
    settings = {"use_shared_relative_position_bias": True, "use_relative_position_bias": own}
    plain, whole, half = dense("beit", **settings), *(compressed("beit", RANDOM, keep, 1.0, **settings) for keep in (1.0, 0.5))
    assert torch.equal(traced(whole, images())[0], plain(images()).logits)
    logits, trace = traced(half, images())
    torch.testing.assert_close(logits, masked_reference(plain, "beit", images(), trace), atol=2e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="attention_mask cannot be given"):
        traced(half, images(), attention_mask=torch.ones(3, 37, dtype=torch.long))


def test_registers_are_protected_and_the_classifier_averages_patches_alone() -> None:
    if "dinov2_with_registers" not in BACKBONES:
        pytest.skip("this version's DINOv2 cannot be compressed")
    model = compressed("dinov2_with_registers", RANDOM, 0.1, 0.1)
    _, trace = traced(model, images())
    assert trace.state is not None
    assert trace.state.position[:, :4].tolist() == [[0, 1, 2, 3]] * 3
    assert bool((trace.state.position[:, 4:] >= 4).all())
    hidden = _adapter(dense("dinov2_with_registers")).base(dense("dinov2_with_registers")).embeddings(images())
    assert torch.equal(hidden[:, 1:4], model.dinov2_with_registers.embeddings.register_tokens.expand(3, -1, -1))


def test_mae_routes_the_patches_that_its_masking_left() -> None:
    model = compressed("vit_mae", RANDOM, 0.5, 1.0, mask_ratio=0.75)
    out, trace = traced(model, images())
    assert (trace.flow().original, [trace.flow().layer_tokens[index].mlp for index in range(4)]) == (9, [10, 6, 6, 6])
    assert CostModel(model).shape.routable == 9
    assert out.shape == (3, 16)


def test_a_dinov2_whose_layers_take_no_mask_is_refused_before_anything_changes() -> None:
    class Old(nn.Module):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return hidden_states

    model = dense("vit")
    model.encoder = nn.Module()
    model.encoder.layer = nn.ModuleList([Old()])
    model.base_model_prefix = ""
    with pytest.raises(ValueError, match="install transformers 5.23"):
        families()["dinov2"].check(model)


@pytest.mark.parametrize(
    ("family", "name", "why"),
    [
        ("clip", "CLIPModel", "it holds a text model"),
        ("siglip", "SiglipModel", "it holds a text model"),
        ("vit", "ViTForMaskedImageModeling", "it serves ViTModel"),
    ],
)
def test_classes_that_cannot_be_compressed_say_why(family: str, name: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*{why}"):
        adapter_for(family, name)


def test_towers_of_clip_and_siglip_can_be_compressed_alone() -> None:
    small: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE,
        "patch_size": PATCH,
    }
    clip, siglip = CLIPVisionConfig(**small, projection_dim=8), SiglipVisionConfig(**small)
    config = CompressionConfig([StageConfig(layer=1, keep=0.5, scorer="random")])
    for model, prefix, name in (
        (CLIPVisionModel(clip), 1, "pooler_output"),
        (CLIPVisionModelWithProjection(clip), 1, "image_embeds"),
        (SiglipVisionModel(siglip), 0, "pooler_output"),
    ):
        plain = copy.deepcopy(model.eval())
        whole = compress(copy.deepcopy(model), CompressionConfig([StageConfig(layer=1, keep=1.0, scorer="random")]))
        assert torch.equal(getattr(whole(images()), name), getattr(plain(images()), name))
        out = compress(model, config)(images())
        assert out.last_hidden_state.shape[1] == prefix + 18
        assert getattr(out, name).shape[0] == 3


def test_every_adapter_is_told_apart_by_its_model_type() -> None:
    found = families()
    assert {name: adapter.model_type for name, adapter in found.items()} == {name: name for name in found}
    assert ModelAdapter not in found.values()
    assert VisionModel not in found.values()
    assert set(found) >= {AutoConfig.for_model(family).model_type for family in FAMILIES}


def test_labels_reach_a_nested_tower_by_the_trace_or_where_the_caller_has_none_by_the_model() -> None:
    model, seen = compressed("siglip", METHODS[0], 0.5, 0.5), list[Trace]()
    stages_of(model)["before_1"].register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    given = Trace(labels=labels().flip(0))
    model(images(), labels=labels(), trace=given)
    model(images(), labels=labels())
    assert seen[0] is given
    assert given.labels is not None
    assert torch.equal(given.labels, labels().flip(0))
    assert seen[1].labels is not None
    assert torch.equal(seen[1].labels, labels())
    assert given.flow().leading == 0
    # The labels of the model's own loss stay there.
    bare = Trace()
    model(images(), labels=labels(), trace=bare)
    assert bare.labels is None
