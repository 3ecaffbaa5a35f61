"""What a warning advises is accepted by the recipe that it is given for."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from laconic import BudgetConfig, CompressionConfig, StageConfig, compress, stages_of
from laconic.modules.budget.budget import Budget
from laconic.trainer.measure.cures import Cures, any_of
from laconic.trainer.measure.strayed import strayed
from tests.matrix import dense


def _cures(**settings: Any) -> Cures:
    selector, layers = settings.pop("selector", "gumbel"), settings.pop("layers", [1])
    stages = CompressionConfig([StageConfig(layer=layer, scorer="learned", selector=selector) for layer in layers])
    return Cures(Budget(BudgetConfig(target=0.5, **settings), dense("vit"), stages))


def _advised(cures: Cures) -> list[str]:
    assert cures.budget is not None
    (stage,) = (stage for stage in stages_of(compress(dense("vit"), cures.budget.compression)).values())
    return [*cures.controller("larger"), *cures.regularizer(stage, "z_loss", "diversity"), *cures.noise(stage)]


SETTINGS: dict[str, dict[str, Any]] = {
    "augmented_lagrangian": {},
    "nupi": {"controller": "nupi"},
    "fixed": {"controller": "fixed", "regularizer": "ratio_mse"},
    "top_k": {"selector": "top_k"},
    "threshold": {"selector": "threshold"},
    "not_calibrated": {"selector": {"name": "threshold", "calibrate": False}},
}
_RATE = "give a larger rate than in budget.controller='{name: augmented_lagrangian, rate: 0.1}'"
_INTEGRAL = "give a larger integral than in budget.controller='{name: nupi, integral: 0.3}'"
_WEIGHT = "give a larger weight than in budget.regularizer='{name: ratio_mse, weight: 2}'"
_EXPECTED = {
    "augmented_lagrangian": [_RATE, "set budget.regularizer=z_loss or diversity", "raise budget.noise"],
    "nupi": [_INTEGRAL, "set budget.regularizer=z_loss or diversity", "raise budget.noise"],
    # The regularizer is what holds the ratio there.
    "fixed": [_WEIGHT, "raise budget.noise"],
    "top_k": ["set budget.regularizer=z_loss or diversity", "raise budget.noise"],
    "threshold": ["set budget.regularizer=z_loss or diversity"],
    "not_calibrated": [_RATE, "set budget.regularizer=z_loss or diversity", "raise budget.noise"],
}


@pytest.mark.parametrize("name", list(SETTINGS))
def test_advice_names_keys_that_the_recipe_accepts(name: str) -> None:
    assert _advised(_cures(**SETTINGS[name])) == _EXPECTED[name]
    changes: dict[str, dict[str, Any]] = {}
    for advice in _EXPECTED[name]:
        if "a larger" in advice:
            option, key, part = re.findall(r"a larger (\w+) than in budget\.(\w+)='(.*)'", advice)[0]
            changes[advice] = {key: {**yaml.safe_load(part), option: 50.0}}
        elif "regularizer=" in advice:
            changes[advice] = {"regularizer": "z_loss"}
        else:
            changes[advice] = {"noise": 2.0}
    for change in changes.values():
        # Raises ValueError where a key is refused.
        _cures(**{**SETTINGS[name], **change})


def test_a_stage_that_a_regularizer_alone_holds_keeps_it() -> None:
    parts = {"scorer": "learned"}
    own = [StageConfig(layer=1, keep=0.5, selector="gumbel", **parts), StageConfig(layer=2, selector="top_k", **parts)]
    cures = Cures(Budget(BudgetConfig(target=0.5, regularizer="ratio_mse"), dense("vit"), CompressionConfig(own)))
    stage = next(iter(stages_of(compress(dense("vit"), cures.budget.compression)).values()))  # type: ignore[union-attr]
    assert (cures.regularizer(stage, "diversity"), cures.controller("larger", stage)) == ([], [])
    # A controller does not hold what has a keep of its own.
    both = [StageConfig(layer=1, keep=0.5, selector="gumbel", **parts), StageConfig(layer=2, selector="gumbel", **parts)]
    cures = Cures(Budget(BudgetConfig(target=0.5), dense("vit"), CompressionConfig(both)))
    first, second = stages_of(compress(dense("vit"), cures.budget.compression)).values()  # type: ignore[union-attr]
    assert cures.controller("larger", first) == []
    assert cures.controller("larger", second) == [_RATE]


def test_without_a_budget_there_is_no_advice_on_one() -> None:
    stages = CompressionConfig([StageConfig(layer=1, keep=0.5, scorer="learned")])
    (stage,) = stages_of(compress(dense("vit"), stages)).values()
    cures = Cures()
    assert [*cures.controller("larger"), *cures.regularizer(stage, "z_loss"), *cures.noise(stage)] == []
    assert (any_of(["a"]), any_of(["a", "b"]), any_of(["a", "b", "c"])) == ("a", "a or b", "a, b or c")


def test_stages_that_stray_are_given_the_cure_of_their_own_kind() -> None:
    def line(cures: Cures, achieved: float) -> str:
        assert cures.budget is not None
        stages = stages_of(compress(dense("vit"), cures.budget.compression)).values()
        (found,) = strayed(stages, {"before_1": 0.5}, {"before_1": achieved}, "runs/x", cures)
        return found

    # A threshold that follows the scores has no controller.
    assert "hold the share of the training rows" in line(_cures(measure="keep", selector="threshold"), 0.524)
    held = line(_cures(measure="keep", controller="nupi"), 0.55)
    assert held.endswith(f"train longer after the schedule of the budget has ended or {_INTEGRAL}")
    fixed = line(_cures(measure="keep", controller="fixed", regularizer="ratio_mse"), 0.55)
    assert fixed.endswith(f"or {_WEIGHT}")


@pytest.mark.parametrize("measure", ["macs_ratio", "mean_token_fraction"])
def test_stages_that_share_one_target_are_held_to_the_models_measure(measure: str) -> None:
    cures = _cures(measure=measure, layers=[1, 2])
    assert cures.shared
    assert cures.budget is not None
    stages = list(stages_of(compress(dense("vit"), cures.budget.compression)).values())
    requested, away = dict.fromkeys(("before_1", "before_2"), 0.5), {"before_1": 0.9, "before_2": 0.1}
    other = {"macs_ratio": 0.9, "mean_token_fraction": 0.9}
    assert strayed(stages, requested, away, "runs/x", cures, {**other, measure: 0.51}) == []
    (line,) = strayed(stages, requested, away, "runs/x", cures, {**other, measure: 0.6})
    assert f"{measure} achieved on held-out data is 0.600, and 0.500 was requested; train longer" in line
    # With a target for every stage, each is held to its own.
    one = _cures(measure="keep", layers=[1, 2])
    assert not one.shared
    (line,) = strayed(stages, requested, away, "runs/x", one, other)
    assert "before_1 0.900 of 0.500, before_2 0.100 of 0.500" in line
