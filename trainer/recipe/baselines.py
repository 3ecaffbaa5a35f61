"""Control arms: the recipes that a run is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import RecipeError
from .files import LoadedRecipe, load
from .methods import SETTINGS
from .schema import Recipe
from .unread import OF_STAGES


@dataclass(frozen=True)
class Baselines:
    """Control arms of a run.

    Attributes:
        arms: the recipes, in the order of their training.
        notes: why an arm is left out, or costs more or less training than the recipe, one line each.
    """

    arms: list[LoadedRecipe]
    notes: list[str]


def load_baselines(loaded: LoadedRecipe, overrides: Sequence[str]) -> Baselines:
    """The control arms, with the overrides that apply to them.

    A dense arm has no compression to override, and no teacher, because it is what the teacher would be. Overrides that put other stages
    into the recipe leave out the arms that they make incomparable: arms with stages of their own, those of another model, and for a dense
    recipe the dense ones.

    A recipe with phases and its dense arms have numbers of steps of one cost: an override of ``trainer.max_steps`` changes both by one factor.

    Raises:
        RecipeError: an arm is not comparable with the recipe as it is written.
    """
    arms, notes = [], []
    other = next((path for path in (item.partition("=")[0] for item in overrides) if defines(path)), None)
    for name in loaded.recipe.baselines:
        as_written = load(name).recipe
        dense = as_written.compression is None
        given = [item for item in overrides if shared(item, dense)]
        given += scaled_length(loaded, as_written, overrides)
        arm = load(name, given)
        if other is not None and (reason := incomparable(loaded.recipe, arm.recipe)) is not None:
            notes.append(f"control arm {name} is left out, because {other} is set: {reason}")
            continue
        own = ("distillation", "lora", "training_keep", "phases") if arm.recipe.compression is not None else ()
        check_alike(loaded, arm, ("model", *own))
        arms.append(arm)
        if dense and loaded.recipe.phases and any(_head(item) == "phases" for item in overrides):
            notes.append(
                f"control arm {name} has a length that does not follow phases, which is set: its train_macs may differ from that of {loaded.name}; "
                "laconic compare --equal time compares them at equal time"
            )
    return Baselines(arms, notes)


def check_alike(main: LoadedRecipe, arm: LoadedRecipe, blocks: Sequence[str] = (), otherwise: str = "set baselines=[]") -> None:
    """Raises RecipeError unless an arm trains as long as the recipe on the same samples, and has the same of these blocks.

    Args:
        main: the recipe.
        arm: the arm.
        blocks: keys that have to be equal too.
        otherwise: what to do without the arm, for the message.
    """
    for key in ("task", "seed", "data", *blocks):
        _require_equal(main, arm, key, getattr(main.recipe, key), getattr(arm.recipe, key), otherwise)
    # Steps of phases cost more or less than others, so that a dense arm of as much computation has another number of them.
    length = () if main.recipe.phases and arm.recipe.compression is None else ("max_steps",)
    for key in (*length, "max_epochs", "accumulate", "precision", "devices", "num_nodes"):
        _require_equal(main, arm, f"trainer.{key}", getattr(main.recipe.trainer, key), getattr(arm.recipe.trainer, key), otherwise)


def scaled_length(loaded: LoadedRecipe, arm: Recipe, overrides: Sequence[str]) -> list[str]:
    """Override of a dense arm's steps, by the factor by which overrides have changed those of a recipe with phases; none of other recipes."""
    if not loaded.recipe.phases or arm.compression is not None or all(_head(item) != "trainer" for item in overrides):
        return []
    steps, own, of_arm = loaded.recipe.trainer.max_steps, load(loaded.source).recipe.trainer.max_steps, arm.trainer.max_steps
    if steps is None or own is None or of_arm is None:
        return []
    return [f"trainer.max_steps={max(1, round(steps * of_arm / own))}"]


def _head(override: str) -> str:
    return override.partition("=")[0].partition(".")[0]


def incomparable(main: Recipe, arm: Recipe) -> str | None:
    """Why an arm says nothing about a recipe whose stages were replaced by others; None if it does."""
    if arm.compression is not None:
        return "it has stages of its own; train it as a recipe"
    if arm.model != main.model:
        return "its model is another one"
    return "it is the recipe itself" if main.compression is None else None


def defines(path: str) -> bool:
    """True if an override puts other stages into a recipe, or changes a setting of all stages of its method."""
    return path in ("compression", "compression.stages") or (path.startswith("compression.") and path.split(".")[1] in SETTINGS)


def shared(override: str, dense: bool) -> bool:
    """True if an override of the main recipe also applies to control arms: keys that define an arm are not shared."""
    path = override.partition("=")[0]
    if path.split(".")[0] in ("baselines", "output") or defines(path):
        return False
    if dense:
        return not path.startswith(("compression", "budget", "distillation", "training_keep", "phases")) and path not in OF_STAGES
    return not (path.startswith("compression.stages.") and path.split(".")[3:4] in (["scorer"], ["estimator"]))


def _require_equal(main: LoadedRecipe, arm: LoadedRecipe, key: str, expected: Any, given: Any, otherwise: str) -> None:
    if expected != given:
        raise RecipeError(
            f"arm {arm.name}: its {key} differs from that of {main.name}, so the two are not comparable; "
            f"make them equal (an overlay with 'base: {main.name}' does), or {otherwise}"
        )
