"""Properties of single parts: draws, scorers, the selector, the state, and how mistakes are named."""

from __future__ import annotations

import copy

import pytest
import torch

from laconic import CompressionConfig, StageConfig, Trace, compress, decompress
from laconic.modules.config import SITES
from laconic.modules.cost.cost import CostModel
from laconic.modules.selectors.base import Request
from laconic.modules.selectors.top_k import TopKSelector
from laconic.modules.site import TokenSpec
from laconic.modules.tokens.decision import Decision
from laconic.modules.tokens.draws import uniform
from laconic.modules.tokens.keep_count import KeepCount
from laconic.modules.tokens.state import TokenState
from tests.matrix import METHODS, compressed, dense, images, labels, traced


def test_draws_are_uniform_and_belong_to_the_token() -> None:
    ids, position = torch.arange(200), torch.arange(100).expand(200, -1)
    draws = uniform(0, 1, ids, 0, position)
    assert 0 < float(draws.min()) < float(draws.max()) < 1
    assert float(draws.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(draws.var()) == pytest.approx(1 / 12, abs=0.002)
    order = torch.randperm(200)
    assert torch.equal(uniform(0, 1, ids[order], 0, position), draws[order])
    assert abs(float(torch.corrcoef(torch.stack([draws.flatten(), uniform(0, 2, ids, 0, position).flatten()]))[0, 1])) < 0.02
    assert abs(float(torch.corrcoef(torch.stack([draws.flatten(), uniform(0, 1, ids, 1, position).flatten()]))[0, 1])) < 0.02
    assert abs(float(torch.corrcoef(torch.stack([draws[:-1].flatten(), draws[1:].flatten()]))[0, 1])) < 0.02


def test_the_uniform_grid_at_a_quarter_takes_every_other_row_and_column() -> None:
    method = next(method for method in METHODS if method.name == "uniform_grid")
    model = compress(dense("vit"), method.config(0.25))
    _, trace = traced(model, images())
    grid = trace.routings["before_1"].kept_mask[0, 1:].view(6, 6)
    assert int(grid.sum()) == 9
    # 6 × 6 is no power of two, so the grid is even only as far as it goes: no two kept patches touch.
    assert not bool((grid[:, 1:] & grid[:, :-1]).any())
    assert not bool((grid[1:] & grid[:-1]).any())


def test_patch_energy_does_not_change_with_brightness_or_contrast() -> None:
    method = next(method for method in METHODS if method.name == "patch_energy")
    model = compress(dense("vit"), method.config(0.3))
    kept = [traced(model, pixels)[1].routings["before_1"].decision.index for pixels in (images(), images() * 3 - 2)]
    assert torch.equal(kept[0], kept[1])


def test_ties_go_to_the_lower_slot() -> None:
    state = TokenState.initial(2, 7, 1, None, torch.device("cpu"))
    decision = TopKSelector(TokenSpec(16, 0))(torch.zeros(2, 7), state, Request(0.5, 3))
    assert decision.index.tolist() == [[0, 1, 2, 3]] * 2


def test_noise_moves_decisions_only_while_it_is_there() -> None:
    model = compressed("vit", METHODS[0], 0.5, 0.6)
    plain, noisy, again = (traced(model, images(), noise=noise, step=4)[1] for noise in (0.0, 5.0, 5.0))
    first = [trace.routings["before_1"].decision.index for trace in (plain, noisy, again)]
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first[1], first[2])


def test_selecting_twice_keeps_the_way_back_to_the_source() -> None:
    state = TokenState.initial(1, 6, 1, None, torch.device("cpu"))
    once = state.select(torch.tensor([[0, 2, 3, 5]]), None)
    twice = once.select(torch.tensor([[0, 1, 3]]), None)
    assert twice.position.tolist() == [[0, 2, 5]]
    assert twice.source.tolist() == [[0, -1, 1, -1, -1, 2]]


def test_filler_is_no_token() -> None:
    state = TokenState.initial(2, 4, 1, torch.tensor([[True] * 4, [True, True, False, False]]), torch.device("cpu"))
    decision = Decision(torch.tensor([[0, 1, 3], [0, 1, 3]]), torch.tensor([[True] * 3, [True, True, False]]))
    after = state.select(decision.index, decision.valid)
    assert after.size.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert after.source.tolist() == [[0, 1, -1, 2], [0, 1, -1, -1]]
    assert decision.kept_mask(4).tolist() == [[True, True, False, True], [True, True, False, False]]


def test_a_straight_through_score_gets_the_gradient_of_its_token() -> None:
    model = compressed("vit", METHODS[1], 0.5, 0.6).train()
    trace = Trace()
    model(pixel_values=images(), labels=labels(), trace=trace).loss.backward()
    assert float(model.vit.layers[1].stages.before.scorer.score.weight.grad.abs().sum()) > 0
    assert float(model.vit.layers[2].stages.before.scorer.score.weight.grad.abs().sum()) > 0


def test_key_bias_and_fused_tokens_send_a_gradient_to_the_score() -> None:
    for name in ("learned_key_bias", "learned_fuse"):
        method = next(method for method in METHODS if method.name == name)
        model = compressed("vit", method, 0.5, 0.6).train()
        model(pixel_values=images(), labels=labels(), trace=Trace()).loss.backward()
        assert float(model.vit.layers[1].stages.before.scorer.score.weight.grad.abs().sum()) > 0


def test_evidence_learns_without_touching_the_backbone_and_asks_for_labels() -> None:
    method = next(method for method in METHODS if method.name == "evidence")
    model = compressed("vit", method, 0.5, 0.6).train()
    trace = Trace(labels=labels())
    model(pixel_values=images(), trace=trace)
    assert trace.auxiliary_loss is not None
    trace.auxiliary_loss.backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None}
    assert touched == {name for name, _ in model.named_parameters() if ".stages.before.scorer." in name}
    with pytest.raises(ValueError, match="needs the labels in training"):
        model(pixel_values=images(), trace=Trace())


def test_evidence_finds_the_tokens_that_carry_the_label() -> None:
    """Six of 36 patches hold the class's own pattern, the others noise of the same strength."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(5, 3, 4, 4, generator=generator)
    model = compress(
        dense("vit"), CompressionConfig([StageConfig(layer=0, keep=1 / 6, scorer="evidence", estimator="token_labels")])
    ).train()
    optimizer = torch.optim.Adam([p for name, p in model.named_parameters() if ".stages." in name], lr=1e-2)
    found = 0.0
    for step in range(150):
        target = torch.randint(0, 5, (32,), generator=generator)
        patches = torch.randn(32, 36, 3, 4, 4, generator=generator)
        place = torch.rand(32, 36, generator=generator).argsort(-1)[:, :6]
        patches[torch.arange(32)[:, None], place] = patterns[target][:, None]
        pixels = patches.view(32, 6, 6, 3, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(32, 3, 24, 24)
        trace = Trace(step=step, labels=target)
        model(pixel_values=pixels, trace=trace)
        assert trace.auxiliary_loss is not None
        optimizer.zero_grad()
        trace.auxiliary_loss.backward()
        optimizer.step()
        kept = trace.routings["before_0"].kept_mask[:, 1:]
        found = float(kept.gather(1, place).float().mean())
    assert found > 0.9


def test_achieved_keep_is_summed_before_dividing() -> None:
    model = compressed("vit", METHODS[0], 0.5, 0.6)
    mask = torch.ones(1, 37, dtype=torch.long)
    mask[:, -30:] = 0
    long, short = traced(model, images(3))[1], traced(model, images(1), attention_mask=mask)[1]
    count, cost = KeepCount(), CostModel(model)
    count.add(long, cost, 3)
    count.add(short, cost, 1)
    done = [cost.uses(long)[""], cost.uses(short)[""]]
    assert count.macs_ratio == pytest.approx(sum(use.macs for use in done) / sum(use.dense_macs for use in done))
    assert abs(count.macs_ratio - (3 * cost.achieved(long) + cost.achieved(short)) / 4) > 0.01
    assert count.achieved["before_1"] == pytest.approx((3 * 18 + 3) / (3 * 36 + 6))


WRONG = [
    ({"layer": 4}, r"layer = 4 must be an integer from 0 to 3, the backbone has 4 layers"),
    ({"layer": -1}, r"must be an integer from 0 to 3"),
    ({"keep": 0.0}, r"keep = 0.0 must be in \(0, 1\]: the fraction that is kept, not removed"),
    ({"keep": 1.01}, r"must be in \(0, 1\]"),
    ({"keep": None}, r"keep is not set"),
    ({"site": "betwen"}, r"site = 'betwen' does not exist: the sites are before, between, around, around_attention, around_mlp"),
    ({"tokens": 9}, r"give either keep or tokens, not both"),
    ({"tokens": 0}, r"tokens = 0 must be an integer of at least 1"),
    ({"site": "around", "merger": "fuse"}, r"no token goes away; leave merger out"),
    ({"merger": "bipartite"}, r"merges the pairs that a matching scorer finds \('bipartite'\), not those of 'learned'; try 'squeeze'"),
    ({"scorer": "evidence", "selector": "gumbel"}, r"needs keep probabilities, which scorer 'evidence' does not give"),
    ({"scorer": "bipartite", "selector": "threshold", "merger": "bipartite"}, r"keeps a different number per row"),
    (
        {"scorer": "bipartite", "keep": 0.3, "merger": "bipartite"},
        r"keep = 0.3: scorer 'bipartite' can remove at most half of the tokens",
    ),
    ({"scorer": "bipartite", "site": "around"}, r"around a layer nothing is merged"),
    ({"selector": "threshold", "count": "evit"}, r"count = 'evit' must be left out"),
    ({"merger": "pool"}, r"merger 'pool' makes 16 tokens: give tokens = 16"),
    ({"scorer": "lerned"}, r"scorer 'lerned' does not exist: the scorers are .*; did you mean 'learned'\?"),
    ({"scorer": {"name": "learned", "hiden": 3}}, r"scorer 'learned' has no option 'hiden'"),
    ({"scorer": {"name": "learned", "width": 0}}, r"width = 0 must be at least 1"),
    (
        {"merger": "mean"},
        r"merger 'mean' does not exist: the mergers are bipartite, chunk_mean, drop, fuse, nearest, pool, queries, squeeze",
    ),
    ({"count": "ceil"}, r"count = 'ceil' is no count rule: there are round, dynamicvit, evit"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[str(change) for change, _ in WRONG])
def test_a_wrong_stage_is_refused_before_anything_is_changed(change: dict[str, object], message: str) -> None:
    model = dense("vit")
    before = {name: id(value) for name, value in model.state_dict().items()} | {name: type(m) for name, m in model.named_modules()}
    settings = {"layer": 1, "keep": 0.5, **change}
    with pytest.raises(ValueError, match=message):
        compress(model, CompressionConfig([StageConfig(layer=0, keep=0.9), StageConfig(**settings)]))  # type: ignore[arg-type]
    assert before.keys() == (set(model.state_dict()) | {name for name, _ in model.named_modules()})
    assert {name: type(m) for name, m in model.named_modules()} == {name: before[name] for name, _ in model.named_modules()}
    assert not hasattr(model.config, "compression")


def test_keys_that_mean_the_removed_fraction_are_refused() -> None:
    with pytest.raises(ValueError, match="Laconic counts what is kept; give keep = 1 - removed"):
        CompressionConfig([{"layer": 0, "drop_rate": 0.3}])
    with pytest.raises(ValueError, match="did you mean 'keep'"):
        CompressionConfig([{"layer": 0, "kep": 0.3}])


@pytest.mark.parametrize("site", SITES)
def test_keep_is_the_word_at_every_site_and_capacity_is_refused_with_it(site: str) -> None:
    with pytest.raises(ValueError, match=r"compression.stages\[\].capacity is not a key: give keep, the word at every site"):
        CompressionConfig([{"layer": 0, "site": site, "capacity": 0.3}])
    with pytest.raises(TypeError, match="capacity"):
        StageConfig(layer=0, site=site, capacity=0.3)  # type: ignore[call-arg]


def test_backbones_without_an_adapter_are_refused_by_name() -> None:
    from transformers import RobertaConfig, RobertaModel

    small = RobertaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=10)
    with pytest.raises(ValueError, match="no backbone adapter for model_type 'roberta' .*: there are beit, .*, vit, vit_mae"):
        compress(RobertaModel(small), CompressionConfig([StageConfig(layer=0, keep=0.5)]))


def test_compressing_twice_and_decompressing_a_dense_model_are_refused() -> None:
    model = compressed("vit", METHODS[0], 0.5, 0.6)
    with pytest.raises(ValueError, match="is compressed already"):
        compress(model, METHODS[0].config(0.5))
    with pytest.raises(ValueError, match="is not compressed"):
        decompress(dense("vit"))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"scorer": "evidence", "estimator": "straight_through"},
            "cannot train scorer 'evidence'; take 'token_labels'",
        ),
        ({"scorer": "learned", "estimator": "token_labels"}, "cannot train scorer 'learned'"),
        ({"estimator": "gate"}, "estimator 'gate' scales a layer's output at bypass sites: give site = 'around'"),
        ({"scorer": "random", "estimator": "key_bias"}, "scorer 'random' is not trained: leave estimator out"),
        ({"scorer": {"name": "learned", "width": "x"}}, "an option is of the wrong type"),
        ({"scorer": {"name": "learned", "width": 2**50}}, "scorer 'learned' cannot be built with {'width': 1125899906842624}"),
        ({"site": "around", "scorer": "linear", "estimator": {"name": "gate", "start": 1e300}}, "start = 1e\\+300 is larger than a float"),
        ({"site": "around", "scorer": "linear", "estimator": {"name": "gate", "start": 10**400}}, "is larger than a float"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(parts: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress(dense("vit"), CompressionConfig([StageConfig(layer=1, keep=0.5, **parts)]))  # type: ignore[arg-type]


@pytest.mark.parametrize("stages", [3, "x", [3], [{"layer": "one"}]])
def test_stages_of_another_type_are_refused(stages: object) -> None:
    with pytest.raises(ValueError, match="must be"):
        CompressionConfig(stages)  # type: ignore[arg-type]


def test_what_was_kept_is_counted_not_taken_from_the_rule() -> None:
    model = compressed("vit", METHODS[0], 0.5, 1.0)
    index = torch.arange(12).expand(3, -1)
    _, trace = traced(model, images(), replay={"before_1": Decision(index, None)})
    assert trace.routings["before_1"].kept == 11


def test_cumulative_counts_never_exceed_what_is_there() -> None:
    method = next(method for method in METHODS if method.name == "dynamicvit")
    model = compressed("vit", method, 0.3, 0.9)
    _, trace = traced(model, images())
    assert [routing.kept for routing in trace.routings.values()] == [10, 10]
    assert dict(CostModel(model)().kept) == {"before_1": 10, "before_2": 10}


@pytest.mark.slow
def test_a_copy_of_a_compiled_model_answers_with_its_own_weights() -> None:
    model = compressed("vit", METHODS[0], 0.5, 0.6)
    model.compile(backend="eager")
    model(pixel_values=images())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not bool(twin(pixel_values=images()).logits.any())


def test_pixels_beyond_the_last_whole_patch_are_left_out() -> None:
    method = next(method for method in METHODS if method.name == "evidence_pixels")
    model = compress(dense("vit"), method.config(0.5))
    trace = Trace()
    model(pixel_values=torch.randn(2, 3, 26, 26), interpolate_pos_encoding=True, trace=trace)
    assert trace.flow().layer_tokens[3].mlp == 19


def test_a_trace_serves_one_forward() -> None:
    model, trace = compressed("vit", METHODS[0], 0.5, 0.6), Trace()
    model(pixel_values=images(), trace=trace)
    with pytest.raises(ValueError, match="make a new Trace for each forward"):
        model(pixel_values=images(), trace=trace)


def test_the_base_model_alone_drops_as_many_tokens_as_under_its_head() -> None:
    model = compressed("vit", METHODS[0], 0.5, 0.6)
    trace, inner = Trace(), Trace()
    model(pixel_values=images(), trace=trace)
    model.vit(pixel_values=images(), trace=inner)
    assert trace.flow().layer_tokens == inner.flow().layer_tokens
    assert model.vit(pixel_values=images()).last_hidden_state.shape[1] == trace.flow().layer_tokens[3].mlp


def test_hidden_states_and_the_forwards_signature_are_as_in_transformers() -> None:
    import inspect

    plain, model = dense("vit"), compressed("vit", METHODS[0], 0.5, 0.6)
    out = model(pixel_values=images(), output_hidden_states=True)
    assert [state.shape[1] for state in out.hidden_states] == [37, 37, 19, 12, 12]
    assert inspect.signature(model.forward).parameters.keys() == inspect.signature(plain.forward).parameters.keys()
