"""Keys that have no effect in a recipe: one table of key, condition and reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

from ...data.chats.recipe import ChatRecipe
from ...data.images.recipe import DRAWN
from ...data.source import OF_FILES
from ...data.text.recipe import DocumentRecipe, PromptRecipe, TextRecipe
from .schema import ITSELF, Recipe

EMBEDDED = (DRAWN, "python_passages", *DocumentRecipe.embedded, *PromptRecipe.embedded, *ChatRecipe.embedded)
# Data sets without bad rows.
_GENERATED = (DRAWN, "python_passages", *PromptRecipe.embedded, *ChatRecipe.embedded)


@dataclass(frozen=True)
class Unread:
    """Keys without effect under a condition.

    Attributes:
        keys: full paths of the keys, which need not exist in every task.
        when: the condition, of a recipe.
        reason: text of the message after "has no effect"; ``{r}`` is the recipe.
    """

    keys: tuple[str, ...]
    when: Callable[[Recipe], bool]
    reason: str


def _in(block: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{block}.{name}" for name in names)


# Keys of stages, which a dense recipe has not.
OF_STAGES = ("optimizer.router_lr", "optimizer.router_weight_decay", "trainer.pictures", "trainer.start_rows")

TABLE = (
    Unread(
        _in("data", "data_dir", "data_files", "config", "revision", "train_split", "validation_split", "test_split", "validation_fraction"),
        lambda r: r.data.name in EMBEDDED,
        "data.name = {r.data.name!r} comes with Laconic and reads no files: remove it, or set data.name to a type of files or a hub name",
    ),
    Unread(
        (
            *_in("data", "image_column", "image_dir", "mask_column", "text_column", "second_text_column", "chat_column", "label_column"),
            *_in("data", "num_labels", "ignore_index"),
        ),
        lambda r: r.data.name in EMBEDDED,
        "data.name = {r.data.name!r} comes with Laconic and has fixed columns and classes: remove it",
    ),
    Unread(
        _in("data", "mean", "std"),
        lambda r: r.data.name == DRAWN,
        "data.name = {r.data.name!r} generates pixels that are not normalised: remove it",
    ),
    Unread(("data.max_bad_fraction",), lambda r: r.data.name in _GENERATED, "data.name = {r.data.name!r} has no bad rows: remove it"),
    Unread(
        ("data.canvas",),
        lambda r: r.data.name != DRAWN,
        f"it is the size and content of {DRAWN}, and data.name = {{r.data.name!r}}: remove it, or set data.name={DRAWN}",
    ),
    Unread(
        ("data.train_samples",),
        lambda r: r.data.name not in EMBEDDED,
        "data.name = {r.data.name!r} is read as a whole: remove it; data.train_split takes a part of a split, train[:1000] for example",
    ),
    Unread(
        ("data.kinds",),
        lambda r: r.data.name not in ChatRecipe.embedded,
        "it is for digit_questions, and data.name = {r.data.name!r}: remove it",
    ),
    Unread(
        _in("data", "lengths", "questions"),
        lambda r: r.data.name not in PromptRecipe.embedded,
        "it is for function_prompts, and data.name = {r.data.name!r}: remove it",
    ),
    Unread(
        ("data.eval_samples",),
        lambda r: r.data.name not in EMBEDDED and not getattr(r.data, "streaming", False),
        "data.name = {r.data.name!r} is read as a whole: remove it; data.validation_split and data.validation_fraction choose the rows",
    ),
    Unread(
        _in("data", "config", "revision"),
        lambda r: r.data.name in OF_FILES,
        "it selects a part or a version of a hub data set, and data.name = {r.data.name!r} reads files: remove it",
    ),
    Unread(
        ("data.validation_fraction",),
        lambda r: r.data.validation_split is not None,
        "data.validation_split = {r.data.validation_split!r} has the validation rows: remove one of the two",
    ),
    Unread(
        ("data.validation_fraction",),
        lambda r: getattr(r.data, "streaming", False),
        "data.streaming = true holds out the first data.eval_samples rows: set data.eval_samples, or data.validation_split",
    ),
    Unread(
        ("data.mixing.switch",),
        lambda r: getattr(r.data, "mixing", None) is not None and not (r.data.mixing.mixup and r.data.mixing.cutmix),
        "only one of data.mixing.mixup and data.mixing.cutmix is on: remove it",
    ),
    Unread(
        ("data.label_smoothing",),
        lambda r: r.distillation is not None and r.distillation.label_weight == 0,
        "distillation leaves no weight to the labels: remove it, lower distillation.weight, or set distillation.labels",
    ),
    Unread(
        ("model.revision",),
        lambda r: r.model.config is not None,
        "model.config has random weights, which are in no repository: remove it",
    ),
    Unread(
        ("distillation.revision",),
        lambda r: r.distillation is not None and r.distillation.teacher in ("dense_self", ITSELF),
        "distillation.teacher = {r.distillation.teacher!r} has the revision of model.name: remove it",
    ),
    Unread(
        _in("distillation", "keep", "milder"),
        lambda r: r.distillation is not None and r.distillation.teacher != ITSELF,
        "distillation.teacher = {r.distillation.teacher!r} is dense, and only the teacher self has a keep: remove it",
    ),
    Unread(
        ("distillation.keep",),
        lambda r: r.distillation is not None and r.distillation.milder is not None,
        "distillation.milder is set, which is a difference from the student's keep: remove one of the two",
    ),
    Unread(
        _in("distillation", "temperature", "reverse"),
        lambda r: r.distillation is not None and r.distillation.weight == 0,
        "distillation.weight = 0 leaves no weight to the teacher's answers: remove it, or set distillation.weight above 0",
    ),
    Unread(
        ("distillation.teacher",),
        lambda r: r.distillation is not None and r.distillation.weight == 0 and r.distillation.hidden == 0,
        "distillation.weight and distillation.hidden are 0, so nothing is learned from the teacher: set one of them, or remove distillation",
    ),
    Unread(
        OF_STAGES,
        lambda r: r.compression is None,
        "the recipe has no compression, so it has no routers and no kept tokens: remove it",
    ),
    Unread(
        _in("optimizer", "lora_lr", "lora_weight_decay"),
        lambda r: r.lora is None or r.lora.mode != "lora",
        "the recipe trains no LoRA: remove it, or add lora with mode lora",
    ),
    Unread(
        ("optimizer.final",),
        lambda r: r.optimizer.schedule == "constant",
        "optimizer.schedule = 'constant' stays at the peak: remove it, or set optimizer.schedule to cosine or linear",
    ),
    Unread(
        ("trainer.pictures",),
        lambda r: "tensorboard" not in r.trainer.loggers,
        "pictures are drawn for tensorboard, which trainer.loggers does not have: remove it, or add tensorboard to trainer.loggers",
    ),
    Unread(
        ("trainer.pictures",),
        lambda r: isinstance(r.data, TextRecipe),
        "task = {r.task} has no images: remove it; laconic inspect shows the kept tokens of a text",
    ),
    Unread(
        ("trainer.pictures",),
        lambda r: isinstance(r.data, ChatRecipe),
        "task = {r.task} draws kept tokens at the end of a run only: remove it; laconic inspect draws them at any time",
    ),
    Unread(
        ("trainer.bench_seconds",),
        lambda r: r.trainer.bench_rounds == 0 and (r.budget is None or r.budget.measure != "step_time"),
        "trainer.bench_rounds = 0 skips the measurement that it would end: remove one of the two",
    ),
    Unread(
        ("budget.ramp_until",),
        lambda r: r.budget is not None and r.budget.regularizer is None,
        "it is of the weight of budget.regularizer, which is not set: remove it",
    ),
    Unread(
        _in("budget", "start", "schedule_from", "schedule_until"),
        lambda r: r.budget is not None and r.budget.schedule == "constant",
        "budget.schedule = 'constant' has the target from the first step: remove it, or set budget.schedule to linear, cosine, reciprocal or step",
    ),
    Unread(
        ("budget.schedule_from",),
        lambda r: r.budget is not None and r.budget.schedule == "step",
        "budget.schedule = 'step' changes the target at budget.schedule_until alone: remove it, or set budget.schedule to linear, cosine or "
        "reciprocal",
    ),
    Unread(
        ("budget.noise_until",),
        lambda r: r.budget is not None and r.budget.noise == 0,
        "budget.noise is 0: remove it, or set budget.noise",
    ),
)


def unread(recipe: Recipe) -> dict[str, str]:
    """Message for each key that differs from its default and has no effect in the recipe, by key."""
    found: dict[str, str] = {}
    for row in TABLE:
        if row.when(recipe):
            for key, value in _given(recipe, row.keys):
                found.setdefault(key, f"{key} = {value!r} has no effect: {row.reason.format(r=recipe)}")
    return found


def holds(data: Any, key: str) -> bool:
    """True if plain data have a value at a key."""
    for part in key.split("."):
        if not isinstance(data, dict) or part not in data:
            return False
        data = data[part]
    return True


def _given(recipe: Recipe, keys: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Keys of the recipe with another value than their default, or with none."""
    for key in keys:
        *blocks, name = key.split(".")
        block: Any = recipe
        for part in blocks:
            block = getattr(block, part, None)
        if block is not None and hasattr(block, name) and getattr(block, name) != _default(block, name):
            yield key, getattr(block, name)


def _default(block: Any, name: str) -> Any:
    """Default of a key; MISSING if it has none."""
    if is_dataclass(block):
        return next(field.default for field in fields(block) if field.name == name)
    field = type(block).model_fields[name]
    return MISSING if field.is_required() else field.get_default(call_default_factory=True)
