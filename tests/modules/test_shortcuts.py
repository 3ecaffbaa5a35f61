"""Shortcuts: what tokens that bypass a layer get in place of its update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from laconic import CompressionConfig, StageConfig, Trace, compress, from_pretrained, stages_of, start_routers
from laconic.modules.compress import only_skips
from laconic.modules.config import RestoreConfig
from laconic.modules.cost.cost import CostModel
from laconic.modules.shortcuts.linear import LinearShortcut
from laconic.modules.site import TokenSpec
from tests import matrix
from tests.matrix.decoders import dense, spread, tokens

BATCHES = [{"input_ids": tokens(16, 48, seed)} for seed in range(3)]
LINEAR = {"name": "linear", "rank": 4}


def _left_out(shortcut: Any, site: str = "around", layer: int = 2, **given: Any) -> Any:
    return compress(dense("llama"), CompressionConfig([StageConfig(layer=layer, site=site, keep=0, shortcut=shortcut, **given)]))


def test_a_linear_update_is_found_whatever_the_lengths_of_the_tokens() -> None:
    torch.manual_seed(0)
    shortcut, tokens = LinearShortcut(TokenSpec(12, 0), rank=3), torch.randn(600, 12) * torch.rand(600, 1).exp()
    length = tokens.square().mean(-1, keepdim=True).sqrt()
    updates = length * (tokens / length @ torch.randn(12, 3) @ torch.randn(3, 12) + torch.randn(12))
    assert not shortcut.fitted
    assert torch.equal(shortcut(tokens), torch.zeros_like(tokens))
    assert shortcut.fit(tokens, updates) == pytest.approx(1, abs=1e-4)
    assert shortcut.fitted
    torch.testing.assert_close(shortcut(tokens), updates, rtol=0, atol=0.02 * float(updates.abs().max()))
    # Of noise it predicts nothing that it has not seen.
    assert LinearShortcut(TokenSpec(12, 0), rank=3).fit(tokens, torch.randn(600, 12)) < 0.05


@pytest.mark.parametrize("site", ["around", "around_attention", "around_mlp"])
def test_a_layer_left_out_with_a_shortcut_is_nearer_to_the_whole_model(site: str) -> None:
    whole, plain, model = dense("llama"), _left_out(None, site), _left_out({"name": "linear", "rank": 32}, site)
    assert torch.equal(model(tokens(4, 40, 7)).logits, plain(tokens(4, 40, 7)).logits)
    found = start_routers(model, BATCHES)
    assert found.scorers == {}
    assert list(found.shortcuts) == [f"{site}_2"]
    assert 0 < found.shortcuts[f"{site}_2"] < 1
    assert not start_routers(model, BATCHES)
    with torch.no_grad():
        wanted = whole(tokens(4, 40, 7)).logits
        far, near = ((one(tokens(4, 40, 7)).logits - wanted).norm() for one in (plain, model))
    assert near < far


def test_protected_tokens_get_nothing() -> None:
    # Around the last layer, behind which tokens no longer meet.
    model, plain, ids = spread(_left_out(LINEAR, layer=3, protect={"first": 3})), _left_out(None, layer=3), tokens(2, 20)
    with torch.no_grad():
        changed = (model(ids).logits - plain(ids).logits).abs().sum(-1) > 0
    assert not changed[:, :3].any()
    assert changed[:, 3:].all()
    # By default the sink.
    (stage,) = stages_of(_left_out(LINEAR)).values()
    assert stage.config.first == 1


def test_a_model_without_layers_but_with_shortcuts_generates_alike_with_a_cache_is_saved_and_is_no_ordinary_model(tmp_path: Path) -> None:
    model = _left_out(LINEAR)
    start_routers(model, BATCHES)
    assert not only_skips(model)
    ids = tokens(2, 12)
    answers = [model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*answers)
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)
    loaded = stages_of(again)["around_2"].shortcut
    assert loaded is not None
    assert loaded.fitted
    assert loaded.up.weight.abs().sum() > 0


def test_thresholds_of_shorter_sequences_are_set_before_parts_are_fitted() -> None:
    stages = [
        StageConfig(layer=1, site="before", keep=0.5, scorer="linear", selector="threshold", merger="drop"),
        StageConfig(layer=2, site="around", keep=0.5, scorer="update", selector="threshold", shortcut=LINEAR),
    ]
    config = CompressionConfig(stages, RestoreConfig(3, "dechunk"))
    model = compress(dense("llama"), config)
    found = start_routers(model, BATCHES)
    assert found.scorers.keys() == found.shortcuts.keys() == {"around_2"}
    model(tokens(2, 24))


def test_its_macs_count() -> None:
    costs = [CostModel(_left_out(shortcut), size=24)() for shortcut in (None, LINEAR)]
    assert costs[1].macs - costs[0].macs == 2 * 24 * 32 * 4
    trace, model = Trace(), _left_out(LINEAR)
    model(tokens(2, 24), trace=trace)
    assert CostModel(model, size=24).achieved(trace) == pytest.approx(costs[1].macs_ratio)


def test_images_have_shortcuts_too() -> None:
    stages = [StageConfig(layer=2, site="around", keep=0.5, scorer="random", shortcut=LINEAR)]
    model = compress(matrix.dense("vit"), CompressionConfig(stages))
    images = {"pixel_values": matrix.images()}
    before = model(**images).logits
    assert start_routers(model, [images, images]).shortcuts.keys() == {"around_2"}
    assert not torch.equal(model(**images).logits, before)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"site": "before", "keep": 0.5, "shortcut": "linear"}, "no layer is bypassed there that shortcut 'linear' could replace"),
        ({"site": "around", "keep": 0.5, "shortcut": {"name": "linear", "rank": 99}}, "must be an integer from 1 to 32, the hidden size"),
        ({"site": "around", "keep": 0.5, "shortcut": "quadratic"}, "quadratic"),
    ],
)
def test_wrong_shortcuts_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress(dense("llama"), CompressionConfig([StageConfig(layer=2, **given)]))
