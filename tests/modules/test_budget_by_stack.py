"""One target shared out by the stacks of a vision-language model."""

from __future__ import annotations

import pytest

from laconic import Budget, BudgetConfig, CompressionConfig, StageConfig
from tests.matrix.visual import LAYERS, dense


def test_a_budget_shares_its_reduction_out_by_stack() -> None:
    stages = [StageConfig(layer=0, stack=stack, scorer="random", scope=scope) for stack, scope in (("vision", "all"), ("projector", "all"), ("text", "visual"))]  # fmt: skip
    config, keeps = CompressionConfig(stages, {"text": {"layer": LAYERS, "by": "rejoin"}}), {}
    for shares in ({}, {"vision": 0, "text": 2}):
        budget = Budget(BudgetConfig(target=0.93, shares=shares), dense(), config)
        keeps[len(shares)] = budget.keep(0)
        assert 0.85 < budget.cost(budget.keep(0)).macs_ratio <= 0.93
    assert len(set(keeps[0].values())) == 1
    projector = keeps[2]["projector.before_0"]
    assert keeps[2] == pytest.approx({"vision.before_0": 1, "projector.before_0": projector, "text.before_0": projector**2})
    for shares, message in (({"tower": 1}, "budget.shares names tower, .* are in 'vision', 'projector', 'text'"), (dict.fromkeys(("vision", "projector", "text"), 0), "0 for every stack")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Budget(BudgetConfig(shares=shares), dense(), config)
    with pytest.raises(ValueError, match="budget.shares.text = -1 must be a number of at least 0"):
        BudgetConfig(shares={"text": -1})
    for stack in ("vision", "text"):
        alone = CompressionConfig([stage for stage in stages if stage.stack == stack], config.restores)
        with pytest.raises(
            ValueError, match=f"shares out by stack, and all stages without a keep of their own are in '{stack}': remove it"
        ):
            Budget(BudgetConfig(target=0.95, shares={stack: 2}), dense(), alone)
