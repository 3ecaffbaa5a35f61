"""Evaluation of a trained model: quality, achieved ratios and latency, compared with simpler methods that keep as many tokens."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PretrainedConfig, PreTrainedModel

from ..data.rows import BadRowCount, BadRows, collate
from ..data.splits import Splits
from ..modules.compress import compress, decompress
from ..modules.config import COMPLETE, CompressionConfig, PartConfig
from ..modules.cost.cost import CostModel
from ..modules.decoding.generation import can_look_ahead
from ..modules.rules.keeps import check_movable
from ..modules.stage import stages_of
from ..modules.tokens.keep_count import KeepCount
from ..modules.tokens.trace import Trace
from .build.build import cost_model, model_config, open_data
from .build.heads import trained_classes
from .errors import RecipeError
from .metrics.kept_places import KeptPlaces
from .recipe.schema import Recipe
from .run_folder import RunFolder, load_model
from .tasks.base import Task, task_named


@dataclass(frozen=True)
class Evaluated:
    """Results of one variant of the weights.

    Attributes:
        quality: the task's metric on the held-out split.
        keep: achieved keep by stage.
        macs_ratio: mean over the rows.
        latency: median seconds of the forward of a full batch; None if no batch was full.
        position_bias: where kept visual tokens lie, by stage: ``KeptPlaces.bias``.
        remarks: what to know of the quality, one line each.
    """

    quality: float
    keep: Mapping[str, float]
    macs_ratio: float
    latency: float | None
    position_bias: Mapping[str, Any]
    remarks: Sequence[str]


def evaluate(target: str, recipe: Recipe, console: Console, weights: str | None = None, keeps: Sequence[float] = ()) -> dict[str, Any]:
    """Quality and speed of the weights in ``target``: as trained, dense, and with as many tokens selected by each control scorer.

    Args:
        target: run, export, or any folder or hub name of a model.
        recipe: recipe of its task and data.
        console: console for progress.
        weights: folder or hub name of the weights; None takes those of the run or export ``target``.
        keeps: further keeps of every stage with which the weights are measured.

    Raises:
        RecipeError: the model has no stages, or stages that hold one keep, and ``keeps`` are given.

    The controls use the same weights without retraining, so they show the value of the router's selection at inference; models
    trained with a control are in the report's ``baselines``. A gate (``estimator: gate``) is kept for the controls and removed with the
    stages for the dense variant.
    """
    run, model = RunFolder.of(target), load_model(weights or RunFolder.open(target).trained())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    _check_keeps(model, keeps)
    task = task_named(recipe.task)
    # A tower that was trained before may be gone.
    fresh = recipe.model.config is not None and recipe.model.tower_of is None
    config = model_config(recipe.model, task) if fresh else model.config
    data = _open_data(task.of_run(recipe, run), config, model, target)
    loader = DataLoader(data.test, batch_size=recipe.data.eval_batch_size, collate_fn=collate, num_workers=recipe.data.workers)
    results: dict[str, Any] = {}
    static = [name for name, stage in stages_of(model).items() if stage.config.left_out]
    said = dict.fromkeys(data.remarks)

    def measure(
        name: str, variant: PreTrainedModel, lookahead: bool = False, decider: PreTrainedModel | None = None, keep: float | None = None
    ) -> Mapping[str, float]:
        console.print(f"evaluating {name} on {len(data.test):,} {task.item}", highlight=False)  # type: ignore[arg-type]
        cost = cost_model(variant, size=task.size(recipe))
        found = _evaluate(variant.eval(), loader, recipe, task, device, data, cost, lookahead, decider, keep)
        figures = asdict(found)
        said.update(dict.fromkeys(figures.pop("remarks")))
        results[name] = {task.metric: figures.pop("quality"), **figures}
        return found.keep

    if stages_of(model):
        kept = measure("compressed", model)
        for keep in keeps:
            measure(f"keep {keep:g}", model, keep=keep)
        if can_look_ahead(model):
            measure("look-ahead", model, lookahead=True)
        gated = any(stage.estimator is not None and stage.estimator.in_evaluation for stage in stages_of(model).values())
        # Without a stage that chooses tokens there is nothing to compare with.
        for scorer in task.controls if any(not stage.config.left_out for stage in stages_of(model).values()) else ():
            control = _with_scorer(model, scorer, kept).eval()
            # Gates are a part of the weights: they are kept, and the control only decides which tokens are selected.
            if gated:
                measure(scorer, model, decider=control)
            else:
                measure(scorer, control)
        model = decompress(model)
    measure("dense", model)
    for line in said:
        console.print(line, soft_wrap=True)
    split = "test" if data.has_test else "validation"
    return {
        "target": target,
        "split": split,
        "metric": task.metric,
        "static": static,
        "remarks": list(said),
        "variants": results,
    }


def _check_keeps(model: PreTrainedModel, keeps: Sequence[float]) -> None:
    """Raises RecipeError if the model cannot be measured with these keeps."""
    stages = list(stages_of(model).values())
    for keep in keeps:
        if not 0 < keep <= 1:
            raise RecipeError(f"--keep {keep} must be in (0, 1]: the fraction that is kept, not removed")
    if keeps and not stages:
        raise RecipeError("--keep is of stages, and the model has none: remove it")
    try:
        check_movable(stages if keeps else [], "--keep", min(keeps, default=1.0))
    except ValueError as error:
        raise RecipeError(str(error)) from None


def _open_data(recipe: Recipe, config: PretrainedConfig, model: PreTrainedModel, target: str) -> Splits:
    """The data of a recipe, with their labels mapped by name onto the model's classes. Raises RecipeError if they do not fit."""
    try:
        return open_data(recipe, config, None, trained_classes(model.config, target))
    except BadRows:
        raise
    except ValueError as error:
        raise RecipeError(str(error)) from None


def inspect_run(target: str, recipe: Recipe, given: str | None, to: Path) -> Mapping[str, float]:
    """Writes the output of ``laconic inspect``; returns achieved keep by stage.

    Args:
        target: run folder, or folder of an export.
        recipe: recipe of the run or export.
        given: input to show; None uses held-out data.
        to: file to write.

    Raises:
        ValueError: the model is dense, or the task cannot show the input.
    """
    run = RunFolder.open(target)
    task, model = task_named(recipe.task), load_model(run.trained())
    if not stages_of(model):
        raise ValueError(f"{target} is a dense model: every layer processes every token, so there is nothing to inspect")
    return task.inspect(target, task.of_run(recipe, run), model, given, to)


def _with_scorer(model: PreTrainedModel, scorer: str, kept: Mapping[str, float]) -> PreTrainedModel:
    """The same weights, shortcuts among them, with a control scorer; each stage keeps as many tokens as the model did on average, equally
    many in every row."""
    config = CompressionConfig.from_dict(model.config.compression)
    built, stages = stages_of(model), []
    for stage in config.stages:
        trained = built[stage.key]
        if stage.left_out:
            stages.append(stage)
            continue
        # In a causal model the selection must not depend on later tokens, unless the scope is complete before generation.
        by_threshold = trained.adapter.causal and stage.scope not in COMPLETE
        stages.append(
            replace(
                stage,
                scorer=PartConfig(scorer),
                estimator=None,
                # Only matching scorers find pairs; other scorers need a merger that drops.
                merger="drop" if trained.merger.needs_partner else stage.merger,
                selector="threshold" if by_threshold else "top_k",
                count=None if by_threshold else "round",
                # Control scorers are compared with a threshold for scores that are uniform.
                spread=0.0,
            )
        )
    fixed = [stage.key for stage in stages if stage.tokens is not None or stage.left_out]
    # 0 is not a valid keep, so a stage that kept nothing gets a tiny one.
    given = config.with_stages(stages).with_keep({key: max(keep, 1e-6) for key, keep in kept.items() if key not in fixed})
    variant = compress(decompress(copy.deepcopy(model)), given).to(model.device)
    for name, control in stages_of(variant).items():
        if (trained_shortcut := built[name].shortcut) is not None and control.shortcut is not None:
            control.shortcut.load_state_dict(trained_shortcut.state_dict())
        # The control scorers of causal models are uniform in (0, 1), so a threshold needs no calibration.
        control.selector.set_cut(kept[name])
    return variant


@torch.no_grad()
def _evaluate(
    model: PreTrainedModel,
    loader: DataLoader[Any],
    recipe: Recipe,
    task: type[Task],
    device: torch.device,
    data: Splits,
    cost: CostModel | None,
    lookahead: bool,
    decider: PreTrainedModel | None,
    keep: float | None,
) -> Evaluated:
    bad, quality, kept, seconds = BadRowCount(recipe.data.max_bad_fraction, len(loader.dataset)), task.quality(), KeepCount(), []
    places = KeptPlaces()
    compressed = bool(stages_of(model))
    requested = {} if keep is None else {name: keep for name, stage in stages_of(model).items() if not stage.config.left_out}
    for batch in loader:
        bad.add(batch["rows"], batch["bad"])
        if "sample_ids" not in batch:
            continue
        batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        trace = Trace(seed=recipe.seed, sample_ids=batch["sample_ids"], lookahead=lookahead, keep=requested)
        if decider is not None:
            # Control scores do not depend on the tokens' values, so a separate forward gives the same decisions.
            chosen = Trace(seed=recipe.seed, sample_ids=batch["sample_ids"])
            task.forward(decider, batch, trace=chosen)
            trace.replay = chosen.decisions()
        start = time.perf_counter()
        out = task.forward(model, batch, **({"trace": trace} if compressed else {}))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if len(batch["sample_ids"]) == loader.batch_size:
            seconds.append(time.perf_counter() - start)
        quality.add(out, batch)
        if compressed and cost is not None:
            kept.add(trace, cost, len(batch["sample_ids"]))
            places.add(task.kept_cells(model, trace, batch))
    return Evaluated(
        quality=quality.value,
        keep=kept.achieved,
        macs_ratio=kept.macs_ratio,
        latency=statistics.median(seconds) if seconds else None,
        position_bias=places.bias,
        remarks=quality.remarks(data),
    )
