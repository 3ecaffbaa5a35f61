"""The same dense weights with a smaller input: images averaged over squares of patches, or smaller images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from ...data.splits import Splits
from ...modules.compress import compress
from ..build.build import cost_model
from ..build.image_size import load_at_own_size, scale_images, sized
from ..errors import RecipeError
from ..measure.forward_times import Forward, nearest, time_ratio
from ..recipe.files import changed
from ..recipe.schema import ModelRecipe, Recipe
from ..tasks.base import Task

# What an arm has in common with the compressed model.
EQUAL = ("tokens", "latency")
_DENSE = ("budget=null", "training_keep=null", "distillation=null", "phases=null")


@dataclass(frozen=True)
class Source:
    """Dense weights and their data.

    Attributes:
        model: the dense model, on its device; it is copied.
        data: its data.
        recipe: recipe of the task and data.
        task: the task.
        open_data: opens the data of a recipe for the model of a config.
        name: the evaluated run, export or folder, for messages.
    """

    model: PreTrainedModel
    data: Splits
    recipe: Recipe
    task: type[Task]
    open_data: Callable[[Recipe, PretrainedConfig], Splits]
    name: str


class Pooled:
    """Images averaged over squares of patches before the first layer, or before the language model. A size is a number of tokens.

    Args:
        source: the dense weights.

    Raises:
        ValueError: the task has no images.
    """

    unit = "tokens"

    def __init__(self, source: Source) -> None:
        self.source = source
        source.task.pooled(source.recipe, 1.0)
        cost = cost_model(source.model, size=source.task.size(source.recipe))
        if cost is None:
            raise ValueError("a family without an adapter has no stage that could pool")
        self.whole = cost.main.routable

    @property
    def sizes(self) -> Sequence[int]:
        """All sizes, smallest first."""
        return range(1, self.whole + 1)

    def of_tokens(self, keep: float) -> int:
        """The size with a share of the tokens."""
        return max(1, round(keep * self.whole))

    def at(self, size: int) -> Forward:
        """The model with as many tokens."""
        made = self.source.task.pooled(self.source.recipe, size / self.whole)
        recipe = changed(self.source.recipe, [*made, *_DENSE], "pooled")
        assert recipe.compression is not None
        model = compress(copy.deepcopy(self.source.model), recipe.compression)
        return Forward(model, self.source.data, self.source.recipe, self.source.task)


class Downsampled:
    """Smaller images, whose positions are interpolated. A size is a side in pixels.

    Args:
        source: the dense weights.

    Raises:
        ValueError: the task or the family has images of one size only.
    """

    unit = "pixels"

    def __init__(self, source: Source) -> None:
        self.source = source
        source.task.downsampled(source.recipe, 1.0)
        config: Any = sized(source.model.config)
        if not isinstance(getattr(config, "image_size", None), int):
            raise ValueError(f"a {source.model.config.model_type} has no images of one size")
        self.whole, self.patch = config.image_size, config.patch_size
        self._config(1)

    @property
    def sizes(self) -> Sequence[int]:
        """All sizes, smallest first."""
        return range(self.patch, self.whole + 1, self.patch)

    def of_tokens(self, keep: float) -> int:
        """The size with about a share of the tokens."""
        return max(1, round(self.whole / self.patch * keep**0.5)) * self.patch

    def _config(self, patches: int) -> Any:
        config = copy.deepcopy(self.source.model.config)
        scale_images(ModelRecipe(name=self.source.name, image_scale=patches * self.patch / self.whole), config)
        return config

    def at(self, size: int) -> Forward:
        """The model with images of a side, and the data with such images."""
        source, config = self.source, self._config(size // self.patch)
        model = load_at_own_size(lambda of: copy.deepcopy(source.model), config, self.whole)
        scale = source.recipe.model.image_scale * size / self.whole
        recipe = source.recipe.model_copy(update={"model": source.recipe.model.model_copy(update={"image_scale": scale})})
        return Forward(model, source.open_data(recipe, config), recipe, source.task)


ARMS: dict[str, type[Pooled | Downsampled]] = {"pooled": Pooled, "downsampled": Downsampled}


def arms_of(names: str, equal: str) -> tuple[str, ...]:
    """The arms of ``--arms``. Raises RecipeError for a name or an equality that does not exist.

    Args:
        names: with commas.
        equal: of EQUAL.
    """
    found = tuple(dict.fromkeys(name for name in names.split(",") if name))
    if unknown := [name for name in found if name not in ARMS]:
        raise RecipeError(
            f"--arms {unknown[0]}: the arms with a smaller input are {', '.join(ARMS)}; others are trained by laconic compare"
        )
    if equal not in EQUAL:
        raise RecipeError(f"--equal {equal} must be {' or '.join(EQUAL)}")
    if equal != EQUAL[0] and not found:
        raise RecipeError(f"--equal {equal} is of --arms, and none is given: --arms pooled,downsampled")
    return found


def arm_of(name: str, source: Source) -> Pooled | Downsampled:
    """The arm of a name of ARMS, before a model is built. Raises RecipeError if the task or the model has no such arm."""
    try:
        return ARMS[name](source)
    except ValueError as error:
        raise RecipeError(f"--arms {name}: {error}") from None


@dataclass(frozen=True)
class Smaller:
    """An arm with a smaller input.

    Attributes:
        forward: its model and data.
        facts: what its input is, JSON-able: ``equal``, ``size`` of ``whole`` in ``unit``, and with equal latency ``time_ratio``, the time of
            its forward ÷ that of the compressed model.
    """

    forward: Forward
    facts: dict[str, Any]


def smaller(name: str, source: Source, keep: float, compressed: Forward | None, rows: int) -> Smaller:
    """The arm of a name.

    Args:
        name: of ARMS.
        source: the dense weights.
        keep: share of tokens of the compressed model, mean over its layers.
        compressed: the compressed model, whose time the arm's is to be; None for the same number of tokens.
        rows: rows of the batch that is timed.

    Raises:
        RecipeError: the task or the model has no such arm.
    """
    arm = arm_of(name, source)
    if compressed is None:
        size = arm.of_tokens(keep)
        found = arm.at(size)
        facts: dict[str, Any] = {"equal": "tokens"}
    else:
        size = nearest(arm.sizes, lambda size: time_ratio(arm.at(size), compressed, rows).median)
        found = arm.at(size)
        facts = {"equal": "latency", "time_ratio": vars(time_ratio(found, compressed, rows, rounds=20))}
    return Smaller(found, {**facts, "size": size, "whole": arm.whole, "unit": arm.unit})
