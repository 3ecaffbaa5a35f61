"""Plans from a probe, written as a recipe."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ...modules.checkpoints.whole_files import write_file
from ...modules.config import COMPLETE, PartConfig, StageConfig
from ...modules.registry import part_class
from ..errors import RecipeError
from ..recipe.files import apply_override, load, path_of_base, read
from ..show.target import check_folder
from .overlay import overlay, planned
from .part import Part
from .plan import check_target, greedy
from .probe import HALF, Probe

# Begin of the first line of a plan's recipe.
WRITTEN = "Written by laconic probe"
# Recipes for fine-tuning, by task.
BASES = {
    "causal_lm": "llm_finetune", "image_classification": "vit_image_folder", "text_classification": "text_classify",
    "vision_language": "vlm_finetune",
}  # fmt: skip
# Keys of a recipe's model that name its weights.
_SOURCES = ("name", "gguf_file", "config", "encoder_of", "tower_of")


@dataclass(frozen=True)
class PlanOptions:
    """Settings of a plan.

    Attributes:
        target: largest ``macs_ratio``, in (0, 1).
        overlay: file of the recipe.
        base: recipe below it; None chooses by the task.
        halves: parts may be halves of layers.
        keeps: shares of the tokens that a layer may process, each in (0, 1).
        scorer: scorer of these layers.
        shortcut: what tokens get that bypass a layer or a half; None for nothing.
    """

    target: float
    overlay: Path
    base: str | None
    halves: bool
    keeps: tuple[float, ...]
    scorer: str
    shortcut: str | None = None

    @staticmethod
    def of(plan: str, path: Path, base: str | None, halves: bool, keeps: str, scorer: str, shortcut: str | None = None) -> PlanOptions:
        """The options as the command line has them. Raises RecipeError."""
        measure, equals, value = plan.partition("=")
        target = _share(value)
        if measure != "macs_ratio" or not equals or target is None:
            raise RecipeError(f"--plan {plan} must be macs_ratio=SHARE, with a share between 0 and 1: macs_ratio=0.8 for example")
        shares = [_share(item) for item in keeps.split(",") if item.strip()]
        if None in shares:
            raise RecipeError(f"--keeps {keeps} must be shares between 0 and 1, divided by commas: 0.75,0.5 for example; '' for none")
        return PlanOptions(target, path, base, halves, tuple(share for share in shares if share is not None), scorer, shortcut)


def _share(text: str) -> float | None:
    try:
        share = float(text)
    except ValueError:
        return None
    return share if 0 < share < 1 else None


def check_plan(probe: Probe, options: PlanOptions, overrides: Sequence[str]) -> None:
    """Raises ValueError if there can be no such plan, or its recipe would be wrong: before anything is measured."""
    if probe.meter.config is not None:
        raise RecipeError("--plan is for a dense model, and this one has stages of its own: plan for the model that it was trained from")
    _check_overlay(options.overlay)
    offered = _offered(probe, options)
    check_target(offered, options.target, partial(_cost, probe, options))
    if any(part.fitted for part in offered):
        probe.others()
    stages = [stage_of(probe, Part(layer, "around", keep, shortcut=options.shortcut), options) for layer, keep in enumerate((0.0, HALF))]
    # Beside the recipe, where its base is found in the same way.
    beside = {"prefix": f"{options.overlay.stem}.", "suffix": ".yaml", "dir": options.overlay.parent}
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", **beside) as trial:
        trial.write(_recipe(probe, options, overrides, stages, ""))
        trial.flush()
        recipe = load(trial.name).recipe
    # Raises where the data are files, and none are named.
    _ = recipe.data.source
    if recipe.task != (task := str(probe.record.settings["task"])):
        raise RecipeError(
            f"--base {options.base} is a recipe of task = {recipe.task}, and the model is probed for {task}: name another base"
        )


def _check_overlay(path: Path) -> None:
    """Raises RecipeError if the file of the recipe cannot be written, or is another one."""
    if path.suffix not in (".yaml", ".yml"):
        raise RecipeError(f"--overlay {path} must end in .yaml")
    check_folder("--overlay", path)
    if path.exists() and not path.read_bytes().startswith(f"# {WRITTEN}".encode()):
        raise RecipeError(f"--overlay: {path} exists, and no plan wrote it: name another file, or delete it")


def base_of(probe: Probe, options: PlanOptions) -> str:
    """Name of the recipe below the plan's. Raises RecipeError if none is known."""
    task = str(probe.record.settings["task"])
    if options.base is None and task not in BASES:
        raise RecipeError(f"--plan needs --base for task = {task}: the recipe that the plan is laid over")
    return options.base or BASES[task]


def stage_of(probe: Probe, part: Part, options: PlanOptions) -> StageConfig:
    """The stage of a part in the recipe: one with a gate where a causal model's router is trained."""
    causal = probe.stack.adapter.causal and probe.scope not in COMPLETE
    stage = part.stage(probe.stack, probe.scope, options.scorer)
    trained = part_class("scorer", stage.part("scorer")).estimator is not None
    return part.stage(probe.stack, probe.scope, options.scorer, estimator="gate" if causal and trained else None)


def _recipe(probe: Probe, options: PlanOptions, overrides: Sequence[str], stages: Sequence[StageConfig], remark: str) -> str:
    """The plan's recipe: the probed weights in place of those of its base."""
    base, target = base_of(probe, options), str(probe.record.settings["model"])
    path = path_of_base(base, options.overlay)
    if path.resolve() == options.overlay.resolve():
        raise RecipeError(f"--base {base} is --overlay itself: name another file")
    given = read(path).get("model") or {}
    model: dict[str, Any] = {key: None for key in _SOURCES if given.get(key) is not None}
    if other := [key for key, value in given.items() if key not in (*_SOURCES, "attention") and value not in (None, False, {})]:
        raise RecipeError(f"--base {base} sets model.{other[0]}, and the plan is for the model as it was measured: name a base without it")
    model["gguf_file" if target.endswith(".gguf") else "name"] = target
    blocks: dict[str, Any] = {"model": model}
    for override in overrides:
        apply_override(blocks, override)
    return overlay(base, blocks, stages, remark)


def _scorer(options: PlanOptions) -> str:
    """Scorer by which tokens are chosen while the plan is measured."""
    return options.scorer if part_class("scorer", PartConfig.of(options.scorer, "scorer")).fits_updates else "random"


def _offered(probe: Probe, options: PlanOptions) -> list[Part]:
    """The parts from which a plan may choose."""
    sites = [replace(part, shortcut=options.shortcut) for part in probe.parts if options.halves or part.site == "around"]
    some = [replace(part, keep=keep, scorer=_scorer(options)) for part in sites if part.site == "around" for keep in options.keeps]
    return [*sites, *some]


def _cost(probe: Probe, options: PlanOptions, parts: Sequence[Part]) -> float:
    """``macs_ratio`` with these parts."""
    return probe.meter.macs_ratio([stage_of(probe, part, options) for part in parts])


def write_plan(probe: Probe, options: PlanOptions, overrides: Sequence[str]) -> None:
    """Plans by measured loss, and writes the recipe and the record. Where a layer processes some tokens, they are those of a scorer that is
    fitted, and random ones for any other."""
    steps = greedy(_offered(probe, options), options.target, lambda parts: probe.measure(parts).loss, partial(_cost, probe, options))
    for step in steps:
        probe.console.print(f"chosen: {step.part.key}, loss {step.loss:.4f}, macs_ratio {step.macs_ratio:.4f}", highlight=False)
    stages = [stage_of(probe, part, options) for part in planned(steps)]
    dense = probe.meter.whole.loss
    remark = (
        f"{WRITTEN} {probe.record.settings['model']}: loss {dense:.4f} → {steps[-1].loss:.4f} on {probe.meter.answers:,} answers "
        f"at macs_ratio {steps[-1].macs_ratio:.4f}, before training, by tokens of scorer '{_scorer(options)}' where keep is above 0."
    )
    probe.record.plan = {
        "target": options.target, "macs_ratio": steps[-1].macs_ratio, "loss": steps[-1].loss, "keeps": options.keeps, "halves": options.halves,
        "steps": [asdict(step) | {"part": step.part.key} for step in steps],
    }  # fmt: skip
    probe.record.write()
    write_file(options.overlay, _recipe(probe, options, overrides, stages, remark))
    load(str(options.overlay))
