"""The dense model that others are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel

from ...data.splits import Splits
from ...modules.stage import stages_of
from ..build.heads import named_classes
from ..build.plain_recipe import recipe_of
from ..build.trained_model import trained_model
from ..errors import RecipeError
from ..recipe.schema import Recipe
from ..run_folder import TOKENIZER, RunFolder
from ..tasks.base import task_named


def load_reference(name: str, recipe: Recipe, config: PretrainedConfig, data: Splits) -> PreTrainedModel:
    """A dense model that reads the same batches as the evaluated one, and answers alike.

    Args:
        name: run, export, or any folder, hub name or GGUF file of a model: ``--dense``.
        recipe: recipe of the evaluated model.
        config: config of that model.
        data: its data.

    Raises:
        RecipeError: it has stages, another task, other inputs or other classes.
    """
    recorded = Path(name).is_dir() and RunFolder.of(name).recipe.is_file()
    own, weights = recipe_of(name, [] if recorded else [f"task={recipe.task}"])
    if own.task != recipe.task:
        raise RecipeError(f"--dense {name} is of task {own.task}, and the evaluated model of task {recipe.task}: name one of the same task")
    if not recorded:
        # It reads the evaluated model's data, with the normalisation of its own processor.
        unset = {key: None for key in ("mean", "std") if hasattr(recipe.data, key)}
        own = task_named(recipe.task).resolved(own.model_copy(update={"data": recipe.data.model_copy(update=unset)}))
    model = trained_model(weights, recipe.task, f"--dense {name}")
    if stages_of(model):
        raise RecipeError(f"--dense {name} has stages: name the run of a dense arm, or any model without stages")
    here, there = _inputs(recipe, config), _inputs(own, model.config)
    for what, value in here.items():
        if there[what] != value:
            raise RecipeError(
                f"--dense {name} has {what} {there[what]}, and the evaluated model {value}: predictions are compared on the same inputs"
            )
    folder, tokenizer = RunFolder.of(weights).with_file(TOKENIZER), getattr(data, "tokenizer", None)
    if tokenizer is not None and folder is not None:
        entries = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab()
        if entries != tokenizer.get_vocab():
            raise RecipeError(f"--dense {name} has another tokenizer than the evaluated model: predictions are compared token by token")
    return model


def _inputs(recipe: Recipe, config: PretrainedConfig) -> dict[str, Any]:
    """What the inputs and outputs of a model are, by name."""
    inner, data = config, recipe.data
    images: Any = getattr(inner, "vision_config", inner)
    return {
        "images of side": getattr(images, "image_size", None),
        "channels": getattr(images, "num_channels", None),
        "data.mean": getattr(data, "mean", None),
        "data.std": getattr(data, "std", None),
        "classes": list(named_classes(config)),
        "labels": config.num_labels,
    }
