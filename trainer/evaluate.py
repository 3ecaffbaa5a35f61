"""Evaluation of a trained model: quality, achieved ratios and latency, compared with simpler ways to process as many tokens."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PretrainedConfig, PreTrainedModel

from ..data.splits import Splits
from ..modules.backbones import adapter_of
from ..modules.compress import decompress
from ..modules.decoding.generation import can_look_ahead
from ..modules.rules.keeps import check_movable
from ..modules.stage import stages_of
from .build.build import cost_model, model_config
from .build.heads import named_classes
from .build.trained_model import opened_data, trained_model
from .errors import RecipeError
from .evaluation.controls import with_scorer
from .evaluation.measured import Evaluated, Way, measured
from .evaluation.reference import load_reference
from .evaluation.smaller import Smaller, Source, arm_of, smaller
from .measure.forward_times import Forward, throughput
from .metrics.predictions import Agreement, Groups
from .recipe.schema import Recipe
from .run_folder import RunFolder
from .tasks.base import Task, task_named


@dataclass(frozen=True)
class Options:
    """What is measured beside the weights themselves.

    Attributes:
        keeps: further keeps of every stage.
        dense: run, export or any model that predictions and times are compared with; None for the same weights without stages.
        arms: names of arms with a smaller input, of ``evaluation.smaller.ARMS``.
        equal: what these have in common with the compressed model: ``tokens`` or ``latency``.
        batch_sizes: rows of the batches whose forwards are timed in pairs.
        given: option that the keeps are of, for messages.
    """

    keeps: Sequence[float] = ()
    dense: str | None = None
    arms: Sequence[str] = ()
    equal: str = "tokens"
    batch_sizes: Sequence[int] = ()
    given: str = "--keep"


class _Evaluation:
    """One run of ``laconic evaluate``: a model, its data, and what was measured so far."""

    def __init__(self, target: str, recipe: Recipe, console: Console, weights: str | None, options: Options) -> None:
        self.target, self.console, self.options = target, console, options
        run, model = RunFolder.of(target), trained_model(weights or RunFolder.open(target).trained(), recipe.task, target)
        _check(model, options)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: PreTrainedModel = model.to(self.device).eval()  # type: ignore[arg-type]
        self.task: type[Task] = task_named(recipe.task)
        # A tower that was trained before may be gone.
        fresh = recipe.model.config is not None and recipe.model.tower_of is None
        config = model_config(recipe.model, self.task) if fresh else model.config
        self.recipe = self.task.of_run(recipe, run)
        self.data = self.open_data(self.recipe, config)
        self.dense = decompress(copy.deepcopy(model)) if stages_of(model) else model
        self.source = Source(self.dense, self.data, self.recipe, self.task, self.open_data, target)
        for name in options.arms:
            # What cannot be measured is refused before anything is.
            arm_of(name, self.source)
        self.reference = (
            None if options.dense is None else load_reference(options.dense, self.recipe, model.config, self.data).to(self.device)  # type: ignore[arg-type]
        )
        self.found: dict[str, Evaluated] = {}
        self.said = dict.fromkeys(self.data.remarks)
        if self.data.classes and not named_classes(config):
            self.said[f"the model's classes have no names: they are taken for {', '.join(self.data.classes)}, in this order"] = None

    def open_data(self, recipe: Recipe, config: PretrainedConfig) -> Splits:
        """The data of a recipe, with their labels mapped by name onto the model's classes. Raises RecipeError if they do not fit."""
        return opened_data(recipe, config, self.model, self.target)

    def measure(self, name: str, forward: Forward, way: Way | None = None) -> Evaluated:
        """Runs a variant over the test split."""
        rows: Any = forward.data.test
        self.console.print(f"evaluating {name} on {len(rows):,} {self.task.item}", highlight=False)
        cost = cost_model(forward.model, size=self.task.size(forward.recipe))
        found = measured(forward.model.eval(), forward.data, forward.recipe, self.task, cost, way or Way())
        self.said.update(dict.fromkeys(found.remarks))
        self.found[name] = found
        return found

    def own(self, model: PreTrainedModel) -> Forward:
        """A model on the evaluated one's data."""
        return Forward(model, self.data, self.recipe, self.task)

    def stages(self) -> float:
        """Measures the model with its stages, at other keeps, and with controls; returns the share of tokens in its layers."""
        model = self.model
        kept = self.measure("compressed", self.own(model)).keep
        for keep in self.options.keeps:
            self.measure(f"keep {keep:g}", self.own(model), Way(keep=keep))
        if can_look_ahead(model):
            self.measure("lookahead", self.own(model), Way(lookahead=True))
        gated = any(stage.estimator is not None and stage.estimator.in_evaluation for stage in stages_of(model).values())
        # Without a stage that chooses tokens there is nothing to compare with.
        for scorer in self.task.controls if any(not stage.config.left_out for stage in stages_of(model).values()) else ():
            control = with_scorer(model, scorer, kept).eval()
            # Gates are a part of the weights: they are kept, and the control only decides which tokens are selected.
            if gated:
                self.measure(scorer, self.own(model), Way(decider=control))
            else:
                self.measure(scorer, self.own(control))
        cost = cost_model(model, size=self.task.size(self.recipe))
        assert cost is not None
        return cost(kept).stack_keep.get(adapter_of(model).stack_name, 1.0)

    def smaller(self, name: str, keep: float) -> tuple[Forward, dict[str, Any]]:
        """Measures an arm with a smaller input; returns it, and what its input is."""
        compressed = self.own(self.model) if self.options.equal == "latency" else None
        if compressed is not None:
            self.console.print(f"looking for the {name} input that takes as long", highlight=False)
        arm: Smaller = smaller(name, self.source, keep, compressed, self.recipe.data.eval_batch_size)
        found = self.measure(name, arm.forward)
        if not stages_of(arm.forward.model):
            # All tokens of smaller images, against those of whole ones.
            small, whole = (cost_model(model, size=self.task.size(self.recipe)) for model in (arm.forward.model, self.dense))
            if small is not None and whole is not None:
                ratio, fraction = small().dense_macs / whole().dense_macs, small().dense_tokens / whole().dense_tokens
                self.found[name] = replace(found, macs_ratio=ratio, mean_token_fraction=fraction)
        return arm.forward, arm.facts

    def agreements(self, reference: str) -> tuple[Groups | None, dict[str, Agreement]]:
        """Hard and easy samples of the reference, and every variant beside it that predicts the same samples; None without predictions."""
        logs = {name: predicted for name, found in self.found.items() if (predicted := found.log.whole) is not None}
        base = logs.get(reference)
        if base is None:
            return None, {}
        same = {name: predicted for name, predicted in logs.items() if predicted.comparable(base)}
        if any(found.log.cut for found in self.found.values()):
            self.said[f"agreement and hard and easy samples are of the first {len(base.predicted):,} predictions"] = None
        groups = Groups.of(base, same.get("downsampled"))
        return groups, {name: Agreement.of(predicted, base, groups) for name, predicted in same.items()}


def evaluate(target: str, recipe: Recipe, console: Console, weights: str | None = None, options: Options | None = None) -> dict[str, Any]:
    """Quality and speed of the weights in ``target``: as trained, dense, and with as many tokens selected by each control scorer.

    Args:
        target: run, export, or any folder or hub name of a model.
        recipe: recipe of its task and data.
        console: console for progress.
        weights: folder or hub name of the weights; None takes those of the run or export ``target``.
        options: what else is measured.

    Raises:
        RecipeError: the model has no stages, or stages that keep what their router learned, and keeps or arms are given; the task or the
            model has no such arm; or the reference has other inputs or classes.

    The controls use the same weights without retraining, so they show the value of the router's selection at inference; models
    trained with a control are in the report's ``baselines``. A gate (``estimator: gate``) is kept for the controls and removed with the
    stages for the dense variant.
    """
    options = options or Options()
    this = _Evaluation(target, recipe, console, weights, options)
    facts: dict[str, dict[str, Any]] = {}
    forwards: dict[str, Forward] = {}
    if stages_of(this.model):
        keep = this.stages()
        forwards["compressed"] = this.own(this.model)
        for name in options.arms:
            forwards[name], facts[name] = this.smaller(name, keep)
    forwards["dense"] = this.own(this.dense)
    this.measure("dense", forwards["dense"])
    against = "dense"
    if this.reference is not None:
        against = "reference"
        forwards[against] = this.own(this.reference)
        this.measure(against, forwards[against])
    groups, agreements = this.agreements(against)
    speeds = {}
    for rows in options.batch_sizes:
        console.print(f"forwards of {rows:,} {this.task.item} in pairs", highlight=False)
        found = throughput(forwards, against, rows)
        speeds[rows] = None if found is None else {name: asdict(speed) for name, speed in found.items()}
    for line in this.said:
        console.print(line, soft_wrap=True)
    return {
        "target": target,
        "split": "test" if this.data.has_test else "validation",
        "metric": this.task.metric,
        "static": [name for name, stage in stages_of(this.model).items() if stage.config.left_out],
        "remarks": list(this.said),
        "reference": options.dense or "dense",
        "groups": None if groups is None else {"by": groups.by, "hard": int(groups.hard.sum()), "easy": int(groups.easy.sum())},
        "variants": {
            name: {
                this.task.metric: found.quality,
                "keep": found.keep,
                "macs_ratio": found.macs_ratio,
                "mean_token_fraction": found.mean_token_fraction,
                "latency": found.latency,
                "position_bias": found.position_bias,
                "against_reference": asdict(agreements[name]) if name in agreements else None,
                "input": facts.get(name),
            }
            for name, found in this.found.items()
        },
        "throughput": {"unit": this.task.unit, "batch_sizes": speeds},
    }


def _check(model: PreTrainedModel, options: Options) -> None:
    """Raises RecipeError if the model cannot be measured with these keeps or arms."""
    stages, keeps = list(stages_of(model).values()), options.keeps
    for keep in keeps:
        if not 0 < keep <= 1:
            raise RecipeError(f"--keep {keep} must be in (0, 1]: the fraction that is kept, not removed")
    if keeps and not stages:
        raise RecipeError(f"{options.given} is of stages, and the model has none: remove it")
    if options.arms and not stages:
        raise RecipeError("--arms have as many tokens as the stages leave, and the model has no stages: remove it")
    try:
        check_movable(stages if keeps else [], options.given, min(keeps, default=1.0))
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
    task, model = task_named(recipe.task), trained_model(run.trained(), recipe.task, target)
    if not stages_of(model):
        raise ValueError(f"{target} is a dense model: every layer processes every token, so there is nothing to inspect")
    return task.inspect(target, task.of_run(recipe, run), model, given, to)
