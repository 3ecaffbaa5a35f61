"""Rows that keep different numbers of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, combinations, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from laconic import Budget, BudgetConfig, CompressionConfig, StageConfig, Trace, compress, decompress
from laconic.modules.compress import checkpoint_activations
from laconic.modules.cost.cost import CostModel
from laconic.modules.selectors.base import Request
from laconic.modules.selectors.gumbel import GumbelSelector
from laconic.modules.selectors.threshold import ThresholdSelector
from laconic.modules.site import TokenSpec
from laconic.modules.tokens import ragged
from laconic.modules.tokens.ragged import ATTENTION, Packing, group_sizes
from laconic.modules.tokens.state import TokenState
from tests.matrix import METHODS, compressed, dense, images, labels, spread, traced

SPEC = TokenSpec(hidden_size=16, classes=0)
THRESHOLD: dict[str, Any] = {"scorer": {"name": "learned", "detach": True}, "selector": "threshold"}


def _model(layers: tuple[int, ...] = (1, 2), implementation: str = "sdpa", **parts: Any) -> Any:
    stages = [StageConfig(layer=layer, keep=0.5, **(parts or THRESHOLD)) for layer in layers]
    model = compress(dense("vit", attn_implementation=implementation), CompressionConfig(stages))
    return spread(model, seed=4, std=1.5)


def _settled(selector: ThresholdSelector) -> ThresholdSelector:
    selector.batches.fill_(1)
    return selector.eval()


def test_rows_keep_what_scores_above_the_threshold() -> None:
    scores = torch.tensor([[9.0, 1, -1, 2, -3], [9.0, -1, -2, -1, -3], [9.0, 4, 4, 4, 4]])
    state = TokenState.initial(3, 5, 1, None, scores.device)
    decision = _settled(ThresholdSelector(SPEC))(scores, state, Request(0.5, 2))
    assert decision.kept_mask(5).tolist() == [
        [True, True, False, True, False],
        [True, True, False, False, False],  # nothing is above: the best one stays
        [True, True, True, True, True],
    ]


def test_the_threshold_follows_the_scores_of_the_batch() -> None:
    selector, state = ThresholdSelector(SPEC, rate=0.1).train(), TokenState.initial(64, 101, 1, None, torch.device("cpu"))
    for step in range(60):
        scores = 3 + 2 * torch.randn(64, 101, generator=torch.Generator().manual_seed(step))
        decision = selector(scores, state, Request(0.3, 30))
    kept = decision.kept_mask(101)[:, 1:]
    assert float(kept.float().mean()) == pytest.approx(0.3, abs=0.01)
    assert len(set(kept.sum(-1).tolist())) > 5
    before = float(selector.threshold)
    selector.eval()(scores + 5, state, Request(0.3, 30))
    assert float(selector.threshold) == before


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("keeps", [[0.9 - 0.025 * step for step in range(25)], [0.1 + 0.8 * (7 * step % 25) / 25 for step in range(50)]])
def test_a_threshold_knows_all_keeps_whatever_the_training_steps_request(causal: bool, keeps: list[float]) -> None:
    selector, state = (
        ThresholdSelector(replace(SPEC, causal=causal), rate=0.1).train(),
        TokenState.initial(8, 500, 0, None, torch.device("cpu")),
    )
    for step, keep in enumerate(keeps):
        scores = torch.randn(8, 500, generator=torch.Generator().manual_seed(step))
        selector(scores, state, Request(keep, round(500 * keep), own=0.3))
    assert float((scores > selector.threshold).float().mean()) == pytest.approx(0.3, abs=0.02)
    for keep in (0.01, 0.02, 0.05, 0.1, 0.25, 0.3, 0.5, 0.77, 0.95, 0.98, 0.99):
        found = selector.eval()(scores, state, Request(keep, round(500 * keep), own=0.3)).kept_mask(500)
        assert float(found.float().mean()) == pytest.approx(keep, abs=0.1 * min(keep, 1 - keep) + 0.005)


def test_thresholds_move_to_another_keep_of_the_stage_and_are_exact_at_their_own() -> None:
    selector, state = ThresholdSelector(SPEC).train(), TokenState.initial(8, 501, 1, None, torch.device("cpu"))
    scores = torch.randn(8, 501, generator=torch.Generator().manual_seed(0))
    selector(scores, state, Request(0.3, 150, own=0.3))
    routable = scores[:, 1:].flatten()
    # Of 4,000 tokens, the one after the first 1,200.
    assert float(selector.threshold) == float(routable.sort(descending=True).values[1200])
    other = selector.eval()(scores, state, Request(0.6, 300, own=0.3)).kept_mask(501)
    selector.move_cut(0.3, 0.6)
    assert torch.equal(selector(scores, state, Request(0.6, 300, own=0.6)).kept_mask(501), other)
    assert float(other[:, 1:].float().mean()) == pytest.approx(0.6, abs=0.005)
    selector.move_cut(0.6, 0.3)
    assert float((routable > selector.threshold).float().mean()) == pytest.approx(0.3, abs=1e-3)


def test_the_threshold_begins_as_the_mean_of_its_batches_and_goes_on_as_their_moving_average() -> None:
    selector, state = ThresholdSelector(SPEC, rate=0.25).train(), TokenState.initial(1, 4, 0, None, torch.device("cpu"))
    found = []
    for step in range(6):
        # Half of the scores are above 1 + step.
        selector(torch.tensor([[3.0, 2.0, 1.0, 0.0]]) + step, state, Request(0.5, 2))
        found.append(float(selector.threshold))
    assert found[:4] == pytest.approx([1, 1.5, 2, 2.5])
    assert found[4:] == pytest.approx([2.5 + 0.25 * (5 - 2.5), 3.125 + 0.25 * (6 - 3.125)])


@pytest.mark.parametrize(
    ("own", "other", "expected"), [(0, (0.25, 1), 0.25), (3, (0.25, 1), (0.5 + 0.25) / 2), (3, (0, 0), 0.5), (0, (0, 0), 7.0)]
)
def test_a_process_without_a_routable_token_pulls_no_threshold(
    own: int, other: tuple[float, int], expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda value: value.add_(torch.tensor((*[other[0]] * 65, other[1]))))
    selector = ThresholdSelector(SPEC)
    selector.threshold.fill_(7)
    found = selector.follow(torch.tensor([[9.0, 0.5, 0.1]]), torch.arange(3)[None] < own, Request(0.34, 1))
    assert float(found) == float(selector.threshold) == expected
    assert bool(selector.batches) == bool(own or other[1])


def test_gumbel_noise_makes_a_stay_as_likely_as_its_score_says() -> None:
    scores = torch.full((1, 20_001), 0.7)
    state = TokenState.initial(1, 20_001, 1, None, scores.device)
    draws = torch.rand(1, 20_001, generator=torch.Generator().manual_seed(0)).clamp(1e-6, 1 - 1e-6)
    for selector in (GumbelSelector(SPEC), ThresholdSelector(SPEC, calibrate=False)):
        decision = selector(scores, state, Request(0.5, 100, noise=1.0, draws=draws))
        assert decision.kept_mask(20_001).float().mean() == pytest.approx(float(torch.tensor(0.7).sigmoid()), abs=0.01)


@pytest.mark.parametrize(("scorer", "selector"), [("learned", "threshold"), ("random", "top_k")])
def test_exploration_noise_that_no_decision_has_is_refused(scorer: str, selector: str) -> None:
    stages = CompressionConfig([StageConfig(layer=1, scorer=scorer, selector=selector)])
    with pytest.raises(
        ValueError, match=r"budget.noise = 1.0 has no effect: exploration noise is for trained scorers with selector 'top_k'"
    ):
        Budget(BudgetConfig(noise=1.0), dense("vit"), stages)
    Budget(BudgetConfig(noise=1.0), dense("vit"), CompressionConfig([*stages.stages, StageConfig(layer=2, scorer="learned")]))


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "masked"])
def test_a_row_answers_alike_alone_and_among_others(packs: bool) -> None:
    model = _model(implementation="sdpa" if packs else "eager")
    together, trace = traced(model, images(6))
    kept = trace.routings["before_1"].kept
    assert isinstance(kept, Tensor)
    assert len(set(kept.tolist())) > 1
    for row in range(6):
        alone, own = traced(model, images(6)[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-4)
        assert own.routings["before_1"].kept.tolist() == [int(kept[row])]  # type: ignore[union-attr]


def _calls_are(free: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of every length are a group of their own, or all rows are one; None: rows are spans, as on a GPU."""
    if free is None:
        monkeypatch.setattr(Packing, "of", staticmethod(lambda state, hidden_states: Packing.in_spans(state)))
    else:
        monkeypatch.setattr(ragged, "_CALL", 0.0 if free else 1e12)


def test_layers_compute_no_filler_where_another_call_of_attention_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _calls_are(True, monkeypatch)
    model = _model()
    seen: list[tuple[int, ...]] = []
    for layer in model.vit.layers:
        layer.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    _, trace = traced(model, images(6))
    first, second = (int(trace.routings[name].kept.sum()) + 6 for name in ("before_1", "before_2"))  # type: ignore[union-attr]
    assert seen == [(6, 37, 16), (1, first, 16), (1, second, 16), (1, second, 16)]


@pytest.mark.parametrize("free", [True, False, None], ids=["even_groups", "one_group", "spans"])
@pytest.mark.parametrize(("merger", "estimator"), [("drop", "key_bias"), ("squeeze", "key_bias"), ("drop", "straight_through")])
def test_packed_and_masked_forwards_agree_with_their_gradients(
    merger: str, estimator: str, free: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _calls_are(free, monkeypatch)
    results = []
    for implementation in ("sdpa", "eager"):
        parts: dict[str, Any] = {"scorer": "learned", "selector": "threshold", "merger": merger, "estimator": estimator}
        model = _model(implementation=implementation, **parts).train()
        trace = Trace()
        loss = model(pixel_values=images(40), labels=labels(40), trace=trace).loss
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    # Sums of many terms in another order.
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-3)


def test_checkpointing_gives_the_same_loss_and_gradients() -> None:
    results = []
    for checkpointing in (False, True):
        model = _model().train()
        if checkpointing:
            checkpoint_activations(model)
        loss = model(pixel_values=images(6), labels=labels(6), trace=Trace()).loss
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])


def test_keep_1_is_the_dense_model_bit_for_bit_and_decompress_gives_its_attention_back() -> None:
    model = compress(dense("vit"), CompressionConfig([StageConfig(layer=1, keep=1.0, **THRESHOLD)]))
    assert model.config._attn_implementation == ATTENTION
    assert torch.equal(traced(model, images())[0], dense("vit")(images()).logits)
    assert decompress(model).config._attn_implementation == "sdpa"


def test_macs_of_a_forward_are_the_mean_over_its_rows() -> None:
    model = _model()
    _, trace = traced(model, images(6))
    cost = CostModel(model)
    alone = [cost.achieved(traced(model, images(6)[row : row + 1])[1]) for row in range(6)]
    assert cost.achieved(trace) == pytest.approx(sum(alone) / 6)
    assert max(alone) - min(alone) > 0.01


@pytest.mark.parametrize("regularizer", ["macs_squared", pytest.param("ratio_mse", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "selector", ["gumbel", pytest.param({"name": "threshold", "calibrate": False}, marks=pytest.mark.slow)], ids=["gumbel", "threshold"]
)
def test_a_regularizer_holds_the_ratio_of_what_was_really_kept(regularizer: str, selector: Any) -> None:
    plain = dense("vit")
    config = CompressionConfig([StageConfig(layer=1, scorer={"name": "learned", "detach": True}, selector=selector)])
    settings = BudgetConfig(target=0.6, regularizer=regularizer, ramp_until=0.0, noise=1.0, noise_until=0.7)
    budget = Budget(settings, plain, config, total_steps=150)
    model = compress(plain, budget.compression).train()
    optimizer = torch.optim.Adam([p for name, p in model.named_parameters() if ".stages." in name], lr=1e-2)
    for step in range(150):
        trace = budget.trace(step)
        model(pixel_values=images(16, seed=step), trace=trace)
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 150)
        optimizer.zero_grad()
        budget.loss(trace, step).total.backward()
        optimizer.step()
    _, trace = traced(model.eval(), images(64, seed=1000))
    assert budget.cost.achieved(trace) == pytest.approx(0.6, abs=0.03)


@pytest.mark.parametrize("free", [True, False], ids=["even_groups", "one_group"])
def test_packing_is_undone_by_unpacking_wherever_the_filler_is(free: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _calls_are(free, monkeypatch)
    valid = torch.tensor([[True, True, False], [True, False, False], [True, True, True], [True, False, True]])
    state = TokenState.initial(4, 3, 1, valid, valid.device)
    tokens = torch.randn(4, 3, 4)
    packed = Packing.of(state, tokens)
    assert packed.pack(tokens).shape == (1, 8 if free else 12, 4)
    assert [group.mask is None for group in packed.groups] == ([True, True, True] if free else [False])
    assert torch.equal(packed.unpack(packed.pack(tokens))[valid], tokens[valid])


def test_spans_have_no_padding_and_keep_the_order_of_rows() -> None:
    valid = torch.tensor([[True, True, False], [True, False, False], [True, True, True], [True, False, True]])
    packed, tokens = Packing.in_spans(TokenState.initial(4, 3, 1, valid, valid.device)), torch.randn(4, 3, 4)
    assert torch.equal(packed.pack(tokens)[0], tokens[valid])
    assert torch.equal(packed.unpack(packed.pack(tokens))[valid], tokens[valid])
    assert packed.spans is not None
    assert packed.spans.starts.tolist() == [0, 2, 3, 6, 8]
    assert packed.spans.longest == 3


def test_groups_take_the_least_time_of_all_there_are() -> None:
    lengths, rows = [3, 3, 4, 4, 4, 7, 8, 8, 12], 9

    def time(sizes: Sequence[int], call: float) -> float:
        ends = list(accumulate(sizes))
        return sum(size * lengths[end - 1] for size, end in zip(sizes, ends, strict=True)) + call * len(sizes)

    cuts = [cut for number in range(rows) for cut in combinations(range(1, rows), number)]
    every = [[end - start for start, end in pairwise((0, *cut, rows))] for cut in cuts]
    for call in (0.0, 1.5, 3.0, 6.0, 100.0):
        assert time(group_sizes(lengths, call), call) == min(time(sizes, call) for sizes in every)
    assert group_sizes(lengths, 0) == [2, 3, 1, 2, 1]
    assert group_sizes(lengths, 100) == [rows]


def test_rows_of_very_many_lengths_make_few_groups_all_the_same() -> None:
    sizes = group_sizes(range(1, 1001), 0)
    assert sum(sizes) == 1000
    assert len(sizes) <= 32
    assert max(sizes) <= 32


@pytest.mark.parametrize("free", [True, False], ids=["even_groups", "one_group"])
def test_packed_rows_run_under_autocast(free: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _calls_are(free, monkeypatch)
    model = _model().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(pixel_values=images(6), labels=labels(6), trace=Trace()).loss
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_other_attention_functions_are_refused() -> None:
    model = dense("vit")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="load the model with attn_implementation 'sdpa' or 'eager'"):
        compress(model, CompressionConfig([StageConfig(layer=1, keep=0.5, **THRESHOLD)]))


def test_a_threshold_that_has_seen_no_scores_keeps_as_many_as_asked() -> None:
    stage = StageConfig(layer=1, keep=0.3, scorer="evidence", selector="threshold")
    model = compress(dense("vit"), CompressionConfig([stage]))
    assert traced(model, images(8))[1].routings["before_1"].achieved == pytest.approx(11 / 36)


def test_the_threshold_stays_float32_in_a_model_of_another_dtype() -> None:
    selector = ThresholdSelector(SPEC)
    selector.threshold.fill_(1.001)
    assert selector.bfloat16().threshold == torch.tensor(1.001)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_can_be_changed_afterwards(implementation: str) -> None:
    model = _model()
    expected = traced(model, images(6))[0]
    model.set_attn_implementation("eager")
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(traced(model, images(6))[0], expected, atol=1e-5, rtol=1e-4)


def test_hidden_states_that_are_given_out_are_of_rows() -> None:
    model = _model()
    expected = traced(model, images(6))[0]
    out = model(pixel_values=images(6), output_hidden_states=True)
    torch.testing.assert_close(out.logits, expected, atol=1e-5, rtol=1e-4)
    assert {states.shape[0] for states in out.hidden_states} == {6}


def test_rows_that_keep_everything_do_not_stop_others_from_being_fused() -> None:
    model = compressed("vit", next(method for method in METHODS if method.name == "threshold_fuse"), 0.5)
    scores = traced(model, images(6))[1].routings["before_1"].scores[:, 1:]
    model.vit.layers[1].stages["before"].selector.threshold.fill_(float(scores.min(1).values.max()) - 1e-4)
    _, trace = traced(model, images(6))
    assert trace.state is not None
    assert bool((trace.state.size.sum(-1) == 37).all())
    assert CostModel(model).achieved(trace) < 1.1


def test_the_token_that_fuse_adds_is_one_of_those_asked_for() -> None:
    parts: dict[str, Any] = {"scorer": {"name": "learned", "detach": True}, "selector": "threshold", "merger": "fuse"}
    model = _model((1,), **parts).train()
    for step in range(40):
        _, trace = traced(model, images(32, seed=step))
    assert trace.routings["before_1"].achieved == pytest.approx(0.5, abs=0.02)


def test_a_fixed_number_of_outputs_after_an_adaptive_stage_is_refused_before_anything_is_changed() -> None:
    pool = StageConfig(layer=2, tokens=4, scorer="uniform_grid", merger={"name": "pool", "outputs": 4})
    with pytest.raises(ValueError, match="needs rows of equal length"):
        compress(dense("vit"), CompressionConfig([StageConfig(layer=1, keep=0.5, **THRESHOLD), pool]))


def test_a_trace_that_names_other_stages_is_refused() -> None:
    with pytest.raises(ValueError, match="the trace names unknown stages befor_1: the model has before_1"):
        _model((1,))(pixel_values=images(), trace=Trace(keep={"befor_1": 0.5}))
