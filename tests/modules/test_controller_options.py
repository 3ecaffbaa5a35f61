"""Options with which a controller would not control are refused."""

from __future__ import annotations

from typing import Any

import pytest

from laconic.modules import registry
from laconic.modules.config import PartConfig

WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("augmented_lagrangian", {"rate": 0, "penalty": 0}, "rate and penalty = 0 leaves it without any pull to the target: raise rate or"),
    ("augmented_lagrangian", {"highest": 0}, "highest = 0 leaves it without any pull"),
    ("nupi", {"integral": 0, "proportional": 0}, "integral and proportional = 0 leaves it without any pull"),
    ("augmented_lagrangian", {"growth": 0.5}, "growth = 0.5 must be at least 1: the penalty grows where the gap does not shrink"),
]


@pytest.mark.parametrize(("name", "options", "message"), WRONG)
def test_a_controller_that_would_not_pull_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        registry.build("controller", PartConfig(name, options))
