"""Parts that Python code gives as a class or an object, and what of them a saved model could not find again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from laconic import (
    Budget,
    BudgetConfig,
    CompressionConfig,
    StageConfig,
    Trace,
    compress,
    from_pretrained,
    save_adapter,
    stages_of,
    train_only,
)
from laconic.modules.config import PartConfig
from laconic.modules.cost.cost import CostModel
from laconic.modules.cost.shape import StackShape
from laconic.modules.estimators.straight_through import StraightThroughEstimator
from laconic.modules.mergers.drop import DropMerger
from laconic.modules.scorers.base import Scored, Scorer
from laconic.modules.scorers.learned import LearnedScorer
from laconic.modules.selectors.top_k import TopKSelector
from laconic.modules.site import SiteInput, TokenSpec
from tests.matrix import dense, images, labels, traced

SPEC = TokenSpec(hidden_size=16, classes=5)


class OwnScorer(Scorer):
    """A trained scorer of a user: one linear map."""

    estimator = "straight_through"
    probabilities = True
    lookahead = True

    def __init__(self, spec: TokenSpec, sign: float = 1.0) -> None:
        super().__init__(spec)
        self.sign, self.score = sign, nn.Linear(spec.hidden_size, 1)

    def forward(self, inputs: SiteInput) -> Scored:
        return Scored(self.sign * self.score(inputs.hidden_states).squeeze(-1).float())

    def macs(self, shape: StackShape, tokens: int) -> int:
        return tokens * shape.hidden


class OwnSelector(TopKSelector):
    """Of a user."""


class OwnMerger(DropMerger):
    """Of a user."""


class OwnEstimator(StraightThroughEstimator):
    """Of a user."""


OWN: dict[str, Any] = {"scorer": OwnScorer, "selector": OwnSelector, "merger": OwnMerger, "estimator": OwnEstimator}


def _object(kind: str) -> nn.Module:
    made: nn.Module = OWN[kind]() if kind == "estimator" else OWN[kind](SPEC)
    return made


def _stages(**parts: Any) -> CompressionConfig:
    return CompressionConfig([StageConfig(layer=layer, keep=0.5, **parts) for layer in (1, 2)])


@pytest.mark.parametrize("given", [OwnScorer, OwnScorer(SPEC, sign=-1.0), {"name": "learned"}], ids=["class", "object", "name"])
def test_a_scorer_that_python_gives_trains_and_is_costed_as_one_by_name_is(given: Any) -> None:
    model = compress(dense("vit"), _stages(scorer=given)).train()
    trace = Trace()
    model(pixel_values=images(), labels=labels(), trace=trace).loss.backward()
    assert [routing.kept for routing in trace.routings.values()] == [18, 9]
    scorers = [stage.scorer for stage in stages_of(model).values()]
    assert all(parameter.grad is not None for scorer in scorers for parameter in scorer.parameters())
    cost = CostModel(model)
    assert cost.achieved(trace) == pytest.approx(cost().macs_ratio)
    if given is OwnScorer:
        assert dict(cost().stage_macs) == {"before_1": 37 * 16, "before_2": 19 * 16}


def test_an_object_is_copied_for_every_stage_and_stays_as_it_was() -> None:
    given = OwnScorer(SPEC, sign=-1.0)
    before = given.score.weight.detach().clone()
    model = compress(dense("vit"), _stages(scorer=given)).train()
    first, second = (stage.scorer for stage in stages_of(model).values())
    assert len({id(scorer.score.weight) for scorer in (given, first, second)}) == 3
    assert (first.sign, second.sign) == (-1.0, -1.0)
    assert torch.equal(first.score.weight, second.score.weight)
    optimizer = torch.optim.SGD(first.parameters(), lr=1.0)
    model(pixel_values=images(), labels=labels(), trace=Trace()).loss.backward()
    optimizer.step()
    assert not torch.equal(first.score.weight, before)
    assert torch.equal(second.score.weight, before)
    assert torch.equal(given.score.weight, before)
    assert given.score.weight.grad is None


def test_a_budget_decides_the_keep_of_a_stage_with_a_part_that_python_gives() -> None:
    stages = CompressionConfig([StageConfig(layer=1, scorer=OwnScorer(SPEC))])
    budget = Budget(BudgetConfig(target=0.6), dense("vit"), stages)
    model = compress(dense("vit"), budget.compression)
    assert isinstance(stages_of(model)["before_1"].scorer, OwnScorer)
    assert CostModel(model)().macs_ratio <= 0.6


@pytest.mark.parametrize("kind", OWN)
def test_every_kind_of_part_may_be_a_class_or_an_object_and_saving_refuses_it_by_name(kind: str, tmp_path: Path) -> None:
    name = OWN[kind].__name__
    for given, why in (
        (
            OWN[kind],
            f"was given as a class without a registered name: declare it as an entry point in group 'laconic.{kind}s' of its package",
        ),
        (_object(kind), "was given as an object, whose options cannot be saved: give its name and options"),
    ):
        model = compress(dense("vit"), _stages(**{kind: given}))
        assert all(isinstance(getattr(stage, kind), OWN[kind]) for stage in stages_of(model).values())
        model.train()(pixel_values=images(), labels=labels(), trace=Trace()).loss.backward()
        with pytest.raises(ValueError, match=f"stage 'before_1' cannot be saved: {kind} '{name}' {why}"):
            model.save_pretrained(tmp_path / "model")
        assert not (tmp_path / "model").exists()


def test_an_adapter_with_such_a_part_is_refused_too(tmp_path: Path) -> None:
    dense("vit").save_pretrained(tmp_path / "base")
    model = compress(dense("vit"), _stages(scorer=OwnScorer))
    train_only(model, [])
    with pytest.raises(ValueError, match="stage 'before_1' cannot be saved: scorer 'OwnScorer' .*'laconic.scorers'"):
        save_adapter(model, tmp_path / "adapter", base=tmp_path / "base")
    assert not (tmp_path / "adapter").exists()


def test_a_class_of_this_package_has_a_name_and_is_saved_under_it(tmp_path: Path) -> None:
    model = compress(dense("vit"), _stages(scorer=LearnedScorer)).eval()
    assert stages_of(model)["before_1"].config.part("scorer") == PartConfig("learned", given=LearnedScorer)
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert again.config.compression["stages"][0]["scorer"] == {"name": "learned", "options": {}}
    assert torch.equal(traced(again, images())[0], traced(model, images())[0])


@pytest.mark.parametrize(
    ("kind", "base"), [("scorer", "Scorer"), ("selector", "Selector"), ("merger", "Merger"), ("estimator", "Estimator")]
)
def test_what_is_no_part_of_its_kind_is_refused(kind: str, base: str) -> None:
    with pytest.raises(ValueError, match=f"stage 'before_1': {kind} 'Linear' is .*, which does not derive from laconic's {base}"):
        compress(dense("vit"), _stages(**{kind: nn.Linear}))
    with pytest.raises(ValueError, match=f"a {kind} must be a name, a mapping with 'name' and options, or a Python class or object, not 3"):
        _stages(**{kind: 3})
