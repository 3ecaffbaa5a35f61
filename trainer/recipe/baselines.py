"""Control arms: the recipes that a run is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import RecipeError
from .files import LoadedRecipe, load
from .methods import SETTINGS
from .unread import OF_STAGES


def load_baselines(loaded: LoadedRecipe, overrides: Sequence[str]) -> list[LoadedRecipe]:
    """The control arms, with the overrides that apply to them. A dense arm has no compression to override, and no teacher, because it is
    what the teacher would be."""
    arms = []
    for name in loaded.recipe.baselines:
        dense = load(name).recipe.compression is None
        arm = load(name, [item for item in overrides if _shared(item, dense)])
        for key in ("task", "seed", "model", "data"):
            _require_equal(loaded, arm, key, getattr(loaded.recipe, key), getattr(arm.recipe, key))
        if arm.recipe.compression is not None:
            for key in ("distillation", "lora", "training_keep"):
                _require_equal(loaded, arm, key, getattr(loaded.recipe, key), getattr(arm.recipe, key))
        for key in ("max_steps", "max_epochs", "accumulate", "precision", "devices", "num_nodes"):
            _require_equal(loaded, arm, f"trainer.{key}", getattr(loaded.recipe.trainer, key), getattr(arm.recipe.trainer, key))
        arms.append(arm)
    return arms


def _shared(override: str, dense: bool) -> bool:
    """True if an override of the main recipe also applies to control arms: keys that define an arm are not shared."""
    path = override.partition("=")[0]
    if path.split(".")[0] in ("baselines", "output"):
        return False
    if dense:
        return not path.startswith(("compression", "budget", "distillation", "training_keep")) and path not in OF_STAGES
    if path in ("compression", "compression.stages"):
        raise RecipeError(f"{path} cannot be overridden as a whole for control arms too: override single keys, or set baselines=[]")
    # A method and its settings define an arm too.
    if path.startswith("compression.") and path.split(".")[1] in SETTINGS:
        raise RecipeError(
            f"{path} is of the recipe, and its control arms have stages of their own: set baselines=[], and train them as recipes"
        )
    return not (path.startswith("compression.stages.") and path.split(".")[3:4] in (["scorer"], ["estimator"]))


def _require_equal(main: LoadedRecipe, arm: LoadedRecipe, key: str, expected: Any, given: Any) -> None:
    if expected != given:
        raise RecipeError(
            f"baseline {arm.name}: its {key} differs from that of {main.name}, so the two are not comparable; "
            f"make them equal (an overlay with 'base: {main.name}' does), or set baselines=[]"
        )
