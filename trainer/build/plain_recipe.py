"""The recipe of a model that Laconic has not trained: a folder, hub name or GGUF file has none of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PretrainedConfig

from ...modules.checkpoints.foreign_config import architecture
from ...modules.layer import CLASS_PREFIX
from ..errors import RecipeError
from ..recipe.files import apply_override, check
from ..recipe.schema import ModelRecipe, Recipe
from ..run_folder import PROCESSOR_OF_CHATS, TOKENIZER, RunFolder
from ..tasks.base import names, task_named
from .initial_weights import start_of

# Overrides that a trained model can have; of a model without a recipe also the task.
_READ = ("data", "seed")
# Keys whose values a trained model has in files beside its weights.
_BESIDE = {
    "data.tokenizer": (TOKENIZER,),
    "data.processor": (PROCESSOR_OF_CHATS,),
    "data.chat_template": (TOKENIZER, PROCESSOR_OF_CHATS),
}


def recipe_of(target: str, overrides: Sequence[str]) -> tuple[Recipe, str]:
    """The recipe by which a model is measured, and the folder or hub name of its weights.

    Args:
        target: a run, an export, or any folder, hub name or GGUF file (see ``model.gguf_file``) of a model of transformers.
        overrides: ``data.*=value`` and ``seed=value``; of a model without a recipe also ``task=NAME``.

    Returns:
        The recipe that the run recorded; for other models one with their task and default data, with the overrides.

    Raises:
        RecipeError: there is no such model, it is for no task, or an override has no effect.
    """
    recorded = Path(target).is_dir() and RunFolder.of(target).recipe.is_file()
    check_overrides(overrides, recorded)
    if recorded:
        run = RunFolder.open(target)
        check_beside(overrides, run)
        return run.read_recipe(overrides), str(run.trained())
    packed = target.endswith(".gguf")
    if not packed and not Path(target).is_dir() and target.count("/") != 1:
        raise RecipeError(
            f"{target} is not a folder: name a run folder, the folder of an export or of any model, a .gguf file, or a hub name, OWNER/NAME"
        )
    model = {"gguf_file" if packed else "name": target}
    try:
        start = start_of(ModelRecipe.model_validate(model))
    except ValueError as error:
        raise RecipeError(str(error).replace("model.name = ", "")) from None
    assert start is not None
    if start.weights is None or start.adapter is not None:
        raise RecipeError(f"{target} is a part of a run whose recipe is gone: name the run folder, or a folder of weights")
    if start.run is not None:
        check_beside(overrides, start.run)
    compression = None if start.compression is None else start.compression.to_dict()
    # A task that is given need not be found.
    task = None if any(override.startswith("task=") for override in overrides) else _task_of(start.config, target)
    data = {"task": task, "model": model, "compression": compression, "trainer": {"max_steps": 1}}
    for override in overrides:
        apply_override(data, override)
    recipe = check(data, target)
    return task_named(recipe.task).resolved(recipe), start.weights


def check_overrides(overrides: Sequence[str], recorded: bool = True) -> None:
    """Raises RecipeError for an override of a key that is not read when a trained model is measured or shown.

    Args:
        overrides: ``key.path=value``.
        recorded: the model has a recipe, which names its task.
    """
    allowed = _READ if recorded else (*_READ, "task")
    for override in overrides:
        path = override.partition("=")[0]
        if path.split(".")[0] not in allowed:
            raise RecipeError(f"{path} has no effect on a trained model: override data.* or seed here, and other keys in laconic train")


def check_beside(overrides: Sequence[str], run: RunFolder) -> None:
    """Raises RecipeError for an override of what lies beside the weights, from where it is taken.

    Args:
        overrides: ``key.path=value``.
        run: folder of the weights.
    """
    given = {override.partition("=")[0] for override in overrides}
    for key, files in _BESIDE.items():
        found = next((folder for file in files if (folder := run.with_file(file)) is not None), None)
        if key in given and found is not None:
            raise RecipeError(f"{key} has no effect on a trained model with a tokenizer or processor of its own, in {found}: remove it")


def _task_of(config: PretrainedConfig, target: str) -> str:
    """Name of the task whose model class of the family is the class of the weights."""
    given = architecture(config, target).removeprefix(CLASS_PREFIX)
    for name in names():
        try:
            if task_named(name).model_class(config.model_type).__name__ == given:
                return name
        except ValueError:
            # The family has no class for the task.
            continue
    raise RecipeError(f"{target} is a {given}, which is the model of no task: the tasks are {', '.join(names())}; set task=NAME")
