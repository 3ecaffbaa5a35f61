"""Targets, schedules and regularizers."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch

from laconic import CompressionConfig, StageConfig, Trace, compress
from laconic.modules.budget.budget import Budget
from laconic.modules.budget.config import BudgetConfig
from laconic.modules.budget.regularizers.base import mean_over
from laconic.modules.budget.schedules import SCHEDULES, cosine, linear, progress, reciprocal, staircase
from laconic.modules.cost.cost import Cost, CostModel
from laconic.modules.cost.count_rules import COUNT_RULES, StageCount, cosine_keep, linear_keep, tokens_kept
from laconic.modules.selectors.base import everything
from laconic.modules.tokens.state import TokenState
from laconic.modules.tokens.trace import Routing
from tests.matrix import dense, images, labels

STAGES = CompressionConfig([StageConfig(layer=1), StageConfig(layer=2)])


def _budget(total_steps: int = 100, **settings: object) -> Budget:
    return Budget(BudgetConfig(**settings), dense("vit"), STAGES, total_steps)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", [0.5, 0.6, 0.75, 0.9])
def test_a_macs_ratio_is_met_from_below_by_the_largest_keep(target: float) -> None:
    budget = _budget(target=target)
    keep = budget.resolve(target)["before_1"]
    assert budget.cost(budget.resolve(target)).macs_ratio <= target
    above = budget.cost(dict.fromkeys(budget.free, min(1.0, keep + 1e-4))).macs_ratio
    assert above > target


def test_a_stage_with_its_own_keep_has_it_and_the_others_meet_the_target() -> None:
    stages = CompressionConfig([StageConfig(layer=1, keep=0.9), StageConfig(layer=2)])
    budget = Budget(BudgetConfig(target=0.75), dense("vit"), stages)
    keeps = {stage.key: stage.keep for stage in budget.compression.stages}
    assert keeps["before_1"] == 0.9
    assert budget.cost({key: value for key, value in keeps.items() if value}).macs_ratio <= 0.75


def test_targets_that_cannot_be_met_or_decide_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be met: with one token left the macs_ratio is still"):
        _budget(target=0.1)
    with pytest.raises(ValueError, match=r"budget.start = 0.1 cannot be met"):
        _budget(target=0.6, schedule="linear", start=0.1)
    with pytest.raises(ValueError, match=r"budget.target = 0.2 cannot be met: with one token left the mean_token_fraction is still 0.29"):
        _budget(target=0.2, measure="mean_token_fraction")
    with pytest.raises(
        ValueError,
        match=r"budget.target = 0.001 cannot be met: it leaves 0.036 of 36 tokens at stage before_1, and one always stays; raise it",
    ):
        _budget(target=0.001, measure="keep")
    held = [StageConfig(layer=1, keep=0.25), StageConfig(layer=2, scorer="learned", selector="gumbel")]
    with pytest.raises(
        ValueError, match=r"budget.target = 0.95 cannot be met: with every token .* the macs_ratio is 0.\d+, because other stages"
    ):
        Budget(BudgetConfig(target=0.95), dense("vit"), CompressionConfig(held))
    with pytest.raises(ValueError, match="no stage's scorer has any"):
        Budget(BudgetConfig(regularizer="ratio_mse"), dense("vit"), CompressionConfig([StageConfig(layer=1, scorer="evidence")]))
    with pytest.raises(ValueError, match="nothing to decide"):
        Budget(BudgetConfig(target=0.5), dense("vit"), CompressionConfig([StageConfig(layer=1, keep=0.5)]))
    with pytest.raises(ValueError, match=r"budget.target = 1.2 must be in \(0, 1\]"):
        BudgetConfig(target=1.2)
    with pytest.raises(ValueError, match="regularizer 'ratio_mze' does not exist: .*did you mean 'ratio_mse'"):
        BudgetConfig(regularizer="ratio_mze")
    with pytest.raises(ValueError, match="has no option 'wieght': its options are weight, per; did you mean 'weight'"):
        _budget(target=0.6, regularizer={"name": "ratio_mse", "wieght": 1})


def test_schedules_pass_through_the_published_points() -> None:
    # MoR's warm-up is the cosine from 1 to C.
    assert cosine(1, 0.4, 0) == 1
    assert cosine(1, 0.4, 0.5) == pytest.approx((1 + 0.4) / 2)
    assert cosine(1, 0.4, 1) == pytest.approx(0.4)
    assert linear(1, 0.5, 0.25) == 0.875
    assert [progress(step, 0.5, 100) for step in (0, 25, 50, 99)] == [0, 0.5, 1, 1]
    assert [progress(step, 0.6, 100, 0.2) for step in (0, 20, 40, 60, 99)] == [0, 0, 0.5, 1, 1]
    # DMS: the share that is removed while the compression factor goes from 1 to 8.
    removed = [1 - reciprocal(1, 1 / 8, done) for done in (0, 0.25, 0.5, 0.75, 1)]
    assert removed == pytest.approx([0, 0.6363636, 0.7777778, 0.84, 0.875], abs=1e-7)
    assert [SCHEDULES["step"](0.5, 1, done) for done in (0, 0.99, 1)] == [0.5, 0.5, 1]


def test_keeps_over_depth_pass_through_the_published_points() -> None:
    """SpAtten and p-MoD."""
    spatten = [1, 1, 1, 0.9111, 0.8222, 0.7333, 0.6444, 0.5556, 0.4667, 0.3778, 0.2889, 0.2]
    assert [linear_keep(0.2, index, 12) for index in range(12)] == pytest.approx(spatten, abs=5e-5)
    p_mod = {0: 1.0, 5: 0.9372, 10: 0.7645, 15: 0.5253, 16: 0.4747, 31: 0.0}
    assert [cosine_keep(0.5, index, 32) for index in p_mod] == pytest.approx(list(p_mod.values()), abs=5e-5)
    assert [linear_keep(0.5, index, stages) for index, stages in ((0, 1), (0, 2), (1, 2))] == [0.5, 1, 0.5]
    rule = COUNT_RULES["linear"]
    assert [rule(present, 0.2, StageCount(90, index, 12)) for index, present in ((2, 90), (3, 90), (4, 60), (11, 26))] == [90, 82, 60, 18]


def test_a_schedule_waits_and_the_rest_of_training_may_be_at_full_length() -> None:
    recovery = _budget(measure="keep", schedule="step", start=0.5, target=1.0, schedule_until=0.8)
    assert [recovery.keep(step)["before_1"] for step in (0, 79, 80, 99)] == [0.5, 0.5, 1, 1]
    late = _budget(measure="keep", schedule="linear", start=1.0, target=0.5, schedule_from=0.4, schedule_until=0.6)
    assert [late.keep(step)["before_1"] for step in (0, 40, 50, 60)] == pytest.approx([1, 1, 0.75, 0.5])
    with pytest.raises(ValueError, match="schedule_from = 0.5 must be at most budget.schedule_until, 0.3"):
        BudgetConfig(schedule="linear", schedule_from=0.5)


# random-LTD of a GPT: 128 to 2048 tokens in stairs of 16 over 200,000 steps.
LTD = {"measure": "keep", "schedule": "linear", "start": 128 / 2048, "target": 1.0, "increment": 16 / 2048, "schedule_until": 1.0}


def test_random_ltd_s_schedule_passes_through_the_published_points_and_saves_the_published_tokens() -> None:
    budget = _budget(total_steps=200_000, **LTD)
    tokens = [tokens_kept(2048, budget.target(step)) for step in range(200_000)]
    by_hand = [min(2048, (value := math.floor(step / 200_000 * 1920 + 128 + 1e-9)) - value % 16) for step in range(200_000)]
    assert tokens == by_hand
    assert {step: tokens[step] for step in (0, 1666, 1667, 10_000, 100_000, 199_999)} == {
        0: 128,
        1666: 128,
        1667: 144,
        10_000: 224,
        100_000: 1088,
        199_999: 2032,
    }
    assert 22 * sum(tokens) + 2 * 2048 * 200_000 == 5_571_185_920
    assert budget.target(200_000) == 1.0


def test_stairs_go_down_as_they_go_up_and_never_past_where_they_start() -> None:
    assert [staircase(value, 1.0, 0.25) for value in (1.0, 0.99, 0.76, 0.75, 0.6)] == [1.0, 1.0, 1.0, 0.75, 0.75]
    assert [staircase(value, 0.1, 0.25) for value in (0.1, 0.24, 0.25, 0.6)] == [0.1, 0.1, 0.25, 0.5]
    with pytest.raises(ValueError, match="give budget.schedule = linear, cosine or reciprocal"):
        BudgetConfig(increment=0.1)
    with pytest.raises(ValueError, match=r"budget.increment = 1.5 must be in \[0, 1\)"):
        BudgetConfig(schedule="linear", increment=1.5)


def test_the_cost_of_a_training_is_the_mean_over_its_schedule() -> None:
    fixed = _budget(target=0.6)
    assert fixed.training_macs_ratio == fixed.cost(fixed.resolve(0.6)).macs_ratio
    moving = _budget(measure="keep", schedule="linear", start=0.25, target=1.0, increment=0.25, schedule_until=1.0)
    # A third of the steps each at .25, .5 and .75.
    thirds = [moving.cost(moving.resolve(keep)).macs_ratio for keep in (0.25, 0.5, 0.75)]
    assert moving.training_macs_ratio == pytest.approx(sum(thirds) / 3, abs=0.01)


def test_a_moving_schedule_looks_for_a_keep_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[object] = []
    cost_of = CostModel.__call__

    def counting(self: CostModel, keep: Mapping[str, float] | None = None) -> Cost:
        counted.append(keep)
        return cost_of(self, keep)

    monkeypatch.setattr(CostModel, "__call__", counting)
    budget = _budget(target=0.5, schedule="linear", start=1.0, schedule_until=1.0)
    keeps = [budget.trace(step).keep for step in range(100)]
    first = len(counted)
    # Every step has a target of its own, and looking for its keep without what is known already takes some 16 evaluations.
    assert len({round(budget.target(step), 4) for step in range(100)}) == 100
    assert first < 300
    assert [budget.trace(step).keep for step in range(100)] == keeps
    assert len(counted) == first
    fresh = _budget(target=0.5)
    assert all(fresh.resolve(round(budget.target(step), 4)) == keeps[step] for step in (0, 1, 50, 99))


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_schedule_moves_what_the_forward_keeps(kind: str) -> None:
    budget = _budget(measure="keep", target=0.5, schedule=kind, schedule_until=0.5, start=1.0)
    model = compress(dense("vit"), budget.compression)
    kept = []
    for at in (0, 25, 50, 90):
        trace = budget.trace(at)
        model(pixel_values=images(), trace=trace)
        kept.append(trace.routings["before_1"].kept)
    assert kept == [36, 27, 18, 18]


def test_noise_is_annealed_to_nothing() -> None:
    budget = _budget(target=0.6, noise=2.0, noise_until=0.5)
    assert [budget.trace(step).noise for step in (0, 25, 50, 80)] == [2.0, 1.0, 0.0, 0.0]


def _loss(budget: Budget, shift: float, step: int = 100) -> tuple[float, float]:
    """Regularizer and its gradient on the scores' common shift, scores all alike."""
    model = compress(dense("vit"), budget.compression).train()
    for _, stage in ((0, model.vit.layers[1].stages.before), (0, model.vit.layers[2].stages.before)):
        torch.nn.init.zeros_(stage.scorer.score.weight)
        torch.nn.init.constant_(stage.scorer.score.bias, shift)
    trace = budget.trace(step)
    model(pixel_values=images(), labels=labels(), trace=trace)
    loss = budget.loss(trace, step)
    loss.total.backward()
    assert loss.regularizer is not None
    return float(loss.regularizer), float(model.vit.layers[1].stages.before.scorer.score.bias.grad)


def _logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_ratio_mse_is_the_squared_distance_is_0_at_the_target_and_pulls_towards_it() -> None:
    budget = _budget(measure="keep", target=0.5, regularizer={"name": "ratio_mse", "weight": 2.0})
    assert _loss(budget, 0.0)[0] == pytest.approx(0, abs=1e-12)
    value, gradient = _loss(budget, _logit(0.8))
    assert value == pytest.approx(0.3**2, rel=1e-5)
    assert gradient > 0
    assert _loss(budget, _logit(0.2))[1] < 0


def test_macs_squared_is_0_at_the_target_and_pulls_towards_it() -> None:
    budget = _budget(measure="keep", target=0.5, regularizer="macs_squared")
    assert _loss(budget, 0.0)[0] == pytest.approx(0, abs=1e-12)
    at = budget.cost({"before_1": 0.5, "before_2": 0.5}).macs_ratio
    above, gradient = _loss(budget, _logit(0.75))
    keep = torch.tensor(0.75)
    expected = (float(budget.cost.soft({"before_1": keep, "before_2": keep})) - at) ** 2
    assert above == pytest.approx(expected, rel=1e-4)
    assert gradient > 0
    assert _loss(budget, _logit(0.3))[1] < 0


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("name", ["ratio_mse", "macs_squared", "h_net"])
def test_rows_without_a_routable_token_do_not_count_in_a_regularizer(name: str, adaptive: bool) -> None:
    budget = _budget(measure="keep", target=0.5, regularizer=name)

    def routing(*present: int) -> Routing:
        protected = torch.arange(8) >= torch.tensor(present)[:, None]
        state = TokenState.initial(len(present), 8, protected, torch.ones_like(protected), torch.device("cpu"))
        scores = torch.full(state.position.shape, 1.0)
        kept = torch.tensor(present) // 4
        return Routing("before_1", scores, True, everything(state), state, 0.5, torch.tensor(present), kept, False, adaptive, free=adaptive)

    def loss(of: Routing) -> float:
        assert budget.regularizer is not None
        return float(budget.regularizer([of], None, budget.cost))

    expected = loss(routing(8, 4))
    assert expected > 0.01
    assert loss(routing(8, 0, 4, 0)) == pytest.approx(expected)


def test_a_mean_over_processes_is_that_of_all_their_counted_rows() -> None:
    values, counted = torch.tensor([1.0, 9.0, 3.0], requires_grad=True), torch.tensor([True, False, True])
    for other, expected in (((0.0, 0.0), 2.0), ((8.0, 2.0), 3.0)):
        mean = mean_over(values, counted, lambda value, other=other: value + (torch.tensor(other) - value.detach()) / 2)  # type: ignore[misc]
        assert float(mean) == pytest.approx(expected)
        (gradient,) = torch.autograd.grad(mean, values)
        # Gradients are averaged over the two processes afterwards.
        torch.testing.assert_close(gradient, counted * 2 / (2 + other[1]))
    assert float(mean_over(values, counted & False, None)) == 0


def test_the_regularizer_ramps_up() -> None:
    budget = _budget(target=0.6, regularizer="ratio_mse", ramp_until=0.5)
    model = compress(dense("vit"), budget.compression)
    weights = []
    for at in (0, 25, 50, 80):
        trace = budget.trace(at)
        model(pixel_values=images(), trace=trace)
        weights.append(budget.loss(trace, at).weight)
    assert weights == [0.0, 1.0, 2.0, 2.0]


def test_a_trace_that_no_model_has_seen_has_no_loss() -> None:
    with pytest.raises(ValueError, match="the trace has no routing"):
        _budget(target=0.6).loss(Trace(), 0)
