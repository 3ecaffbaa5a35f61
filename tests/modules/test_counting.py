"""Count rules and MACs against published and recomputed figures."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from laconic import CompressionConfig, StageConfig, Trace
from laconic.modules.cost.cost import CostModel
from laconic.modules.cost.count_rules import COUNT_RULES, StageCount, cosine_keep, tokens_kept
from laconic.modules.cost.shape import LayerTokens, StackShape
from tests.matrix import PAIRS, Method, compressed, dense, images, inputs
from tests.thin import pairs, thinned


def _vit(width: int, layers: int, patch: int = 16, side: int = 224) -> StackShape:
    patches = (side // patch) ** 2
    return StackShape(
        hidden=width,
        intermediate=4 * width,
        layers=layers,
        heads=width // 64,
        protected=1,
        routable=patches,
        embed_macs=patches * width * 3 * patch**2,
        head_macs=width * 1000,
    )


def _formula(shape: StackShape, attention: list[int], mlp: list[int], classes: int = 1000) -> float:
    """The papers' convention, written out apart from the code under test. GMACs."""
    c = shape.hidden
    blocks = sum(4 * n * c * c + 2 * n * n * c + 8 * m * c * c for n, m in zip(attention, mlp, strict=True))
    patch = round((shape.embed_macs / (shape.routable * c * 3)) ** 0.5)
    return (shape.routable * c * 3 * patch**2 + blocks + c * classes) / 1e9


@pytest.mark.parametrize(
    ("shape", "published"),
    [(_vit(192, 12), 1.254), (_vit(384, 12), 4.599), (_vit(768, 12), 17.564), (_vit(1024, 24), 61.555), (_vit(1280, 32, 14), 167.295)],
    ids=["DeiT-T", "DeiT-S", "DeiT-B", "ViT-L", "ViT-H/14"],
)
def test_dense_macs_are_the_published_ones(shape: StackShape, published: float) -> None:
    ours = shape.model_macs(shape.dense_layers()) / 1e9
    tokens = [shape.routable + 1] * shape.layers
    assert ours == pytest.approx(_formula(shape, tokens, tokens), rel=1e-12)
    assert ours == pytest.approx(published, abs=6e-4)


@pytest.mark.parametrize(("keep", "published"), [(0.9, 3.914), (0.8, 3.349), (0.7, 2.878), (0.6, 2.473), (0.5, 2.147)])
def test_dynamicvit_rows_with_its_own_count_rule(keep: float, published: float) -> None:
    shape, present, layers = _vit(384, 12), 196, []
    rule = COUNT_RULES["dynamicvit"]
    for layer in range(12):
        if layer in (3, 6, 9):
            present = int(rule(present, keep, StageCount(196, layer // 3 - 1)))
        layers.append(present + 1)
    expected = [197] * 3 + [int(196 * keep) + 1] * 3 + [int(196 * keep**2) + 1] * 3 + [int(196 * keep**3) + 1] * 3
    assert layers == expected
    ours = shape.model_macs([LayerTokens(tokens, tokens) for tokens in layers]) / 1e9
    assert ours == pytest.approx(_formula(shape, expected, expected), rel=1e-12)
    assert ours == pytest.approx(published, abs=6e-4)


@pytest.mark.parametrize(("keep", "published"), [(0.9, 4.022), (0.8, 3.477), (0.7, 3.029), (0.6, 2.635), (0.5, 2.309)])
def test_evit_rows_reduce_between_attention_and_mlp(keep: float, published: float) -> None:
    shape, present, layers = _vit(384, 12), 196, []
    for layer in range(12):
        attention = present
        if layer in (3, 6, 9):
            present = int(COUNT_RULES["evit"](present, keep, StageCount(196, 0)))
        layers.append(LayerTokens(attention + 1, present + 1))
    assert shape.model_macs(layers) / 1e9 == pytest.approx(published, abs=6e-4)


def test_dynamicvit_cost_of_a_compressed_model_adds_its_routers() -> None:
    method = Method("dynamicvit", {"scorer": "learned", "count": "dynamicvit"})
    cost = CostModel(compressed("vit", method, 0.7, 0.7))()
    assert dict(cost.kept) == {"before_1": int(36 * 0.7), "before_2": int(36 * 0.49)}
    assert cost.macs == CostModel(dense("vit")).shape.model_macs(cost.layers) + sum(cost.stage_macs.values())
    assert min(cost.stage_macs.values()) > 0


@pytest.mark.parametrize(
    ("present", "keep", "kept"),
    [
        (10, 0.9, 9),
        (100, 0.9, 90),
        (1000, 0.9, 900),
        (10, 0.1, 1),
        (100, 0.1, 10),
        (1000, 0.1, 100),
        (100, 0.145, 15),
        (5, 0.01, 1),
        (0, 0.5, 0),
    ],
)
def test_tokens_kept_rounds_half_up_and_never_empties_a_row(present: int, keep: float, kept: int) -> None:
    assert tokens_kept(present, keep) == kept
    assert tokens_kept(torch.tensor([present]), keep).tolist() == [kept]


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.5])
def test_a_keep_outside_its_range_is_refused(keep: float) -> None:
    with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
        tokens_kept(10, keep)


def test_the_cosine_rule_is_that_of_p_mod() -> None:
    assert [round(cosine_keep(0.5, layer, 32), 4) for layer in (0, 5, 10, 16, 31)] == [1, 0.9372, 0.7645, 0.4747, 0]
    assert sum(cosine_keep(0.5, layer, 32) for layer in range(32)) / 32 == pytest.approx(0.5)
    assert [COUNT_RULES["cosine"](576, 0.5, StageCount(576, layer, 32, 0)) for layer in (0, 5, 31)] == [576, 540, 0]
    # Limited to what a fraction can be.
    assert (cosine_keep(0.8, 0, 32), cosine_keep(0.2, 31, 32)) == (1, 0)


@pytest.mark.parametrize("rule", sorted(COUNT_RULES))
def test_count_rules_agree_on_numbers_and_tensors(rule: str) -> None:
    for keep in (0.1, 0.5, 0.7, 0.93):
        many = COUNT_RULES[rule](torch.arange(1, 400), keep, StageCount(torch.arange(1, 400), 1))
        assert isinstance(many, torch.Tensor)
        assert many.tolist() == [COUNT_RULES[rule](n, keep, StageCount(n, 1)) for n in range(1, 400)]


@pairs(PAIRS, thinned(PAIRS, ["vit"], ("learned", "gumbel", "around", "tome")))
def test_analytic_macs_equal_a_counter_on_the_real_module(family: str, method: Method) -> None:
    model = compressed(family, method, 0.5, 0.6, attn_implementation="eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs(model, images(1)), trace=(trace := Trace()))
    cost = CostModel(model)
    counted, dense_macs = counter.get_total_flops() / 2, cost().dense_macs
    # Where rows keep as many as they like, what this one kept; the same to a hair elsewhere.
    ours = cost.achieved(trace) * dense_macs
    if not method.adaptive:
        assert cost().macs == pytest.approx(ours, rel=1e-6)
    # What is no matrix product (a weighted sum, an average over rows) counts for us and not for the counter.
    # A row that keeps everything has a filler in place of the fused token, which eager attention computes.
    assert ours == pytest.approx(counted, rel=0.03 if method.adaptive and method.merges else 0.006)


@pytest.mark.parametrize(
    ("parts", "site"), [({"scorer": "diversity"}, "before"), ({"scorer": "learned", "merger": "squeeze"}, "between"), ({}, "around")]
)
def test_where_every_token_is_kept_no_router_runs_and_none_is_counted(parts: dict[str, str], site: str) -> None:
    model = compressed("vit", Method("whole", parts, site), 0.5, 0.5)
    keep, counted = dict.fromkeys(CostModel(model)().keep, 1.0), []
    for each in (model, dense("vit")):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            each(**inputs(each, images(1)), **({"trace": (trace := Trace(keep=keep))} if each is model else {}))
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1]
    cost = CostModel(model)
    assert cost(keep).macs_ratio == cost.achieved(trace) == 1.0
    assert set(cost(keep).stage_macs.values()) == {0}
    # A router that learns runs in training.
    trained = Trace(keep=keep)
    model.train()(**inputs(model, images(1)), trace=trained)
    assert [routing.routed for routing in trained.routings.values()] == [parts.get("scorer") != "diversity"] * 2


def test_soft_macs_equal_hard_macs_where_counts_are_whole() -> None:
    cost = CostModel(dense("vit"), CompressionConfig([StageConfig(layer=1, scorer="learned"), StageConfig(layer=3, scorer="random")]))
    hard = cost({"before_1": 0.5, "before_3": 0.5})
    soft = cost.soft({"before_1": torch.tensor(0.5), "before_3": torch.tensor(0.5)})
    assert float(soft) == pytest.approx(hard.macs_ratio, rel=1e-6)
