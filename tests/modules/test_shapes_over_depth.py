"""Shapes of the keep over depth, and what budget and regularizers see of selectors that fix the count."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from laconic import CompressionConfig, StageConfig, Trace, compress
from laconic.modules.budget.budget import Budget
from laconic.modules.budget.config import BudgetConfig
from laconic.modules.budget.regularizers.base import by_place, soft_keep
from laconic.modules.cost.cost import CostModel
from laconic.modules.tokens.state import TokenState
from laconic.modules.tokens.trace import Routing
from tests.matrix import decoders, dense, images

SHAPES = ("cosine", "linear", "dynamicvit")


def _vit(stages: list[StageConfig], **budget: Any) -> tuple[Budget, Trace]:
    """A budget over a ViT, and the trace of a training forward."""
    made = Budget(BudgetConfig(**{"measure": "keep", "target": 0.5, **budget}), dense("vit"), CompressionConfig(stages))
    model, trace = compress(dense("vit"), made.compression).train(), made.trace(0)
    model(images(4), trace=trace)
    return made, trace


@pytest.mark.parametrize("site", ["before", "around"])
@pytest.mark.parametrize("count", SHAPES)
def test_what_is_requested_of_a_stage_is_its_share_of_the_shape(count: str, site: str) -> None:
    budget, trace = _vit([StageConfig(layer=layer, site=site, scorer="learned", count=count) for layer in (1, 2, 3)])
    for name, routing in trace.routings.items():
        kept, present = routing.counts()
        # A whole number of tokens, of which one stays before a layer.
        assert abs(kept / present - routing.requested) <= (0.5 if count != "dynamicvit" else 1.0) * len(images(4)) / present + (
            1 / 36 if site == "before" and routing.requested == 0 else 0
        )
        assert CostModel(dense("vit"), budget.compression)().keep[name] == pytest.approx(routing.requested)
    asked = [routing.requested for routing in trace.routings.values()]
    assert asked == pytest.approx(
        {
            ("cosine", "before"): [1.0, 0.5, 0.0],
            ("cosine", "around"): [1.0, 0.5, 0.0],
            ("linear", "before"): [1.0, 0.75, 0.5 / 0.75],
            ("linear", "around"): [1.0, 0.75, 0.5],
            ("dynamicvit", "before"): [0.5, 0.5, 0.5],
            ("dynamicvit", "around"): [0.5, 0.25, 0.125],
        }[count, site]
    )


@pytest.mark.parametrize("count", SHAPES)
def test_a_shape_applies_to_rows_of_unequal_length(count: str) -> None:
    behind = [StageConfig(layer=layer, keep=0.5, scorer="random", count=count) for layer in (2, 3)]
    _, trace = _vit([StageConfig(layer=1, scorer="learned", selector="gumbel"), *behind])
    assert all((torch.as_tensor(routing.kept) <= torch.as_tensor(routing.present)).all() for routing in trace.routings.values())
    stages = [StageConfig(layer=layer, site="around", keep=0.4, scorer="linear", selector="top_k", count=count) for layer in (1, 2)]
    model, trace = compress(decoders.dense("llama"), CompressionConfig(stages)).train(), Trace()
    model(decoders.tokens(2), trace=trace)
    assert len(trace.routings) == 2


def test_a_token_stays_where_a_shape_asks_for_none_before_a_layer() -> None:
    for site, least in (("before", 4), ("around", 0)):
        _, trace = _vit([StageConfig(layer=layer, site=site, scorer="learned", count="cosine") for layer in (1, 2, 3)])
        assert list(trace.routings.values())[-1].counts()[0] == least


@pytest.mark.parametrize("regularizer", ["two_sided_l1", "ratio_mse", "hinge", "macs_squared"])
def test_a_regularizer_does_not_push_scores_by_a_count_that_does_not_follow_them(regularizer: str) -> None:
    # A threshold that follows the scores keeps its share, which is never exactly the requested one.
    budget, trace = _vit(
        [StageConfig(layer=1, scorer="learned", selector="threshold")], target=0.45, regularizer=regularizer, ramp_until=0.0
    )
    (routing,) = trace.routings.values()
    assert routing.soft is not None
    assert torch.equal(soft_keep(routing), (routing.soft * routing.routable).sum(-1) / routing.routable.sum(-1))
    free = _vit([StageConfig(layer=1, scorer="learned", selector="gumbel")], regularizer=regularizer)[1].routings["before_1"]
    assert soft_keep(free).tolist() == pytest.approx([int(kept) / 36 for kept in torch.as_tensor(free.kept)])
    assert budget.regularizer is not None


def test_squared_macs_count_what_is_kept_where_the_selector_fixes_the_count() -> None:
    fixed = StageConfig(layer=2, keep=0.3, scorer="learned")
    budget, trace = _vit(
        [StageConfig(layer=1, scorer="learned", selector="gumbel"), fixed],
        measure="macs_ratio",
        regularizer="macs_squared",
        controller="fixed",
    )
    assert budget.regularizer is not None
    loss = budget.regularizer(list(trace.routings.values()), 0.5, budget.cost)
    assert float(loss) == pytest.approx((budget.cost.achieved(trace) - 0.5) ** 2, rel=1e-3)
    (gradient,) = torch.autograd.grad(loss, trace.routings["before_2"].scores, allow_unused=True)
    assert gradient is None or not gradient.any()


def test_places_are_those_of_the_original_row() -> None:
    # An earlier stage has left the first quarter of one image, and every fourth patch of the other.
    index = torch.stack([torch.cat([torch.zeros(1, dtype=torch.long), kept]) for kept in (torch.arange(1, 17), torch.arange(1, 65, 4))])
    state = TokenState.initial(2, 65, 1, None, torch.device("cpu")).select(index, None)
    scores = torch.zeros(2, 17)
    routing = Routing("before_1", scores, True, None, state, 0.5, 16, 16, False, length=65)  # type: ignore[arg-type]
    _, number = by_place(routing, 4)
    assert number[0].tolist() == [16, 0, 0, 0]
    assert number[1].tolist() == [4, 4, 4, 4]


def test_the_floor_of_a_threshold_is_that_of_top_k() -> None:
    floors = []
    for selector in ("threshold", "top_k", "gumbel"):
        stages = CompressionConfig([StageConfig(layer=0, scorer="learned", selector=selector)])
        budget = Budget(BudgetConfig(target=0.9), dense("vit"), stages)
        floors.append(budget.floor)
        with pytest.raises(ValueError, match=f"with one token left the macs_ratio is still {budget.floor:.4f}"):
            budget.resolve(budget.floor - 0.005)
    assert floors == pytest.approx([floors[0]] * 3, abs=2e-3)


def test_a_schedule_without_the_number_of_steps_is_refused() -> None:
    stages = CompressionConfig([StageConfig(layer=1)])
    with pytest.raises(ValueError, match="schedule = 'linear' moves the target over training, and total_steps is 1: give Budget"):
        Budget(BudgetConfig(target=0.5, schedule="linear"), dense("vit"), stages)
    noisy = Budget(BudgetConfig(target=0.5, noise=1.0), dense("vit"), stages)
    assert noisy.trace(0).noise == 1
    with pytest.raises(ValueError, match="noise is annealed over training, and total_steps is 1: give Budget"):
        noisy.trace(1)
