"""The gap of a whole model is what its report would say, for rows of any length, on any number of processes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from laconic import CompressionConfig, StageConfig, Trace, compress
from laconic.modules.budget.budget import Budget
from laconic.modules.budget.config import BudgetConfig
from laconic.modules.tokens.keep_count import KeepCount
from tests.matrix import dense, encoders, images
from tests.matrix.case import spread

LENGTHS = (24, 17, 9, 24, 5, 3)


def _budget(family: str, measure: str, size: int) -> Budget:
    stages = CompressionConfig([StageConfig(layer=layer, scorer="learned", selector="gumbel") for layer in (1, 2)])
    return Budget(BudgetConfig(measure=measure, target=0.7, ramp_until=0.0), encoders.dense(family), stages, size=size)


def _traced(budget: Budget, family: str, rows: slice) -> Trace:
    model = spread(compress(encoders.dense(family), budget.compression))
    _, trace = encoders.traced(model, encoders.tokens(len(LENGTHS))[rows], attention_mask=encoders.lengths_mask(*LENGTHS)[rows])
    return trace


# The configured size is that of the longest row, or four times as much: the budget does not know what the data will be.
@pytest.mark.parametrize("size", [24, 96])
@pytest.mark.parametrize("measure", ["macs_ratio", "mean_token_fraction"])
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_the_gap_of_padded_rows_is_that_of_the_report(family: str, measure: str, size: int) -> None:
    budget = _budget(family, measure, size)
    trace = _traced(budget, family, slice(None))
    (gap,) = budget.loss(trace, 0).gaps.values()
    count = KeepCount()
    count.add(trace, budget.cost, len(LENGTHS))
    assert 0.3 < getattr(count, measure) < 0.95
    assert float(gap) + 0.7 == pytest.approx(getattr(count, measure), abs=1e-6)
    tokens = trace.flow().layer_tokens.values()
    fraction = sum(int((it.attention + it.mlp).sum()) for it in tokens) / (2 * len(tokens) * sum(LENGTHS))
    assert count.mean_token_fraction == pytest.approx(fraction, rel=1e-6)


@pytest.mark.parametrize("measure", ["macs_ratio", "mean_token_fraction"])
def test_processes_with_rows_of_other_lengths_have_the_gap_of_all_rows(measure: str) -> None:
    budget = _budget("bert", measure, 24)
    (whole,) = budget.loss(_traced(budget, "bert", slice(None)), 0).gaps.values()
    halves = [_traced(budget, "bert", rows) for rows in (slice(0, 2), slice(2, None))]
    sent: list[list[torch.Tensor]] = []
    for trace in halves:
        given: list[torch.Tensor] = []
        budget.loss(trace, 0, _recorder(given))
        sent.append(given)

    means = iter([(one + other) / 2 for one, other in zip(*sent, strict=True)])
    (gap,) = budget.loss(halves[0], 0, lambda value: next(means)).gaps.values()
    assert float(gap) == pytest.approx(float(whole), abs=1e-6)


def _recorder(given: list[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def over_ranks(value: torch.Tensor) -> torch.Tensor:
        given.append(value.detach())
        return value

    return over_ranks


def test_the_gap_of_a_model_still_moves_with_the_scores() -> None:
    budget = _budget("bert", "macs_ratio", 96)
    model = spread(compress(encoders.dense("bert"), budget.compression)).train()
    trace = budget.trace(0)
    model(encoders.tokens(len(LENGTHS)), attention_mask=encoders.lengths_mask(*LENGTHS), trace=trace)
    budget.loss(trace, 0).total.backward()
    assert all(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if ".stages." in name and "bias" in name)


@pytest.mark.parametrize("measure", ["macs_ratio", "mean_token_fraction"])
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_whole_rows_of_the_configured_length_need_no_count_of_their_own(family: str, measure: str) -> None:
    budget = _budget(family, measure, 24)
    model = spread(compress(encoders.dense(family), budget.compression))
    _, trace = encoders.traced(model, encoders.tokens(4))
    assert budget.cost.as_configured(trace)
    (gap,) = budget.loss(trace, 0).gaps.values()
    assert float(gap) + 0.7 == pytest.approx(budget.cost.achieved(trace, measure), abs=1e-6)


def test_a_schedule_waits_where_keeping_every_token_does_not_reach_its_value() -> None:
    """A stage with a keep of its own: nothing that the router decides closes the gap to the first values, and a multiplier would wind up."""
    stages = CompressionConfig([StageConfig(layer=1, keep=0.25), StageConfig(layer=2, scorer="learned", selector="gumbel")])
    config = BudgetConfig(target=0.46, schedule="linear", start=1.0, schedule_until=1.0)
    budget = Budget(config, dense("vit"), stages, total_steps=100)
    model, waited = compress(dense("vit"), budget.compression), []
    for step in range(0, 100, 9):
        trace = budget.trace(step)
        model(images(), trace=trace)
        waited.append(not budget.loss(trace, step).gaps)
    reach = budget.cost(dict.fromkeys(budget.free, 1.0)).macs_ratio
    assert waited == [budget.target(step) >= reach for step in range(0, 100, 9)]
    assert waited[0]
    assert not waited[-1]


@pytest.mark.parametrize(
    ("measure", "refused", "accepted"), [("macs_ratio", 0.37, 0.38), ("mean_token_fraction", 0.28, 0.3), ("keep", 0.02, 0.028)]
)
def test_a_router_keeps_at_least_one_token_of_a_row(measure: str, refused: float, accepted: float) -> None:
    """So the floor is that of one token, not that of a share of a token."""
    stages = CompressionConfig([StageConfig(layer=1, scorer="learned", selector="gumbel")])
    Budget(BudgetConfig(measure=measure, target=accepted), dense("vit"), stages)
    with pytest.raises(ValueError, match=f"budget.target = {refused} cannot be met"):
        Budget(BudgetConfig(measure=measure, target=refused), dense("vit"), stages)


@pytest.mark.parametrize("selector", ["top_k", "threshold"])
def test_a_target_above_what_the_free_stages_reach_beside_others_is_refused(selector: str) -> None:
    beside = [StageConfig(layer=1, scorer="learned", selector=selector), StageConfig(layer=2, keep=0.1, scorer="learned")]
    with pytest.raises(ValueError, match="target = 0.9 cannot be met: with every token .* because other stages have a keep of their own"):
        Budget(BudgetConfig(measure="macs_ratio", target=0.9), dense("vit"), CompressionConfig(beside))


@pytest.mark.parametrize("measure", ["macs_ratio", "mean_token_fraction"])
@pytest.mark.parametrize("count", [None, "cosine", "dynamicvit"])
def test_the_gap_counts_what_stages_of_another_keep_really_keep(count: str | None, measure: str) -> None:
    others = [StageConfig(layer=layer, site="around", keep=0.6, scorer="random", count=count) for layer in (1, 2, 3)]
    stages = CompressionConfig([StageConfig(layer=0, scorer="learned", selector="gumbel"), *others])
    budget = Budget(BudgetConfig(measure=measure, target=0.4), dense("vit"), stages)
    model, trace = compress(dense("vit"), budget.compression).train(), budget.trace(0)
    model(images(4), trace=trace)
    (gap,) = budget.loss(trace, 0).gaps.values()
    assert float(gap) + 0.4 == pytest.approx(budget.cost.achieved(trace, measure), abs=1e-6)


@pytest.mark.parametrize("batches", [[1, 1, 1, 1, 1, 1], [2, 4], [6]])
def test_what_is_achieved_does_not_depend_on_how_rows_are_batched(batches: list[int]) -> None:
    budget = _budget("bert", "macs_ratio", 24)
    count, begin = KeepCount(), 0
    for rows in batches:
        count.add(_traced(budget, "bert", slice(begin, begin + rows)), budget.cost, rows)
        begin += rows
    whole = KeepCount()
    whole.add(_traced(budget, "bert", slice(None)), budget.cost, len(LENGTHS))
    assert count.macs_ratio == pytest.approx(whole.macs_ratio, rel=1e-6)
    assert count.mean_token_fraction == pytest.approx(whole.mean_token_fraction, rel=1e-6)
