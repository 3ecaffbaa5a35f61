"""``share``: one decision for several layers. ``spread``: decisions that differ from those of the stage before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from laconic import CompressionConfig, Trace, compress, from_pretrained, stages_of, start_routers
from laconic.modules.cost.cost import CostModel
from tests import matrix
from tests.matrix.decoders import dense, spread, tokens

BLOCK = {"layer": [0, 1, 2], "site": "around", "keep": 0.5, "scorer": "linear", "selector": "threshold", "share": True}


def _model(**parts: Any) -> PreTrainedModel:
    return compress(dense("llama"), CompressionConfig([{**BLOCK, **parts}]))


@pytest.mark.parametrize("parts", [{}, {"layer": ":3"}, {"estimator": "gate"}, {"selector": "gumbel"}, {"site": "around_mlp"}], ids=str)
def test_layers_that_share_process_the_same_tokens_and_one_router_decides(parts: dict[str, Any]) -> None:
    model, trace = spread(_model(**parts)).train(), Trace(step=1)
    chosen = list(stages_of(model).values())
    # Then all of the scorer's gradient is from the layers that follow.
    chosen[0].estimator = None
    logits = model(tokens(), trace=trace).logits
    first, *others = trace.routings.values()
    assert len(others) == 2
    assert all(torch.equal(other.kept_mask, first.kept_mask) for other in others)
    assert not first.kept_mask.all()
    logits.square().mean().backward()
    assert chosen[0].scorer.score.weight.grad.abs().sum() > 0
    assert [sum(p.numel() for p in stage.scorer.parameters()) for stage in chosen[1:]] == [0, 0]
    cost = CostModel(model, size=24)()
    assert [cost.stage_macs[stage.config.key] for stage in chosen] == [24 * 32, 0, 0]
    assert len({layer.mlp for layer in cost.layers[:3]}) == 1


def test_shared_decisions_generate_alike_with_and_without_a_cache_and_are_saved(tmp_path: Path) -> None:
    model = spread(_model(estimator="gate"))
    made = [model.generate(tokens(2), max_new_tokens=4, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*made)
    model.save_pretrained(tmp_path)
    assert torch.equal(from_pretrained(tmp_path)(tokens()).logits, model(tokens()).logits)


def test_one_threshold_of_a_block_is_set() -> None:
    model, trace = _model(scorer="update"), Trace()
    assert list(start_routers(model, [{"input_ids": tokens(8, 40)}]).scorers) == ["around_0"]
    model(tokens(8, 40, 1), trace=trace)
    assert len({routing.achieved for routing in trace.routings.values()}) == 1


def test_images_share_decisions_too() -> None:
    model = compress(
        matrix.dense("vit"), CompressionConfig([{"layer": [1, 2], "site": "around", "keep": 0.5, "scorer": "learned", "share": True}])
    )
    trace = Trace()
    model(pixel_values=matrix.images(), trace=trace)
    first, other = trace.routings.values()
    assert torch.equal(first.kept_mask, other.kept_mask)


def test_with_a_wide_spread_neighbours_take_turns_and_deployed_too() -> None:
    stages = [{"layer": [0, 1, 2], "site": "around", "keep": 0.5, "scorer": "random", "selector": "threshold", "protect": {"first": 0}}]
    apart = compress(dense("llama"), CompressionConfig([{**stages[0], "layer": [0]}, {**stages[0], "layer": [1, 2], "spread": 9.0}]))
    start_routers(apart, [{"input_ids": tokens(8, 24, seed)} for seed in range(3)])
    trace, deployed = Trace(step=1), Trace()
    apart.train()(tokens(), trace=trace)
    apart.eval()(tokens(8), trace=deployed)
    first, second, third = (routing.kept_mask for routing in trace.routings.values())
    assert torch.equal(second, ~first)
    assert torch.equal(third, first)
    first, second, third = (routing.kept_mask for routing in deployed.routings.values())
    assert (second == first).float().mean() < 0.2
    assert [routing.achieved for routing in deployed.routings.values()] == pytest.approx([0.5] * 3, abs=0.15)
    whole = apart(tokens(2)).logits
    start = apart(tokens(2)[:, :20], use_cache=True)
    rest = apart(tokens(2)[:, 20:], past_key_values=start.past_key_values, use_cache=True).logits
    torch.testing.assert_close(rest, whole[:, 20:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"share": True}, "must be true or false, and true is one decision for a span or list of layers, not 1"),
        ({"layer": [1, ":1"], "share": True}, "must be one span, or a list of layers without spans"),
        ({"follows": ":2"}, "follows = ':2' must be one layer, an index or a fraction"),
        ({"spread": -1}, "spread = -1 must be a number of at least 0"),
    ],
)
def test_what_neighbours_cannot_be_is_refused(stage: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompressionConfig([{"layer": 1, "site": "around", "keep": 0.5, **stage}])
