"""Wrong input is one message, never an error of another type; ``scripts/fuzz`` runs the same for longer."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz.mutations import damaged, mutated, numbers, places, values
from tests.fuzz.targets import Case, refused, targets

EXAMPLES = {"recipe": 40, "override": 80, "compression": 80, "manifest": 12, "config": 12, "header": 12, "validate": 12}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return targets(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EXAMPLES)
def test_wrong_input_is_refused_with_one_message(name: str, cases: dict[str, Case]) -> None:
    seen = {True: 0, False: 0}

    @settings(max_examples=EXAMPLES[name], deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(numbers, values)
    def check(draw: int, value: Any) -> None:
        seen[refused(cases[name], random.Random(draw), value)] += 1

    check()
    assert seen[True] > sum(seen.values()) / 4


def test_every_target_is_tried(cases: dict[str, Case]) -> None:
    assert cases.keys() == EXAMPLES.keys()


def test_an_error_of_another_type_is_found_and_one_message_is_not() -> None:
    def raising(error: Exception) -> Case:
        def case(draws: random.Random, value: Any) -> None:
            raise error

        return case

    for wrong in (TypeError("x"), KeyError("x"), UnicodeDecodeError("utf-8", b"", 0, 1, "x"), ValueError(""), RecursionError("x")):
        with pytest.raises(type(wrong) if str(wrong) else AssertionError):
            refused(raising(wrong), random.Random(0), None)
    assert refused(raising(ValueError("seed = true is no number")), random.Random(0), None)
    assert not refused(lambda draws, value: None, random.Random(0), None)


def test_mutations_change_one_place_and_reach_all() -> None:
    data = {"a": [1, {"b": 2}], "c": {"d": 3}}
    assert places(data) == [("a",), ("a", 0), ("a", 1), ("a", 1, "b"), ("c",), ("c", "d")]
    made = [str(mutated(data, random.Random(number), "new", ["e"])) for number in range(200)]
    assert data == {"a": [1, {"b": 2}], "c": {"d": 3}}
    assert len(set(made)) > 20
    assert len({damaged(b"0123456789abcdef" * 4, random.Random(number)) for number in range(50)}) > 30
