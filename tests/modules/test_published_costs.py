"""Published costs of published methods, each as a row of parts on a real backbone; no weights are made."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from laconic import CompressionConfig, StageConfig
from laconic.modules.cost.cost import CostModel
from laconic.modules.cost.shape import LayerTokens

WIDTHS = {"T": 192, "S": 384, "B": 768}
# Tokens in the MLP of each block with CLS, as DiffRate's "2.9" of DeiT-S publishes them: what pruning and what merging leave.
PRUNED = [197, 196, 190, 168, 150, 139, 129, 117, 99, 78, 58, 3]
MERGED = [197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3]


def _gmacs(size: str, stages: list[StageConfig]) -> tuple[float, list[float]]:
    """Cost without routers, the papers' convention, and the tokens of every MLP, CLS included."""
    width = WIDTHS[size]
    config = ViTConfig(hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 64, num_labels=1000)
    with torch.device("meta"):
        cost = CostModel(ViTForImageClassification(config), CompressionConfig(stages))
    result = cost()
    return cost.shape.model_macs(result.layers) / 1e9, [tokens.mlp for tokens in result.layers]


def _tome(removed: list[int]) -> list[StageConfig]:
    stages, present = [], 196
    for layer, number in enumerate(removed):
        # Asking for fewer than half is answered with half, as in the paper.
        present = max(1, present - number)
        stages.append(StageConfig(layer=layer, site="between", tokens=present, scorer="bipartite", merger="bipartite"))
        present = max(present, present + number - (present + number) // 2)
    return stages


@pytest.mark.parametrize(
    ("size", "removed", "left", "published"),
    [
        ("T", 8, 101, 0.924),
        ("T", 12, 53, 0.769),
        ("T", 16, 11, 0.622),
        ("S", 8, 101, 3.416),
        ("S", 13, 41, 2.703),
        ("S", 16, 11, 2.291),
    ],
)
def test_tome_merges_between_attention_and_mlp_of_every_block(size: str, removed: int, left: int, published: float) -> None:
    gmacs, tokens = _gmacs(size, _tome([removed] * 12))
    assert tokens[-1] == left
    assert gmacs == pytest.approx(published, abs=6e-4)


def test_tome_decreasing_schedule() -> None:
    gmacs, tokens = _gmacs("S", _tome([32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0]))
    assert tokens == [165, 136, 110, 87, 67, 50, 36, 25, 17, 12, 10, 10]
    assert gmacs == pytest.approx(1.539, abs=6e-4)


@pytest.mark.parametrize(("keep", "published"), [(0.9, 4.022), (0.8, 3.477), (0.7, 3.029), (0.6, 2.635), (0.5, 2.309)])
def test_evit_of_deit_s(keep: float, published: float) -> None:
    stages = [
        StageConfig(layer=layer, site="between", keep=keep, scorer="cls_attention", merger="fuse", count="evit") for layer in (3, 6, 9)
    ]
    assert _gmacs("S", stages)[0] == pytest.approx(published, abs=6e-4)


@pytest.mark.parametrize(("keep", "published"), [(0.7, 11.6139), (0.5, 8.8227), (0.25, 6.5328), (0.1, 5.6370)])
def test_evit_of_vit_b(keep: float, published: float) -> None:
    stages = [
        StageConfig(layer=layer, site="between", keep=keep, scorer="cls_attention", merger="fuse", count="evit") for layer in (3, 6, 9)
    ]
    assert _gmacs("B", stages)[0] == pytest.approx(published, rel=5e-4)


def test_diffrate_keeps_given_numbers_of_tokens() -> None:
    kept = [min(pair) for pair in zip(PRUNED, MERGED, strict=True)]
    stages = [StageConfig(layer=layer, site="between", tokens=count - 1, scorer="cls_attention") for layer, count in enumerate(kept)]
    gmacs, tokens = _gmacs("S", stages)
    assert tokens == kept
    assert gmacs == pytest.approx(2.905, abs=6e-4)


def _text_cost(model_class: type[PreTrainedModel], config: PretrainedConfig, tokens: int, stages: list[StageConfig]) -> CostModel:
    with torch.device("meta"):
        return CostModel(model_class(config), CompressionConfig(stages), size=tokens)


def test_ltp_counts_a_layer_of_a_bert() -> None:
    # 12Ld² + 2dL² (arXiv 2107.00910) with L = 128 and d = 768.
    cost = _text_cost(BertForSequenceClassification, BertConfig(), 128, [StageConfig(layer=0, keep=1.0, scorer="random")])
    assert cost().layers[0] == LayerTokens(128, 128)
    assert cost.shape.layer_macs(cost().layers[0]) == 931_135_488
    # Twelve of them, the pooler and the classifier, which read [CLS] alone.
    assert cost().dense_macs == 12 * 931_135_488 + 768 * 768 + 768 * 2


@pytest.mark.parametrize(("width", "routed", "every_other"), [(768, 0.0913462, 0.545673), (1024, 0.0976563, 0.548828)])
def test_mixture_of_depths_around_every_other_layer_of_a_gpt(width: int, routed: float, every_other: float) -> None:
    config = GPT2Config(n_positions=2048, n_embd=width, n_layer=12, n_head=width // 64)
    stages = [StageConfig(layer=layer, site="around", keep=0.125, scorer="linear", protect={"first": 0}) for layer in range(1, 12, 2)]
    cost = _text_cost(GPT2LMHeadModel, config, 2048, stages)
    result, dense = cost(), cost.shape.layer_macs(LayerTokens(2048, 2048))
    assert {tokens.attention for tokens in result.layers} == {2048, 256}
    macs = [cost.shape.layer_macs(tokens) for tokens in result.layers]
    assert macs[1] / dense == pytest.approx(routed, abs=6e-8)
    assert sum(macs) / (12 * dense) == pytest.approx(every_other, abs=6e-7)


def test_mixture_of_depths_at_half_capacity_leaves_a_quarter_of_the_attention_products() -> None:
    shape = _text_cost(BertForSequenceClassification, BertConfig(), 128, [StageConfig(layer=0, keep=1.0, scorer="random")]).shape
    products = [shape.layer_macs(LayerTokens(tokens, 0)) - 4 * tokens * 768**2 for tokens in (64, 128)]
    assert products[0] / products[1] == 0.25


def _image_part(tokens: int, stages: list[StageConfig]) -> tuple[float, list[float]]:
    """10¹² MACs of the layers of a Llama 7B over visual tokens alone, the convention of the papers, and the tokens of each layer."""
    with torch.device("meta"):
        cost = CostModel(LlavaForConditionalGeneration(LlavaConfig()), CompressionConfig(stages, {"text": {"layer": 32, "by": "rejoin"}}))
    cost.shapes["text"] = replace(cost.shape, protected=0, routable=tokens)
    layers = cost().layers
    return sum(map(cost.shape.layer_macs, layers)) / 1e12, [layer.mlp for layer in layers]


def _drops(layers: tuple[int, ...], keep: float) -> list[StageConfig]:
    return [StageConfig(layer=layer, keep=keep, scorer="last_query", count="dynamicvit", stack="text", scope="visual") for layer in layers]


@pytest.mark.parametrize(("tokens", "published"), [(576, 3.817), (2880, 20.825), (5184, 40.616), (2048, 14.362)])
def test_the_dense_image_part_is_the_published_one(tokens: int, published: float) -> None:
    macs, layers = _image_part(tokens, _drops((2,), 1.0))
    assert layers == [tokens] * 32
    assert macs == pytest.approx(published, abs=6e-4)


def test_an_image_of_a_llava_of_7b_is_576_tokens() -> None:
    with torch.device("meta"):
        cost = CostModel(LlavaForConditionalGeneration(LlavaConfig()))
    assert (cost.shape.routable, cost.shape.protected) == (576, 64)


@pytest.mark.parametrize(("tokens", "published"), [(576, 2.007), (2880, 10.554)])
def test_fastv_prunes_half_of_the_visual_tokens_before_layer_2(tokens: int, published: float) -> None:
    macs, layers = _image_part(tokens, _drops((2,), 0.5))
    assert layers == [tokens] * 2 + [tokens // 2] * 30
    assert macs == pytest.approx(published, abs=6e-4)


@pytest.mark.parametrize(
    ("tokens", "layers", "keep", "published"),
    [
        (576, (8, 16, 24), 0.4, 1.538),
        (576, (8, 16, 24), 0.5, 1.777),
        (576, (8, 16, 24), 0.6, 2.060),
        (576, (10, 20), 0.5, 2.134),
        (576, (6, 12, 18, 24), 0.5, 1.391),
        (2880, (8, 16, 24), 0.4, 8.217),
        (2880, (8, 16, 24), 0.5, 9.465),
        (2880, (8, 16, 24), 0.6, 10.980),
        (5184, (8, 16, 24), 0.5, 18.076),
        (2048, (8, 16, 24), 0.5, 6.582),
    ],
)
def test_pyramiddrop_leaves_a_power_of_lambda_at_each_stage(tokens: int, layers: tuple[int, ...], keep: float, published: float) -> None:
    macs, left = _image_part(tokens, _drops(layers, keep))
    stages = [0, *layers, 32]
    expected = [math.floor(tokens * keep**stage + 1e-9) for stage in range(len(layers) + 1)]
    assert left == [count for stage, count in enumerate(expected) for _ in range(stages[stage + 1] - stages[stage])]
    if (tokens, keep, len(layers)) == (576, 0.5, 3):
        assert expected == [576, 288, 144, 72]
        assert sum(left) / 32 == 270
        assert 1 - sum(left) / 32 / 576 == 0.53125
    assert macs == pytest.approx(published, abs=6e-4)
