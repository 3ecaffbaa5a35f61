"""Routers before training: scorer ``update`` predicts what its layer changes, and thresholds keep what is requested."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedModel

from laconic import CompressionConfig, StageConfig, Trace, compress, stages_of, start_routers
from laconic.modules.budget.start_routers import calibrate_other_keeps
from laconic.modules.scorers.update import UpdateScorer, rank_correlation
from laconic.modules.site import TokenSpec
from laconic.modules.tokens.trace import Update
from tests.matrix import spread
from tests.matrix.decoders import dense, tokens

BATCHES = [{"input_ids": tokens(16, 48, seed)} for seed in range(3)]
HELD_OUT = {"input_ids": tokens(16, 48, 9)}


def _model(site: str = "around", weight: float = 0.0, **parts: str) -> PreTrainedModel:
    scorer = {"name": "update", "weight": weight}
    stages = [StageConfig(layer=layer, site=site, keep=0.5, scorer=scorer, selector="threshold", **parts) for layer in (1, 2)]
    return compress(dense("llama"), CompressionConfig(stages))


@pytest.mark.parametrize("site", ["around", "around_mlp"])
def test_tokens_that_a_layer_changes_most_pass_and_as_many_as_requested(site: str) -> None:
    model = _model(site)
    weights = {name: value.clone() for name, value in model.state_dict().items() if ".stages." not in name}
    ranks = start_routers(model, BATCHES).scorers
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in weights.items())
    assert not model.training
    assert min(ranks.values()) > 0.5
    everything = Trace(keep=dict.fromkeys(ranks, 1.0), updates=ranks)
    chosen = Trace()
    with torch.no_grad():
        model(**HELD_OUT, trace=everything)
        model(**HELD_OUT, trace=chosen)
    for name, routing in everything.routings.items():
        assert routing.update is not None
        assert rank_correlation(routing.scores.flatten(), routing.update.size.flatten()) > 0.5
        assert chosen.routings[name].achieved == pytest.approx(0.5, abs=0.12)
    first = everything.routings[next(iter(ranks))]
    assert first.update is not None
    passes = chosen.routings[first.stage].kept_mask
    assert first.update.size[passes].mean() > first.update.size[~passes].mean()


def test_a_router_that_is_fitted_stays_as_it_is() -> None:
    model = _model()
    start_routers(model, BATCHES)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert not start_routers(model, [HELD_OUT])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_any_threshold_of_a_causal_model_is_set() -> None:
    stages = [StageConfig(layer=layer, site="around", keep=0.25, scorer="linear", selector="threshold") for layer in (1, 2)]
    model, trace = compress(dense("llama"), CompressionConfig(stages)).train(), Trace()
    with pytest.raises(ValueError, match=r"thresholds of stages around_1, around_2 have seen no score.*laconic.start_routers"):
        model.eval().generate(tokens(1), max_new_tokens=2)
    model.train()
    assert not start_routers(model, BATCHES)
    assert model.training
    model.eval()(**HELD_OUT, trace=trace)
    assert [routing.achieved for routing in trace.routings.values()] == pytest.approx([0.25, 0.25], abs=0.08)


def test_thresholds_of_other_keeps_are_measured_where_earlier_stages_have_that_keep_too() -> None:
    stages = [StageConfig(layer=layer, site="around", keep=0.25, scorer="linear", selector="threshold") for layer in (1, 2)]
    model = spread(compress(dense("llama"), CompressionConfig(stages)), seed=0, std=1.0)

    def strayed(keep: float) -> float:
        far = 0.0
        traces = [Trace(keep=dict.fromkeys(stages_of(model), keep)) for _ in BATCHES]
        for batch, trace in zip(BATCHES, traces, strict=True):
            model(**batch, trace=trace)
        for name in stages_of(model):
            far = max(far, abs(sum(float(trace.routings[name].achieved) for trace in traces) / len(BATCHES) - keep))
        return far

    # What layer 2 scores depends on how many tokens layer 1 processes.
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(30)
    for stage in stages_of(model).values():
        stage.selector.reset()
    start_routers(model, BATCHES)
    with torch.no_grad():
        own, rough = strayed(0.25), strayed(0.9)
        calibrate_other_keeps(model, list(stages_of(model)), BATCHES)
        assert strayed(0.25) == own
        assert rough > 0.05
        assert max(strayed(keep) for keep in (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.8, 0.9)) < 0.03


def test_the_auxiliary_loss_is_the_error_of_the_prediction_for_processed_tokens() -> None:
    model = _model(weight=0.5)
    trace = Trace(step=1, updates=stages_of(model))
    start_routers(model, BATCHES)
    model.train()(**HELD_OUT, trace=trace)
    for name, routing in trace.routings.items():
        assert routing.update is not None
        mean, deviation, _ = stages_of(model)[name].scorer.target
        scores = routing.scores.gather(1, routing.decision.index)
        expected = 0.5 * (scores - (routing.update.size.log() - mean) / deviation).square().mean()
        assert routing.auxiliary_loss is not None
        assert float(routing.auxiliary_loss) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("number", [400, 60], ids=["more tokens than features", "fewer"])
def test_a_linear_rule_is_found(number: int) -> None:
    torch.manual_seed(0)
    scorer, x = UpdateScorer(TokenSpec(hidden_size=80, classes=0, causal=True)), torch.randn(number, 80)
    rule = torch.zeros(80).index_fill(0, torch.arange(3), 1.0)
    found = scorer.fit(x, (0.5 * torch.nn.functional.layer_norm(x, (80,)) @ rule - 0.2 * x.norm(dim=-1).log()).exp())
    assert found > (0.99 if number > 80 else 0.4)
    assert scorer.fitted


@pytest.mark.parametrize("hidden", [0, pytest.param(32, marks=pytest.mark.slow)])
def test_a_hidden_layer_finds_what_is_no_linear_rule_and_is_left_out_where_there_is_nothing(hidden: int) -> None:
    torch.manual_seed(0)
    spec, x = TokenSpec(hidden_size=16, classes=0, causal=True), torch.randn(4000, 16)
    scorer = UpdateScorer(spec, hidden=hidden)
    found = scorer.fit(x, torch.nn.functional.layer_norm(x, (16,))[:, 0].square().exp())
    assert (found > 0.8) if hidden else (found < 0.3)
    nothing = UpdateScorer(spec, hidden=hidden)
    nothing.fit(x[:300], torch.rand(300).exp())
    if hidden:
        assert not nothing.narrow.weight.any()
        # The same scores in a forward.
        assert rank_correlation(scorer(SimpleNamespace(hidden_states=x)).scores, x[:, 0].square()) > 0.6


def test_an_update_by_hand() -> None:
    # The third token has no length, to which its change could be relative.
    before = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]]])
    update = Update.of(before, torch.tensor([[[3.0, 4.0], [1.0, 2.0], [1.0, 1.0]]]), None)
    assert update.size[:, :2].tolist() == [[0.0, 2.0]]
    assert update.real.tolist() == [[True, True, False]]
    assert update.mean() == pytest.approx((1.0, (1 + 5**-0.5) / 2))


def test_at_a_site_where_no_layer_is_bypassed_it_is_refused() -> None:
    with pytest.raises(ValueError, match="scorer 'update' predicts what a layer adds: take site 'around'"):
        compress(dense("llama"), CompressionConfig([StageConfig(layer=1, keep=0.5, scorer="update")]))
