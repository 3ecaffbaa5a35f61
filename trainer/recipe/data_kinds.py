"""The kind of data of each task, by the task's name, so that reading a recipe imports no task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ...data.chats.recipe import ChatRecipe
from ...data.images.recipe import LabelledImageRecipe, MaskRecipe, UnlabelledImageRecipe
from ...data.recipe import DataRecipe
from ...data.text.recipe import DocumentRecipe, LabelledTextRecipe, PromptRecipe

KINDS: Mapping[str, type[DataRecipe]] = {
    "causal_lm": DocumentRecipe,
    "image_classification": LabelledImageRecipe,
    "masked_image_pretraining": UnlabelledImageRecipe,
    "prompt_answers": PromptRecipe,
    "semantic_segmentation": MaskRecipe,
    "text_classification": LabelledTextRecipe,
    "vision_language": ChatRecipe,
}


def checked(task: str, data: DataRecipe) -> DataRecipe:
    """The block itself. Raises ValueError if its ``name`` belongs to other kinds of data only."""
    others = [name for name, kind in KINDS.items() if data.name in kind.known]
    if others and data.name not in data.known:
        raise ValueError(
            f"data.name = {data.name!r} is for {_of(others)}, and task = {task} has {data.holds}: use {', '.join(data.known)} or a hub name"
        )
    return data


def elsewhere(task: str, key: str) -> str | None:
    """The message for a key that the task's kind of data lacks and another kind has; None if no kind has it."""
    others = [name for name, kind in KINDS.items() if key in kind.model_fields]
    return f"data.{key} is for {_of(others)}, and task = {task} has {KINDS[task].holds}: remove it" if others else None


def _of(tasks: Iterable[str]) -> str:
    named = sorted(tasks)
    return f"{' or '.join(dict.fromkeys(KINDS[name].holds for name in named))} (task = {', '.join(named)})"
