"""Arms that are made from a recipe: its overrides for a dense arm, for simpler choices of as many tokens, and for a smaller input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import yaml

from ...modules import registry
from ...modules.config import CompressionConfig, PartConfig, StageConfig
from ..build.validate import validate
from ..errors import RecipeError
from ..recipe.baselines import shared
from ..recipe.files import LoadedRecipe, find, load, read
from ..tasks.base import task_named

# Names of the recipe itself.
ITSELF = ("learned", "compressed")
# Scorers of arms that choose as many tokens by chance or by place.
DERIVED = {"random": "random", "uniform": "uniform_grid"}
# Arms whose input is smaller, from the start.
NAMES = ("pooled", "downsampled")
# Blocks that such an arm lacks.
_NOT_SMALLER = ("budget", "training_keep", "phases", "distillation")
# Selectors that turn any scores into a decision.
_PLAIN = ("top_k", "threshold")


def dense(common: Sequence[str]) -> list[str]:
    """Overrides that leave a recipe all of its tokens."""
    given = [item for item in common if shared(item, dense=True)]
    return ["compression=null", "budget=null", "distillation=null", "training_keep=null", "phases=null", *given]


def with_scorer(main: LoadedRecipe, scorer: str, common: Sequence[str]) -> list[str]:
    """Overrides that put a scorer without weights into the stages of a recipe, at the same places and keeps.

    Args:
        main: the recipe with its overrides.
        scorer: name of the scorer.
        common: overrides of the recipe.

    Raises:
        RecipeError: the recipe has no stages, or one that decides by other means than scores.
    """
    compression = _stages(main)
    chosen = [_chosen_by(stage, scorer) for stage in compression.stages]
    if _has_method(main.source, common):
        return [*common, f"compression.scorer={scorer}", "compression.estimator=null"]
    return [_block("compression", {**compression.to_dict(), "stages": chosen}), *_without(common, "compression")]


def at_ratio(source: str, overrides: Sequence[str], ratio: float) -> list[str]:
    """Overrides of a recipe at another ``macs_ratio``: that of its budget, or in place of its stages' own keeps, drawn keeps and phases.

    Raises:
        RecipeError: it has no stages.
    """
    main = load(source, [item for item in overrides if "{seed}" not in item])
    compression = _stages(main)
    if main.recipe.budget is not None:
        return [*overrides, "budget.measure=macs_ratio", f"budget.target={ratio}"]
    # Drawn keeps and phases would set the keeps of the same steps.
    other = [f"budget={{measure: macs_ratio, target: {ratio}}}", "training_keep=null", "phases=null"]
    overrides = _without(overrides, "training_keep", "phases")
    if _has_method(source, overrides):
        return [*overrides, "compression.keep=null", *other]
    stages = [replace(stage, **({} if stage.left_out else {"keep": None, "tokens": None})) for stage in compression.stages]
    return [_block("compression", compression.with_stages(stages).to_dict()), *_without(overrides, "compression"), *other]


def smaller_input(main: LoadedRecipe, name: str, common: Sequence[str]) -> list[str]:
    """Overrides of an arm whose input is smaller: as many tokens in every layer as the recipe's layers process on average, and no
    teacher.

    Args:
        main: the recipe.
        name: ``pooled`` or ``downsampled``.
        common: overrides of the recipe.

    Raises:
        ValueError: the recipe has no stages, or its task no such arm.
    """
    _stages(main)
    task = task_named(main.recipe.task)
    made = task.pooled if name == "pooled" else task.downsampled
    # What the task has not is refused before its data are opened.
    made(main.recipe, 1.0)
    keep = validate(main.recipe).mean_keep
    if name == "pooled":
        kept = _without(common, "compression", *_NOT_SMALLER)
        # A teacher would see the smaller input too, and of another size most have no weights: neither arm has one.
        return [*made(main.recipe, round(keep, 4)), *(f"{block}=null" for block in _NOT_SMALLER), *kept]
    return [*dense(common), *made(main.recipe, round(main.recipe.model.image_scale * math.sqrt(keep), 4))]


def _stages(main: LoadedRecipe) -> CompressionConfig:
    """The stages of a recipe. Raises RecipeError if it has none."""
    if main.recipe.compression is None:
        raise RecipeError(f"{main.name} has no compression, of whose number of tokens it would be")
    return main.recipe.compression


def _has_method(source: str, overrides: Sequence[str]) -> bool:
    """True if a recipe with overrides has the stages of a method, whose other blocks are lost if the stages are set one by one."""
    paths = [item.partition("=")[0] for item in overrides]
    if "compression.method" in paths:
        return True
    given = read(find(source)).get("compression")
    return isinstance(given, dict) and "method" in given and not {"compression", "compression.stages"} & set(paths)


def _chosen_by(stage: StageConfig, scorer: str) -> dict[str, Any]:
    data = stage.to_dict()
    if stage.left_out or stage.follows is not None:
        return data
    if (selector := stage.part("selector").name) not in _PLAIN:
        raise RecipeError(
            f"stage {stage.key} has the selector {selector!r}, which decides by more than scores; write the arm as an overlay: LABEL=FILE.yaml"
        )
    merger: Any = registry.part_class("merger", stage.part("merger"))
    return {**data, "scorer": PartConfig(scorer).to_dict(), "estimator": None, **({"merger": "drop"} if merger.needs_partner else {})}


def _without(overrides: Sequence[str], *blocks: str) -> list[str]:
    """Overrides of all but these blocks."""
    return [item for item in overrides if item.partition("=")[0].split(".")[0] not in blocks]


def _block(key: str, data: Any) -> str:
    """An override that sets a whole block."""
    # YAML instead of JSON: YAML reads JSON's 1e-06 as text.
    return f"{key}={yaml.safe_dump(data, default_flow_style=True, width=1_000_000, sort_keys=False).strip()}"
