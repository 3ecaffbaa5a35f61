"""Trained models and their data, for what measures them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from ...data.rows import BadRows
from ...data.splits import Splits
from ..errors import RecipeError
from ..recipe.schema import Recipe
from ..run_folder import load_model
from ..tasks.base import task_named
from .build import open_data
from .heads import trained_classes
from .model_settings import set_outputs


def trained_model(weights: str | Path, task: str, owner: str) -> PreTrainedModel:
    """A model of a task in evaluation mode, whose outputs and loss are those of the task, whatever its config was saved with.

    Args:
        weights: folder or hub name of the weights.
        task: name of the task.
        owner: the model, for messages.

    Raises:
        RecipeError: the model is for another task.
        FileNotFoundError, ValueError: as in ``load_model``.
    """
    model = load_model(weights)
    try:
        expected = task_named(task).model_class(model.config.model_type).__name__
    except ValueError as error:
        raise RecipeError(f"{owner}: {error}") from None
    # Some families have heads for a task whose class is another one: DeiT's with a second head.
    if not any(parent.__name__.startswith(expected) for parent in type(model).__mro__):
        raise RecipeError(
            f"{owner} is a {type(model).__name__}, and task = {task} measures a {expected}: name a model of this task, or set task"
        )
    set_outputs(model.config)
    inner: Any = model.config
    # Otherwise transformers chooses the loss of a classifier by it.
    inner.problem_type = "single_label_classification"
    return model


def opened_data(recipe: Recipe, config: PretrainedConfig, model: PreTrainedModel, owner: str) -> Splits:
    """The data of a recipe, with their labels mapped by name onto a trained model's classes.

    Args:
        recipe: the recipe.
        config: config of the model that the data are for: its own, or with images of another size.
        model: the trained model.
        owner: the model, for messages.

    Raises:
        RecipeError: they cannot be opened, or do not fit.
        BadRows: too many rows are bad.
    """
    try:
        return open_data(recipe, config, None, trained_classes(model.config, owner))
    except BadRows:
        raise
    except ValueError as error:
        raise RecipeError(str(error)) from None
