"""Controllers that bring the achieved ratio to the requested one, and the regularizers beside them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from laconic import CompressionConfig, StageConfig, compress
from laconic.modules.budget.budget import Budget
from laconic.modules.budget.config import BudgetConfig
from laconic.modules.budget.controllers.augmented_lagrangian import AugmentedLagrangian
from laconic.modules.budget.controllers.base import Controller
from laconic.modules.budget.controllers.nupi import NuPI
from laconic.modules.budget.gaps import kept_by_row, kernel_width, mean_and_spread
from laconic.modules.budget.regularizers.base import Regularizer
from laconic.modules.budget.regularizers.binomial import Binomial, surprise
from laconic.modules.budget.regularizers.diversity import Diversity
from laconic.modules.budget.regularizers.entropy import Entropy
from laconic.modules.budget.regularizers.hinge import Hinge
from laconic.modules.budget.regularizers.minimum_activation import MinimumActivation
from laconic.modules.budget.regularizers.ponder import Ponder, stopping
from laconic.modules.budget.regularizers.ratio_mse import RatioMSE
from laconic.modules.budget.regularizers.two_sided_l1 import TwoSidedL1
from laconic.modules.budget.regularizers.uniformity import Uniformity
from laconic.modules.budget.regularizers.z_loss import ZLoss
from laconic.modules.cost.cost import CostModel
from laconic.modules.selectors.base import everything
from laconic.modules.tokens.state import TokenState
from laconic.modules.tokens.trace import Routing, Trace
from tests.matrix import dense, images, traced

# min x²/2 with eˣ = e.
TOY = [2.0, 1.634874, 1.299967, 1.072291, 0.931357, 0.847563]


def _toy(controller: Controller, steps: int) -> list[float]:
    """x after each step: x by gradient descent with momentum, then the state of the controller."""
    x = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.01, momentum=0.5)
    state, course = controller.start(x.device), [2.0]
    for _ in range(steps):
        optimizer.zero_grad()
        gap = x.exp() - math.e
        (0.5 * x.square() + controller.loss(gap, state)).backward()
        optimizer.step()
        state = controller.update(x.detach().exp() - math.e, state)
        course.append(float(x.detach()))
    return course


def test_an_augmented_lagrangian_solves_the_toy_problem_to_six_digits() -> None:
    course = _toy(AugmentedLagrangian(rate=0.1, penalty=1.0, growth=1.0), 200)
    assert course[:6] == pytest.approx(TOY, abs=1e-6)
    assert course[200] == pytest.approx(1.00000002, abs=1e-8)


def test_a_gap_of_minus_a_tenth_costs_what_the_form_with_two_lambdas_says() -> None:
    """λ₁·(s - t) + λ₂·(s - t)² of CoFi (arXiv 2204.00408), with .3 and 2, for s = .4 and t = .5; and 20·abs(t - c) of SkipGPT."""
    state = {"multiplier": torch.tensor(0.3, dtype=torch.float64), "penalty": torch.tensor(4.0, dtype=torch.float64)}
    assert float(AugmentedLagrangian().loss(torch.tensor(0.4 - 0.5), state)) == pytest.approx(-0.01)
    l1 = TwoSidedL1()
    assert l1.weight * float(l1.of_stage(_routing(_logit(0.6, 0.6, 0.6, 0.6)[None], 0.5), None)) == pytest.approx(2.0)


def test_rows_count_by_their_tokens_in_a_regularizer_as_in_a_report() -> None:
    """Rows of 8 and 2 tokens, of which 4 and 2 are kept: 6 of 10."""
    scores = torch.tensor([[3.0] * 4 + [-3.0] * 4, [3.0] * 2 + [-3.0] * 6])
    real = torch.arange(8) < torch.tensor([[8], [2]])
    routing = _routing(scores, 0.6, torch.tensor([4, 2]))
    routing = replace(routing, state=TokenState.initial(2, 8, ~torch.ones_like(real), real, scores.device))
    for regularizer in (TwoSidedL1(), Hinge(), RatioMSE()):
        assert float(regularizer.of_stage(routing, None)) == pytest.approx(0, abs=1e-6)
    # Every row by itself: half of one row, and all of the other.
    assert float(RatioMSE(per="row").of_stage(routing, None)) == pytest.approx((0.1**2 + 0.4**2) / 2)
    with pytest.raises(ValueError, match="per = 'rows' must be row, batch or null"):
        RatioMSE(per="rows")


def test_a_multiplier_alone_swings_and_its_proportional_part_damps_it() -> None:
    alone, damped = (_toy(NuPI(integral=0.1, proportional=p), 200) for p in (0.0, 1.0))
    swings = [max(abs(x - 1) for x in course[60:]) for course in (alone, damped)]
    assert swings[0] > 10 * swings[1]
    assert damped[200] == pytest.approx(1, abs=1e-4)


def test_the_state_of_nupi_follows_its_formula() -> None:
    controller, state = NuPI(integral=0.5, proportional=2.0, memory=0.25), NuPI().start(torch.device("cpu"))
    for gap in (0.4, -0.2):
        state = controller.update(torch.tensor(gap, dtype=torch.float64), state)
    # ξ: .3, then .075 - .15; μ: .5·.4 + 2·.3, then + .5·(-.2) + 2·(-.075 - .3).
    assert float(state["average"]) == pytest.approx(-0.075)
    assert float(state["multiplier"]) == pytest.approx(0.8 - 0.1 - 0.75)
    # The weights answer to the gap of their own step, not to that of the step before: μ is -.05 + .5·.6 + 2·(.43125 + .075).
    gap = torch.tensor(0.6, requires_grad=True)
    controller.loss(gap, state).backward()
    assert float(gap.grad) == pytest.approx(-0.05 + 0.3 + 2 * (0.25 * -0.075 + 0.75 * 0.6 + 0.075))  # type: ignore[arg-type]
    assert float(state["multiplier"]) == pytest.approx(-0.05)


def test_the_penalty_grows_while_the_gap_does_not_shrink_and_is_bounded() -> None:
    controller = AugmentedLagrangian(rate=100.0, penalty=1.0, growth=2.0, shrink=0.5, every=2, tolerance=0.01, highest=3.0)

    def after(*gaps: float) -> dict[str, torch.Tensor]:
        state = controller.start(torch.device("cpu"))
        for gap in gaps:
            state = controller.update(torch.tensor(gap, dtype=torch.float64), state)
        return state

    assert float(after(0.4, 0.4)["penalty"]) == 1
    assert float(after(0.4, 0.4, 0.3, 0.3)["penalty"]) == 2
    assert float(after(0.4, 0.4, 0.1, 0.1)["penalty"]) == 1
    assert float(after(0.01, 0.01, 0.01, 0.01)["penalty"]) == 1
    assert float(after(*[0.4] * 20)["penalty"]) == 3
    assert float(after(*[0.4] * 20)["multiplier"]) == 3


def _routing(scores: torch.Tensor, requested: float, kept: torch.Tensor | None = None) -> Routing:
    real = torch.ones(scores.shape, dtype=torch.bool)
    state = TokenState.initial(*scores.shape, ~real, real, scores.device)
    count = scores.shape[1] if kept is None else kept
    return Routing(
        "before_1",
        scores,
        True,
        everything(state),
        state,
        requested,
        scores.shape[1],
        count,
        False,
        kept is not None,
        free=kept is not None,
    )


def _logit(*probabilities: float) -> torch.Tensor:
    return torch.logit(torch.tensor(probabilities, dtype=torch.float64))


@pytest.mark.parametrize(
    ("regularizer", "keep", "requested", "value"),
    [
        (TwoSidedL1(), 0.6, 0.5, 0.1), (TwoSidedL1(), 0.4, 0.5, 0.1),
        (Hinge(), 0.5, 0.125, 0.375), (Hinge(), 0.1, 0.125, 0.0),
        (MinimumActivation(), 0.04, 0.5, 0.06), (MinimumActivation(), 0.3, 0.5, 0.0),
        (Entropy(), 0.5, 0.5, math.log(2)), (ZLoss(), 0.5, 0.5, math.log(2) ** 2),
        # log(2·cosh(½·log 4)) = log 2.5, on either side.
        (ZLoss(), 0.8, 0.5, math.log(2.5) ** 2), (ZLoss(), 0.2, 0.5, math.log(2.5) ** 2), (Diversity(), 0.5, 0.5, 1.0), (Binomial(), 0.2, 0.2, 0.119736), (Binomial(), 0.5, 0.2, 0.363348),
    ],
)  # fmt: skip
def test_regularizers_have_their_published_values(regularizer: Regularizer, keep: float, requested: float, value: float) -> None:
    routing = _routing(_logit(*[keep] * 10).expand(3, 10), requested)
    assert float(regularizer([routing], None, CostModel(dense("vit")))) == pytest.approx(value, abs=1e-6)


def test_a_binomial_prior_is_that_of_the_distribution() -> None:
    number = torch.tensor([7])
    for count in range(8):
        wanted = -torch.distributions.Binomial(7, torch.tensor(0.3)).log_prob(torch.tensor(float(count))) / 7
        assert float(surprise(torch.tensor([float(count)]), number, 0.3)) == pytest.approx(float(wanted), abs=1e-6)


def test_tokens_stop_where_a_stage_does_not_keep_them() -> None:
    passed, stops = stopping(torch.tensor([0.5, 0.4]))
    assert float(passed) == pytest.approx(0.7)
    assert stops.tolist() == pytest.approx([0.5, 0.3, 0.2])
    requested = [_routing(_logit(*[keep] * 4)[None], keep) for keep in (0.5, 0.4)]
    assert float(Ponder()(requested, None, CostModel(dense("vit")))) == pytest.approx(0.7, abs=1e-6)
    # Stops .75, .05, .2 where .5, .3, .2 are wanted.
    away = [_routing(_logit(*[keep] * 4)[None], wanted) for keep, wanted in ((0.25, 0.5), (0.8, 0.4))]
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.05 * math.log(0.05 / 0.3)
    assert float(Ponder(prior=3.0)(away, None, CostModel(dense("vit")))) == pytest.approx(0.25 + 0.2 + 3 * divergence, abs=1e-6)
    around = [replace(routing, bypass=True) for routing in requested]
    assert float(Ponder()(around, None, CostModel(dense("vit")))) == pytest.approx(0.9, abs=1e-6)


def test_uniformity_sees_places_and_not_contents() -> None:
    same, other = _logit(0.9, 0.1, 0.9, 0.1), _logit(0.1, 0.9, 0.1, 0.9)
    biased, even = (Uniformity(places=4).of_stage(_routing(torch.stack(rows), 0.5), None) for rows in ([same, same], [same, other]))
    assert float(biased) == pytest.approx(0.4**2)
    assert float(even) == pytest.approx(0, abs=1e-12)


def test_diversity_sees_rows_that_keep_the_same_places_whatever_their_probabilities() -> None:
    def of(*rows: torch.Tensor, places: int = 4) -> float:
        return float(Diversity(places=places).of_stage(_routing(torch.stack(rows), 0.5), None))

    same, other, level = _logit(0.9, 0.1, 0.9, 0.1), _logit(0.1, 0.9, 0.1, 0.9), _logit(0.5, 0.5, 0.5, 0.5)
    assert of(same, same) == pytest.approx(1)
    assert of(level, level) == pytest.approx(1)
    # The variance between the rows is .4² everywhere, and ¼ is the most that a keep of one half allows.
    assert of(same, other) == pytest.approx(1 - 0.4**2 / 0.25)
    # In halves of the row the keeps are equal.
    assert of(same, other, places=2) == pytest.approx(1)
    scores = torch.stack([same, other]).requires_grad_()
    Diversity(places=4).of_stage(_routing(scores, 0.5), None).backward()
    # It pulls decisions apart, and the mean keep nowhere.
    assert torch.equal(scores.grad.sign(), -scores.detach().sign())  # type: ignore[union-attr]
    assert float(scores.grad.sum()) == pytest.approx(0, abs=1e-12)  # type: ignore[union-attr]


def _pulled(budget: Budget, up: float, steps: int = 120) -> tuple[float, Budget]:
    """The achieved measure of held-out images after training with a loss that pulls keeps up."""
    torch.manual_seed(0)
    model = compress(dense("vit"), budget.compression).train()
    optimizer = torch.optim.Adam([p for name, p in model.named_parameters() if ".stages." in name], lr=2e-2)
    for step in range(steps):
        trace = budget.trace(step)
        model(pixel_values=images(8, seed=step), trace=trace)
        optimizer.param_groups[0]["lr"] = 2e-2 * (1 - step / steps)
        optimizer.zero_grad()
        pull = sum(-up * routing.soft.mean() for routing in trace.routings.values())  # type: ignore[union-attr]
        (budget.loss(trace, step).total + pull).backward()
        optimizer.step()
    _, trace = traced(model.eval(), images(64, seed=1000))
    if budget.config.measure == "keep":
        return trace.routings["before_1"].achieved, budget
    return budget.cost.achieved(trace), budget


def _budget(**settings: Any) -> Budget:
    scorer, selector = {"name": "learned", "detach": True}, settings.pop("selector", "gumbel")
    stages = CompressionConfig([StageConfig(layer=layer, scorer=scorer, selector=selector) for layer in settings.pop("layers", [1])])
    return Budget(BudgetConfig(ramp_until=0.0, noise_until=0.5, **settings), dense("vit"), stages, total_steps=120)


def test_a_fixed_penalty_misses_where_the_task_pulls_and_the_default_controller_does_not() -> None:
    missed, _ = _pulled(
        _budget(measure="keep", target=0.5, noise=1.0, regularizer={"name": "ratio_mse", "weight": 2.0}, controller="fixed"), 0.6
    )
    # A short training needs a fast multiplier.
    fast = {"name": "augmented_lagrangian", "rate": 1.0}
    met, budget = _pulled(_budget(measure="keep", target=0.5, noise=1.0, controller=fast), 0.6)
    assert missed - 0.5 > 0.05
    assert met == pytest.approx(0.5, abs=0.03)
    # The multiplier has found the pull of the task, and opposes it.
    assert float(budget.controls["before_1"]["multiplier"]) > 0.3


@pytest.mark.slow
@pytest.mark.parametrize(
    "controller", [{"name": "augmented_lagrangian", "rate": 1.0}, {"name": "nupi", "integral": 1.0}], ids=["al", "nupi"]
)
@pytest.mark.parametrize("measure", ["macs_ratio", "mean_token_fraction"])
def test_one_target_for_the_model_is_met_and_its_stages_learn_keeps_of_their_own(measure: str, controller: dict[str, Any]) -> None:
    got, budget = _pulled(_budget(measure=measure, target=0.7, controller=controller, layers=[1, 2], noise=1.0), 0.3)
    assert list(budget.controls) == [measure]
    if measure == "macs_ratio":
        assert got == pytest.approx(0.7, abs=0.03)


def _gap(budget: Budget, step: int) -> float:
    model, trace = compress(dense("vit"), budget.compression).train(), budget.trace(step)
    model(pixel_values=images(), trace=trace)
    return float(next(iter(budget.loss(trace, step).gaps.values())))


def test_a_controller_moves_once_a_step_by_the_mean_over_its_forwards_and_resumes_exactly() -> None:
    budget = _budget(measure="keep", target=0.5, controller={"name": "augmented_lagrangian", "rate": 1.0})
    gaps = [_gap(budget, 0), _gap(budget, 0)]
    assert budget.controls == {}
    again = _budget(measure="keep", target=0.5, controller={"name": "augmented_lagrangian", "rate": 1.0})
    again.load_state_dict(budget.state_dict())
    for it in (budget, again):
        _gap(it, 1)
        assert float(it.controls["before_1"]["multiplier"]) == pytest.approx(sum(gaps) / 2)
    assert all(torch.equal(value, again.controls["before_1"][key]) for key, value in budget.controls["before_1"].items())


def test_the_derivative_of_a_gap_is_the_density_of_scores_at_the_cut() -> None:
    """The keep of normal scores, of any spread, moves with their common shift as their density at the cut does, noise or not."""
    draws = torch.randn(4, 4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for spread, noise in ((0.5, 0.0), (2.0, 0.0), (2.0, 1.5)):
        shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
        routing = _routing(draws * spread + 0.3 * spread + shift, 0.5)
        width = kernel_width(*mean_and_spread(routing, torch.zeros(1)), noise)
        assert float(width) == pytest.approx(max(noise, 0.5 * spread), rel=0.02)
        count, present = kept_by_row(routing, width)
        (gradient,) = torch.autograd.grad((count / present).mean(), shift)
        # Logistic noise has the variance noise²·π²/3.
        wide = math.sqrt(spread**2 + (float(width) * math.pi) ** 2 / 3)
        assert float(gradient) == pytest.approx(math.exp(-((0.3 * spread / wide) ** 2) / 2) / (wide * math.sqrt(2 * math.pi)), rel=0.07)


@pytest.mark.parametrize(
    ("regularizer", "mean"),
    [(None, -25.0), (None, 25.0), ("ratio_mse", -25.0), pytest.param("ratio_mse", 25.0, marks=pytest.mark.slow)],
)
def test_scores_that_are_all_on_one_side_of_the_cut_are_brought_back(mean: float, regularizer: str | None) -> None:
    """As of a router that had learned to keep next to nothing: probabilities and the density at the cut say nothing there."""
    budget = _budget(measure="keep", target=0.1 if mean < 0 else 0.9, regularizer=regularizer)
    draws = mean + 5 * torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    shift = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([shift], 0.2)
    for step in range(600):
        optimizer.zero_grad()
        scores = draws + shift
        loss = budget.loss(Trace(routings={"before_1": _routing(scores, budget.config.target, (scores > 0).sum(-1))}), step)
        # The task pulls further away, as weakly as one that a few tokens more change little.
        (loss.total - 1e-3 * math.copysign(1, mean) * shift).backward()
        optimizer.step()
    assert abs(float(loss.gaps["before_1"])) < 0.02


@pytest.mark.parametrize(("regularizer", "grows"), [("ratio_mse", True), ("two_sided_l1", False), ("hinge", False)])
def test_a_pull_that_does_not_weaken_near_the_target_keeps_its_weight(regularizer: str, grows: bool) -> None:
    budget = _budget(measure="keep", target=0.5, regularizer=regularizer, controller={"name": "augmented_lagrangian", "every": 1})
    weights = []
    for step in range(4):
        scores = torch.ones(2, 4, requires_grad=True)
        weights.append(float(budget.loss(Trace(routings={"before_1": _routing(scores, 0.5, torch.tensor([4, 4]))}), step).weight))
    # The gap does not shrink, so that the penalty grows.
    assert (weights[-1] > weights[0]) == grows


def test_scores_near_the_cut_are_pushed_apart_and_others_are_left_alone() -> None:
    def push(spread: float) -> float:
        budget = _budget(measure="keep", target=0.5)
        scores = (torch.tensor([[-1.0, 1.0, -1.0, 1.0]]) * spread).requires_grad_()
        loss = budget.loss(Trace(routings={"before_1": _routing(scores, 0.5, torch.tensor([2]))}), 0)
        loss.total.backward()
        assert float(loss.gaps["before_1"]) == 0
        return float(loss.total.detach())

    assert push(0.25) == pytest.approx(0.75**2, rel=1e-3)
    assert push(2.0) == 0


def test_a_batch_without_a_token_to_remove_is_no_gap_and_a_stage_that_did_not_run_takes_part() -> None:
    budget = _budget(measure="keep", target=0.5)
    scores = torch.ones(2, 4, requires_grad=True)
    every = torch.ones(2, 4, dtype=torch.bool)
    nothing = replace(_routing(scores, 0.5, torch.tensor([0, 0])), state=TokenState.initial(2, 4, every, every, scores.device))
    loss = budget.loss(Trace(routings={"before_1": nothing}), 0)
    assert float(loss.gaps["before_1"]) == 0
    calls: list[int] = []

    def over_ranks(value: torch.Tensor) -> torch.Tensor:
        calls.append(value.numel())
        return value

    for routings in ({"before_1": _routing(scores, 0.5, torch.tensor([2, 2]))}, {"other": _routing(scores, 0.5)}):
        budget.loss(Trace(routings=routings), 0, over_ranks)
    assert calls[: len(calls) // 2] == calls[len(calls) // 2 :]


@pytest.mark.parametrize("state", [{}, {"controls": {}, "step": 3}])
def test_a_checkpoint_without_the_controllers_state_is_named(state: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"the checkpoint's state of the budget lacks .*gaps, so that budget.controller cannot go on"):
        _budget(measure="keep").load_state_dict(state)


def test_the_state_of_another_controller_is_refused_with_both_names() -> None:
    state = _budget(measure="keep", target=0.5).state_dict()
    with pytest.raises(ValueError, match="is that of controller 'augmented_lagrangian', and budget.controller is 'nupi': set it to the"):
        _budget(measure="keep", target=0.5, controller="nupi").load_state_dict(state)
    # Its options may be others.
    _budget(measure="keep", target=0.5, controller={"name": "augmented_lagrangian", "rate": 1.0}).load_state_dict(state)


def test_at_full_length_a_controller_waits() -> None:
    budget = _budget(target=0.6, schedule="step", start=1.0, schedule_until=0.5)
    model, trace = compress(dense("vit"), budget.compression).train(), budget.trace(0)
    model(pixel_values=images(), trace=trace)
    assert budget.loss(trace, 0).gaps == {}


def test_the_controller_is_an_augmented_lagrangian_where_routers_decide_the_count_and_there_is_none_elsewhere() -> None:
    assert isinstance(_budget(target=0.6).controller, AugmentedLagrangian)
    assert _budget(target=0.6, selector="top_k").controller is None


def test_controllers_with_nothing_to_hold_and_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match="budget.controller = 'nupi' has nothing to hold: the selectors of all stages fix the count"):
        _budget(target=0.6, selector="top_k", controller="nupi")
    with pytest.raises(ValueError, match="the selectors of before_1 keep .* and nothing brings that to the requested keep"):
        _budget(target=0.6, controller="fixed")
    with pytest.raises(ValueError, match="controller 'augmented' does not exist"):
        BudgetConfig(controller="augmented")
    with pytest.raises(ValueError, match="memory = 1 must be in"):
        _budget(target=0.6, controller={"name": "nupi", "memory": 1})
    with pytest.raises(ValueError, match="rate = -1 must be a number of at least 0"):
        _budget(target=0.6, controller={"name": "augmented_lagrangian", "rate": -1})


def test_soft_costs_of_rows_are_those_of_each_row() -> None:
    cost = CostModel(dense("vit"), CompressionConfig([StageConfig(layer=1, scorer="learned", selector="gumbel", keep=0.5)]))
    keeps = torch.tensor([0.25, 0.75])
    for measure in ("macs_ratio", "mean_token_fraction"):
        rows = cost.soft({"before_1": keeps}, measure)
        single = [getattr(cost({"before_1": float(keep)}), measure) for keep in keeps]
        assert rows.tolist() == pytest.approx(single, rel=1e-5)
