"""Sites: what a stage between, around, or around half of a layer does, against the layer's own arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from laconic import CompressionConfig, StageConfig, Trace, compress, decompress
from laconic.modules.compress import checkpoint_activations
from laconic.modules.cost.cost import CostModel
from laconic.trainer.measure.bench import sliced
from tests.matrix import dense, images, labels, traced

PARTS: dict[str, Any] = {"scorer": {"name": "learned", "detach": True}}
BYPASS = ["around", "around_attention", "around_mlp"]
ALL = ["before", "between", *BYPASS]


def _stage(site: str, layer: int, keep: float, **parts: Any) -> StageConfig:
    return StageConfig(layer=layer, site=site, keep=keep, **(parts or PARTS))


def _model(*stages: StageConfig, **settings: Any) -> Any:
    model = compress(dense("vit", **settings), CompressionConfig(stages))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".stages." in name and parameter.ndim > 1:
                parameter.normal_(0, 0.5)
    return model


def _chosen(trace: Trace, name: str) -> Tensor:
    return trace.routings[name].kept_mask


def _inner(site: str, layer: Any, hidden: Tensor, alive: Tensor) -> Tensor:
    """The layer or its attention half, all tokens computed and those not chosen hidden from attention."""
    mask = alive[:, None, None, :].expand(-1, 1, hidden.shape[1], -1)
    attended = hidden + layer.attention(layer.layernorm_before(hidden), mask)[0]
    return attended + layer.mlp(layer.layernorm_after(attended)) if site == "around" else attended


@pytest.mark.parametrize("site", ["around", "around_attention"])
def test_a_bypass_computes_the_chosen_tokens_alone_and_leaves_the_others(site: str) -> None:
    model, plain = _model(_stage(site, 1, 0.4), _stage(site, 2, 0.6)), dense("vit")
    logits, trace = traced(model, images())
    hidden = plain.vit.embeddings(images())
    for index, layer in enumerate(plain.vit.layers):
        if index not in (1, 2):
            hidden = layer(hidden)
            continue
        chosen = _chosen(trace, f"{site}_{index}")
        hidden = torch.where(chosen.unsqueeze(-1), _inner(site, layer, hidden, chosen), hidden)
        if site == "around_attention":
            hidden = hidden + layer.mlp(layer.layernorm_after(hidden))
    torch.testing.assert_close(logits, plain.classifier(plain.vit.layernorm(hidden)[:, 0]), atol=2e-5, rtol=1e-4)
    assert trace.state is not None
    assert trace.state.tokens == 37
    assert trace.routings[f"{site}_1"].kept == round(0.4 * 36)
    assert trace.routings[f"{site}_1"].bypass


def test_a_bypass_of_the_mlp_leaves_attention_whole() -> None:
    model, plain = _model(_stage("around_mlp", 1, 0.4)), dense("vit")
    logits, trace = traced(model, images())
    hidden = plain.vit.layers[0](plain.vit.embeddings(images()))
    layer = plain.vit.layers[1]
    hidden = hidden + layer.attention(layer.layernorm_before(hidden))[0]
    chosen = _chosen(trace, "around_mlp_1").unsqueeze(-1)
    hidden = torch.where(chosen, hidden + layer.mlp(layer.layernorm_after(hidden)), hidden)
    for after in plain.vit.layers[2:]:
        hidden = after(hidden)
    torch.testing.assert_close(logits, plain.classifier(plain.vit.layernorm(hidden)[:, 0]), atol=2e-5, rtol=1e-4)


def test_a_stage_between_scores_what_attention_made() -> None:
    model, plain = _model(_stage("between", 1, 0.4)), dense("vit")
    logits, trace = traced(model, images())
    hidden = plain.vit.layers[0](plain.vit.embeddings(images()))
    layer = plain.vit.layers[1]
    hidden = hidden + layer.attention(layer.layernorm_before(hidden))[0]
    index = trace.routings["between_1"].decision.index
    hidden = hidden.gather(1, index[..., None].expand(-1, -1, 16))
    hidden = hidden + layer.mlp(layer.layernorm_after(hidden))
    for after in plain.vit.layers[2:]:
        hidden = after(hidden)
    torch.testing.assert_close(logits, plain.classifier(plain.vit.layernorm(hidden)[:, 0]), atol=2e-5, rtol=1e-4)
    assert (trace.flow().layer_tokens[1].attention, trace.flow().layer_tokens[1].mlp) == (37, 15)


@pytest.mark.parametrize("site", ALL)
def test_at_keep_1_outputs_and_gradients_are_the_dense_models_bit_for_bit(site: str) -> None:
    model, plain = _model(_stage(site, 1, 1.0)).train(), dense("vit").train()
    ours = model(pixel_values=images(), labels=labels(), trace=Trace()).loss
    reference = plain(pixel_values=images(), labels=labels()).loss
    assert torch.equal(ours, reference)
    ours.backward()
    reference.backward()
    got = {name: p.grad for name, p in model.named_parameters() if ".stages." not in name}
    for name, parameter in plain.named_parameters():
        if site in ("before", "between"):
            assert torch.equal(got[name], parameter.grad), name
        else:
            # The straight-through weight on what a layer makes of a token rounds its gradient.
            torch.testing.assert_close(got[name], parameter.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("site", ALL)
def test_checkpointing_decides_once_and_gives_the_same_gradients(site: str) -> None:
    results = []
    for checkpointing in (False, True):
        model = _model(_stage(site, 1, 0.5), _stage("between", 2, 0.7)).train()
        if checkpointing:
            checkpoint_activations(model)
        trace = Trace(noise=0.5, step=3)
        loss = model(pixel_values=images(), labels=labels(), trace=trace).loss
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys()
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])


@pytest.mark.parametrize("site", ALL)
def test_scores_get_a_gradient(site: str) -> None:
    model = _model(_stage(site, 1, 0.5, scorer="learned")).train()
    model(pixel_values=images(), labels=labels(), trace=Trace()).loss.backward()
    assert float(model.vit.layers[1].stages[site].scorer.score.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("site", ALL)
def test_cost_counter_and_oracle_agree(site: str) -> None:
    stages = [_stage(site, 1, 0.5, scorer="random"), _stage("between", 2, 0.6, scorer="random"), _stage(site, 3, 0.5, scorer="random")]
    model = _model(*stages, attn_implementation="eager")
    trace = Trace()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(pixel_values=images(1), trace=trace)
    cost = CostModel(model)
    assert cost().macs == pytest.approx(counter.get_total_flops() / 2, rel=1e-6)
    assert cost.achieved(trace) == pytest.approx(cost().macs_ratio)
    assert trace.state is not None
    oracle = sliced(dense("vit", attn_implementation="eager"), trace.flow().layer_tokens, trace.state.tokens)
    with torch.no_grad(), FlopCounterMode(display=False) as theirs:
        oracle(pixel_values=images(1))
    assert theirs.get_total_flops() == counter.get_total_flops()


def test_stages_at_several_sites_of_one_layer_run_in_their_order() -> None:
    stages = [_stage(site, 1, 0.7) for site in ("around_mlp", "between", "around_attention", "before")]
    model = _model(*stages)
    _, trace = traced(model, images())
    assert list(trace.routings) == ["before_1", "around_attention_1", "between_1", "around_mlp_1"]
    tokens = trace.flow().layer_tokens[1]
    assert (tokens.present, tokens.attention, tokens.mlp) == (26, 1 + 18, 1 + 13)
    assert CostModel(model).achieved(trace) == pytest.approx(CostModel(model)().macs_ratio)
    restored = decompress(model)
    assert torch.equal(restored(images()).logits, dense("vit")(images()).logits)


def test_a_stage_inside_a_layer_that_tokens_go_around_is_refused() -> None:
    with pytest.raises(ValueError, match="excludes between_1 inside it"):
        compress(dense("vit"), CompressionConfig([_stage("around", 1, 0.5), _stage("between", 1, 0.5)]))


@pytest.mark.parametrize("site", BYPASS)
def test_padded_rows_bypass_by_their_own_length(site: str) -> None:
    model = _model(_stage(site, 1, 0.5))
    mask = torch.ones(3, 37, dtype=torch.long)
    mask[1, -13:] = 0
    mask[2, -20:] = 0
    together, trace = traced(model, images(), attention_mask=mask)
    for row in range(3):
        alone, _ = traced(model, images()[row : row + 1], attention_mask=mask[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-4)
    assert trace.routings[f"{site}_1"].kept.tolist() == [18, 12, 8]  # type: ignore[union-attr]


@pytest.mark.parametrize("site", ALL)
@pytest.mark.parametrize("layer", [1, 3])
def test_an_estimator_trains_the_scorer_or_is_refused(site: str, layer: int) -> None:
    stages = CompressionConfig([_stage(site, layer, 0.5, scorer="learned", estimator="key_bias")])
    if site == "around_mlp" or (site == "between" and layer == 3):
        with pytest.raises(ValueError, match="no attention follows"):
            compress(dense("vit"), stages)
        return
    model = compress(dense("vit"), stages).train()
    model(pixel_values=images(), labels=labels(), trace=Trace()).loss.backward()
    assert float(model.vit.layers[layer].stages[site].scorer.score.weight.grad.abs().sum()) > 0


def test_achieved_macs_of_larger_images_are_against_the_dense_model_on_them() -> None:
    model = _model(_stage("before", 1, 0.5, scorer="random"))
    _, trace = traced(model, torch.randn(2, 3, 48, 48), interpolate_pos_encoding=True)
    assert CostModel(model).achieved(trace) == pytest.approx(CostModel(model, size=(48, 48))().macs_ratio)


def test_achieved_macs_of_padded_rows_are_against_the_dense_model_on_their_real_tokens() -> None:
    model = _model(_stage("before", 1, 1.0, scorer="random"))
    mask = torch.ones(2, 37, dtype=torch.long)
    mask[1, -20:] = 0
    _, trace = traced(model, images(2), attention_mask=mask)
    assert CostModel(model).achieved(trace) == pytest.approx(1.0)
