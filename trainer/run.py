"""A run from recipe to report: control arms first, then the recipe itself, then the paired measurement."""

from __future__ import annotations

import copy
import logging
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from ..data.images import collate
from ..data.mixing import Mixing
from ..data.module import ImageData
from ..modules.compress import checkpoint_activations, decompress, stages_of
from ..modules.state import Trace
from . import collective
from .baselines import load_baselines
from .bench import Bench, bench
from .build import Parts, build, with_normalisation
from .callbacks.ema import WeightEma
from .callbacks.guards import NanGuard, RandomState
from .callbacks.progress import RunLog, StepLine
from .callbacks.stop import StopOnSigterm
from .callbacks.tensorboard import RoutingPictures
from .distillation import load_teacher
from .evaluate import load_model
from .pictures import overlays, save_kept_tokens
from .processes import environment, started
from .recipe import Recipe
from .recipe_files import LoadedRecipe, dump
from .report import Arm, Report, table, versions, with_bench
from .resume import check_same_processes, check_same_run, find_checkpoint, incomplete_checkpoints, remove_checkpoints
from .sharded import save_model, shape_of
from .strategies import deepspeed_config, lightning_strategy, needs_group, processes_of, resolved, set_accelerator, stage_of
from .tasks.image_classification import ImageClassification

PICTURED = 8


class Stopped(Exception):
    """SIGTERM came; a checkpoint was written and the run can be resumed."""


@dataclass(frozen=True)
class Trained:
    """One arm after training."""

    parts: Parts
    module: ImageClassification
    arm: Arm


def output_folder(loaded: LoadedRecipe) -> Path:
    """Where a recipe's run goes."""
    return Path(loaded.recipe.output.format(recipe=loaded.name, seed=loaded.recipe.seed))


def train(loaded: LoadedRecipe, overrides: Sequence[str], console: Console, resume: str | None = None) -> Report:
    """Trains a recipe and its baselines, measures, and writes the run folder.

    Args:
        loaded: the recipe.
        overrides: that it was loaded with, for the baselines.
        console: for progress.
        resume: ``auto`` (the newest checkpoint of this run, if there is one) or the path of a checkpoint; None starts anew.

    With several processes this is called in each of them; rank 0 writes, prints, and measures while the others wait.

    Raises:
        Stopped: SIGTERM came.
    """
    quiet()
    settings = resolved(loaded.recipe).trainer
    command = [sys.executable, "-m", "laconic", "train", loaded.source, *overrides, *(["--resume", resume] if resume else [])]
    with started(int(settings.devices), settings.num_nodes, needs_group(settings), command):
        return _train(loaded, overrides, console if collective.rank() == 0 else silent(), resume)


def silent() -> Console:
    """A console that says nothing, for every rank but the first."""
    return Console(file=open(os.devnull, "w"))


def _train(loaded: LoadedRecipe, overrides: Sequence[str], console: Console, resume: str | None) -> Report:
    folder = output_folder(loaded)
    baselines = load_baselines(loaded, overrides)
    arms: dict[str, Trained] = {}
    data: ImageData | None = None
    for arm in [*baselines, loaded]:
        main = arm is loaded
        name = _arm_name(arm)
        if name in arms or (not main and name == _arm_name(loaded)):
            name = arm.name
        where = folder if main else folder / "baselines" / arm.name
        arms[name] = train_arm(arm, name, where, console, data, resume if main else ("auto" if resume else None))
        data = arms[name].parts.data
    first = collective.rank() == 0
    # One process measures one process's step, alone on the machine; several at once would time each other.
    measured = _bench(arms, loaded.recipe, console) if first else None
    report = _report(loaded, arms, measured)
    if first:
        _pictures(arms, folder)
        report.save(folder)
    collective.wait()
    shown = {name: with_bench(trained.arm, name, measured) for name, trained in arms.items()}
    console.print(table(shown, "accuracy", measured.memory_kind if measured else None))
    if measured is not None:
        _print_claims(measured, console)
    console.print(f"report: {folder / 'report.json'}", highlight=False, soft_wrap=True)
    return report


def rehearse(loaded: LoadedRecipe, overrides: Sequence[str], console: Console) -> dict[str, Any]:
    """Builds every arm and runs one training step of each, keeping nothing: what a long run would trip over at its start."""
    quiet()
    result: dict[str, Any] = {}
    for arm in [*load_baselines(loaded, overrides), loaded]:
        parts = build(arm.recipe)
        module = classification_task(parts)
        rows = [parts.data.train[index] for index in range(arm.recipe.data.batch_size)]
        batch = collate(rows)
        module.model.train()
        loss = module.training_step(batch, 0)["loss"]
        loss.backward()
        result[arm.name] = {"loss": float(loss.detach()), "steps": parts.total_steps}
        console.print(
            f"{arm.name}: built, one step's loss {float(loss.detach()):.3f}; would train {parts.total_steps:,} steps", highlight=False
        )
    return result


def _arm_name(arm: LoadedRecipe) -> str:
    """``dense``, or the scorers' names."""
    if arm.recipe.compression is None:
        return "dense"
    return "+".join(sorted({stage.part("scorer").name for stage in arm.recipe.compression.stages}))


def train_arm(
    loaded: LoadedRecipe, name: str, folder: Path, console: Console, data: ImageData | None = None, resume: str | None = None
) -> Trained:
    """Trains and evaluates one recipe into its folder; the model is left on the CPU or device that it was trained on."""
    recipe = resolved(with_normalisation(loaded.recipe))
    quiet()
    checkpoint = collective.from_rank_zero(lambda: _checkpoint(folder, recipe, resume, console))
    stage = stage_of(recipe.trainer)
    parts = build(recipe, data, deepspeed_config(recipe.trainer, recipe.data.batch_size) if stage == 3 else None)
    collective.from_rank_zero(lambda: _open_folder(folder, recipe))
    with (folder / "log.txt" if collective.rank() == 0 else Path(os.devnull)).open("a" if checkpoint else "w") as log:
        both = RunLog(console, log)
        _describe(parts, name, both)
        module = classification_task(parts)
        line = StepLine(both, parts.total_steps, recipe.trainer.log_every, name)
        stop = StopOnSigterm(folder / "checkpoints" / "stopped.ckpt")
        watching = [NanGuard(), line, stop, RandomState(recipe.seed)]
        trainer = lightning_trainer(recipe, folder, parts.total_steps, watching, _leaves_unused(module, parts))
        data_module = parts.data_module()
        # transformers gives loaded models in evaluation mode, and Lightning leaves them so: no router would learn.
        parts.model.train()
        if recipe.trainer.compile:
            parts.model.compile()
        trainer.fit(module, datamodule=data_module, ckpt_path=checkpoint, weights_only=True)
        if stop.stopped:
            raise Stopped(f"stopped by SIGTERM at step {trainer.global_step}; repeat the same command with --resume auto to go on")
        trainer.test(module, datamodule=data_module, verbose=False)
        if module.bad_rows.reasons:
            both.line(f"bad rows: {module.bad_rows.summary()}")
    save_model(parts.model, folder / "model")
    arm = _arm(loaded.name, parts, module, line.throughput.total)
    if stage and collective.rank() == 0:
        parts = replace(parts, model=_read_back(folder / "model", recipe))
    return Trained(parts, module, arm)


def classification_task(parts: Parts) -> ImageClassification:
    """The task of a run, with the training extras that its recipe asks for."""
    recipe, rows = parts.recipe, parts.data.train
    data, mixing, distillation = recipe.data, recipe.data.mixing, recipe.distillation
    return ImageClassification(
        parts.model,
        recipe.optimizer,
        parts.total_steps,
        parts.budget,
        recipe.seed,
        data.max_bad_fraction,
        expected_rows=len(rows),  # type: ignore[arg-type]
        mixing=None if mixing is None else Mixing(**mixing.model_dump(), seed=recipe.seed),
        label_smoothing=data.label_smoothing,
        distillation=None if distillation is None else load_teacher(distillation, recipe.model, parts.model.config, parts.data.classes),
    )


def _checkpoint(folder: Path, recipe: Recipe, resume: str | None, console: Console) -> Path | None:
    """The checkpoint to go on from, checked; where there is none, what an earlier run left is removed."""
    checkpoint = find_checkpoint(folder, resume)
    if resume is not None:
        for path in incomplete_checkpoints(folder):
            console.print(f"passed over {path}: it is not complete, writing it was interrupted", highlight=False, soft_wrap=True)
    if checkpoint is None:
        remove_checkpoints(folder)
    else:
        check_same_run(folder, recipe)
        check_same_processes(checkpoint, processes_of(recipe.trainer), stage_of(recipe.trainer))
    return checkpoint


def _open_folder(folder: Path, recipe: Recipe) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(dump(recipe))


def _leaves_unused(module: ImageClassification, parts: Parts) -> bool:
    """Whether a training step leaves parameters without gradient, seen on a step of one row; DDP must be told."""
    if stage_of(parts.recipe.trainer) or collective.world_size() == 1:
        return False
    row = next((item for item in (parts.data.train[index] for index in range(len(parts.data.train))) if "bad" not in item), None)  # type: ignore[arg-type]
    if row is None:
        return False
    parts.model.train()
    buffers = {name: value.clone() for name, value in parts.model.named_buffers()}
    module.losses(collate([row]))["loss"].backward()
    for name, value in parts.model.named_buffers():
        # A threshold that follows the scores must not have seen this row.
        value.copy_(buffers[name])
    unused = any(parameter.grad is None for parameter in parts.model.parameters() if parameter.requires_grad)
    parts.model.zero_grad(set_to_none=True)
    return unused


def _read_back(folder: Path, recipe: Recipe) -> PreTrainedModel:
    """The model from what was saved: DeepSpeed leaves its own behind in shards and hooks."""
    model = load_model(folder)
    if recipe.trainer.gradient_checkpointing:
        checkpoint_activations(model)
    return model


def lightning_trainer(
    recipe: Recipe, folder: Path, steps: int, callbacks: Sequence[Callback], unused_parameters: bool = False
) -> lightning.Trainer:
    """The Lightning Trainer that a recipe asks for.

    Args:
        recipe: resolved.
        folder: of the run.
        steps: optimizer steps.
        callbacks: beside those for checkpoints and pictures.
        unused_parameters: whether a step leaves parameters without gradient.
    """
    settings = recipe.trainer
    # DeepSpeed's autocast is in its own configuration; Lightning's precision would cast the weights.
    precision = "32-true" if settings.precision == "fp32" or stage_of(settings) else "bf16-mixed"
    several = processes_of(settings) > 1 or needs_group(settings)
    checkpoints = ModelCheckpoint(
        dirpath=folder / "checkpoints",
        filename="{step}",
        auto_insert_metric_name=False,
        every_n_train_steps=settings.checkpoint_every or steps,
        save_top_k=1,
        enable_version_counter=False,
    )
    # First, so that a checkpoint at the end of a batch holds the average with that batch in it.
    averaged = [WeightEma(settings.ema)] if settings.ema is not None else []
    return lightning.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator=("cuda" if torch.cuda.is_available() else "cpu") if several else "auto",
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        strategy=lightning_strategy(recipe, unused_parameters),
        plugins=[environment(processes_of(settings))] if several else None,
        precision=precision,
        accumulate_grad_batches=settings.accumulate,
        gradient_clip_val=settings.clip or None,
        val_check_interval=(settings.validate_every * settings.accumulate) if settings.validate_every else None,
        check_val_every_n_epoch=None if settings.validate_every else 1,
        num_sanity_val_steps=0,
        logger=TensorBoardLogger(folder, name="tensorboard", version=""),
        log_every_n_steps=settings.log_every,
        callbacks=[*averaged, *callbacks, checkpoints, RoutingPictures(settings.pictures)],
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def quiet() -> None:
    """Keeps libraries' notices out of the log; what goes wrong is still shown."""
    set_accelerator()
    disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric", "transformers", "datasets"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*When saving the DeepSpeed Stage 3 checkpoint.*")
    # What is logged is the same on every rank already.
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")


def _describe(parts: Parts, name: str, log: RunLog) -> None:
    recipe, cost = parts.recipe, parts.cost()
    total = sum(shape_of(parameter).numel() for parameter in parts.model.parameters())
    routers = sum(shape_of(parameter).numel() for _, stage in stages_of(parts.model).values() for parameter in stage.parameters())
    processes = processes_of(recipe.trainer)
    spread = f" on {processes} processes with {recipe.trainer.strategy}" if processes > 1 or stage_of(recipe.trainer) else ""
    log.line(
        f"{name}: {parts.model.config.model_type} with {total:,} parameters, {routers:,} of them in stages; "
        f"{parts.total_steps:,} steps of {recipe.data.batch_size * recipe.trainer.accumulate * processes} images{spread}; "
        f"macs_ratio {cost.macs_ratio:.3f}, tokens by layer {' '.join(f'{tokens.attention:g}' for tokens in cost.layers)}"
    )


def _arm(recipe: str, parts: Parts, module: ImageClassification, seconds: float) -> Arm:
    cost = parts.cost()
    return Arm(
        recipe=recipe,
        quality=module.accuracy,
        keep={"requested": dict(cost.keep), "achieved": module.achieved_keep},
        macs_ratio=cost.macs_ratio,
        mean_token_fraction=cost.mean_token_fraction,
        train_seconds=seconds,
    )


def _bench(arms: Mapping[str, Trained], recipe: Recipe, console: Console) -> Bench | None:
    compressed = {name: trained for name, trained in arms.items() if name != "dense"}
    if not recipe.trainer.bench_rounds or not compressed:
        return None
    if recipe.trainer.strategy == "deepspeed_3":
        console.print("speed is not measured: it is one process's, which deepspeed_3's model may not fit; laconic bench measures it")
        return None
    return bench_models({name: trained.parts for name, trained in compressed.items()}, recipe, console)


def bench_models(parts: Mapping[str, Parts], recipe: Recipe, console: Console) -> Bench:
    """The paired measurement of compressed arms, on a batch of the recipe's own training data."""
    first = next(iter(parts.values()))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [item for item in (first.data.train[index] for index in range(recipe.data.batch_size)) if "bad" not in item]
    batch = {key: value.to(device) for key, value in collate(rows).items() if isinstance(value, Tensor)}
    models = {name: copy.deepcopy(item.model).to(device) for name, item in parts.items()}
    dense = decompress(copy.deepcopy(first.model)).to(device)

    def loss(name: str, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.trainer.precision == "bf16"):
            if name == "dense":
                return model(pixel_values=inputs["pixel_values"], labels=inputs["labels"]).loss
            budget = parts[name].budget
            last = parts[name].total_steps
            trace = budget.trace(last, inputs["sample_ids"]) if budget is not None else Trace(sample_ids=inputs["sample_ids"])
            out = model(pixel_values=inputs["pixel_values"], labels=inputs["labels"], trace=trace)
            if budget is not None:
                return out.loss + budget.loss(trace, last).total
            return out.loss if trace.auxiliary_loss is None else out.loss + trace.auxiliary_loss

    rounds = recipe.trainer.bench_rounds or 40
    with console.status(f"measuring training steps: {rounds} paired rounds"):
        return bench(dense, models, batch, loss, rounds)


def _report(loaded: LoadedRecipe, arms: Mapping[str, Trained], measured: Bench | None) -> Report:
    name, main = list(arms.items())[-1]
    arm = main.arm
    others = {key: with_bench(trained.arm, key, measured) for key, trained in arms.items() if trained is not main}
    times = measured.arms[name] if measured is not None and name in measured.arms else None
    dense = arm.quality if name == "dense" else others["dense"].quality if "dense" in others else None
    return Report(
        recipe=loaded.name,
        task=loaded.recipe.task,
        quality={
            "metric": "accuracy",
            "split": "test" if main.parts.data.has_test else "validation",
            "dense": dense,
            "compressed": None if name == "dense" else arm.quality,
        },
        keep=arm.keep,
        macs_ratio=arm.macs_ratio,
        mean_token_fraction=arm.mean_token_fraction,
        step_time={
            "dense": measured.dense_seconds if measured else None,
            "compressed": times.seconds if times else None,
            "oracle": times.oracle_seconds if times else None,
            "speedup": times.speedup.median if times else None,
            "of_oracle": times.of_oracle.median if times else None,
            "paired": measured.to_dict() if measured else None,
        },
        peak_memory={
            "kind": measured.memory_kind if measured else None,
            "dense": measured.memory["dense"] if measured else None,
            "compressed": measured.memory.get(name) if measured and name != "dense" else None,
        },
        baselines={key: vars(other) for key, other in others.items()},
        seed=loaded.recipe.seed,
        train_seconds=arm.train_seconds,
        bad_rows=main.module.bad_rows.summary(),
        versions=versions(),
    )


def _print_claims(measured: Bench, console: Console) -> None:
    for name, arm in measured.arms.items():
        console.print(
            f"{name}: speed-up at least {arm.claimed_speedup:.2f}×, of oracle at least {arm.claimed_of_oracle:.3f} "
            f"(lower 95 % bounds less the control's half-width {arm.control.half_width:.3f}; {measured.rounds} rounds)",
            highlight=False,
            soft_wrap=True,
        )


def _pictures(arms: Mapping[str, Trained], folder: Path) -> None:
    """``kept_tokens.png``: the same test images under every compressed arm."""
    compressed = {name: trained for name, trained in arms.items() if name != "dense"}
    if not compressed:
        return
    data = next(iter(arms.values())).parts.data
    batch = collate([data.test[index] for index in range(PICTURED)])
    rows, titles = [], [data.classes[int(label)] for label in batch["labels"]]
    # The recipe itself on top, its control arms below.
    for name, trained in reversed(compressed.items()):
        trace = Trace(seed=trained.parts.recipe.seed, sample_ids=batch["sample_ids"])
        with torch.no_grad():
            trained.parts.model.eval()(pixel_values=batch["pixel_values"], trace=trace)
        rows.append((name, overlays(trace, len(titles))))
    save_kept_tokens(folder / "kept_tokens.png", rows, titles)
