"""A run from recipe to report: first the control arms, then the recipe itself, then the paired measurement."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel

from ..data.rows import collate
from ..data.splits import Splits
from ..modules.budget.start_routers import Fitted
from ..modules.checkpoints.whole_files import whole_folder, write_file, write_json
from ..modules.compress import checkpoint_activations, decompress
from ..modules.stage import stages_of
from .build.build import build
from .build.lightning_trainer import lightning_trainer, quiet
from .build.part_rates import described, groups_of, parts_of, rates_of
from .build.parts import RunParts
from .build.routers import started
from .build.step_target import with_macs
from .build.trainable import parameter_counts
from .callbacks.checkpoints import Checkpoints
from .callbacks.guards import NanGuard, RandomState
from .callbacks.health import RouterHealth
from .callbacks.progress import RunLog, StepLine
from .distributed import collective
from .distributed.deepspeed import deepspeed_config, stage_of
from .distributed.launch import end_with_launcher, launch
from .distributed.lock import locked
from .distributed.processes import join, unstarted
from .distributed.resume import check_same_processes, check_same_run, find_checkpoint
from .distributed.signals import StopSignals
from .distributed.strategies import needs_group, processes_of, resolved
from .distributed.zero3 import save_trained
from .errors import RecipeError
from .measure.answers import write_answers
from .measure.arms import bench_models, print_claims, print_step_times
from .measure.bench import Bench
from .measure.cures import Cures
from .measure.phase_costs import phase_facts, phase_lines
from .measure.report import Report, table, with_bench
from .measure.results import Trained, arm_of, ratio_of, report_of
from .measure.step_time import calibration_of
from .measure.strayed import strayed
from .recipe.baselines import load_baselines
from .recipe.files import LoadedRecipe, dump
from .recipe.schema import Recipe
from .report_page.page import write_page
from .run_folder import RunFolder, from_pretrained, load_model
from .show.optional import optional
from .task_module import TaskModule
from .tasks.base import task_named
from .trackers.loggers import finish_loggers


def output_folder(loaded: LoadedRecipe) -> Path:
    """Folder of a recipe's run."""
    return Path(loaded.recipe.output.format(recipe=loaded.name, seed=loaded.recipe.seed))


def train(
    loaded: LoadedRecipe, overrides: Sequence[str], console: Console, resume: str | None = None, overwrite: bool = False
) -> Report | None:
    """Trains a recipe and its baselines, measures them, and writes the run folder.

    With several processes, every process calls this. Rank 0 writes, prints and measures while the others wait. If the processes are not
    yet started, this process starts them and waits for them.

    Args:
        loaded: the recipe.
        overrides: overrides of the recipe, which also apply to its baselines.
        console: console for progress.
        resume: ``auto`` (the newest whole checkpoint of this run, if there is one) or the path of a checkpoint; None starts a new run.
        overwrite: delete what an earlier run saved in the folder; otherwise a new run is refused there.

    Returns:
        The report; None on every machine but the first, if this process started the others.

    Raises:
        RecipeError: the folder has an earlier run, or another process trains in it.
        Stopped: SIGTERM, SIGINT or SIGHUP ended the run.
        Ended: a process that was started here failed.
    """
    quiet()
    settings = resolved(loaded.recipe).trainer
    devices, num_nodes = int(settings.devices), settings.num_nodes
    if unstarted(devices, num_nodes):
        # Of a comparison that is killed: its processes end with this one.
        end_with_launcher()
        launch(
            devices,
            num_nodes,
            [
                *(sys.executable, "-m", "laconic", "train", loaded.source, *overrides),
                *(["--resume", resume] if resume else []),
                *(["--overwrite"] if overwrite else []),
            ],
        )
        return Report.read(output_folder(loaded)) if num_nodes == 1 or os.environ["NODE_RANK"] == "0" else None
    join(devices, num_nodes, needs_group(settings))
    first, run = collective.rank() == 0, RunFolder(output_folder(loaded))
    with StopSignals().handled() as signals, contextlib.ExitStack() as held:
        collective.from_rank_zero(lambda: _open(run, held, resume, overwrite))
        return _train(loaded, overrides, console if first else silent(), resume, signals)


def _open(run: RunFolder, held: contextlib.ExitStack, resume: str | None, overwrite: bool) -> None:
    """Takes a run folder for this run.

    Raises:
        RecipeError: another process has it, it has an earlier run, or there is nothing to resume from.
    """
    # Before the control arms are trained.
    find_checkpoint(run, resume)
    held.enter_context(locked(run))
    run.remove_partial()
    if resume is not None or not run.started:
        return
    if not overwrite:
        raise RecipeError(f"{run.path} has an earlier run: --resume auto continues it, --overwrite deletes it; or set another output")
    run.clear()


def silent() -> Console:
    """A console without output, for all ranks but rank 0."""
    return Console(file=open(os.devnull, "w", encoding="utf-8"))


def _train(loaded: LoadedRecipe, overrides: Sequence[str], console: Console, resume: str | None, signals: StopSignals) -> Report:
    run = RunFolder(output_folder(loaded))
    baselines = load_baselines(loaded, overrides)
    arms: dict[str, Trained] = {}
    data: Splits | None = None
    for note in baselines.notes:
        console.print(note, highlight=False, soft_wrap=True)
    for arm in [*baselines.arms, loaded]:
        main = arm is loaded
        name = _arm_name(arm)
        if name in arms or (not main and name == _arm_name(loaded)):
            name = arm.name
        where = run if main else run.arm(arm.name)
        arms[name] = train_arm(arm, name, where.path, console, data, resume if main else ("auto" if resume else None), signals)
        data = arms[name].parts.data
    first = collective.rank() == 0
    # One process measures the step of one process while the others wait, so that they do not slow it down.
    measured = _bench(arms, loaded.recipe, console) if first else None
    report = report_of(loaded, arms, measured)
    if first:
        report.save(run.report)
        _draw(loaded.recipe, {name: trained.parts for name, trained in arms.items()}, run, console)
    collective.wait()
    shown = {name: with_bench(trained.arm, name, measured) for name, trained in arms.items()}
    console.print(table(shown, task_named(loaded.recipe.task).metric, measured.memory_kind if measured else None))
    if measured is not None:
        print_claims(measured, console)
    print_step_times(shown, console)
    written = _write_page(run, console) if first else None
    line = Text(f"report: {run.report}")
    if written is not None:
        # A terminal opens the page where the name is pressed.
        line.append(", as a page: ").append(str(written), style=f"link {written.resolve().as_uri()}")
    console.print(line, highlight=False, soft_wrap=True)
    return report


def _write_page(run: RunFolder, console: Console) -> Path | None:
    """Writes the run's page; None if that raises an error."""
    with optional("page was written", console):
        write_page([run.path], run.page)
        return run.page
    return None


def _draw(recipe: Recipe, arms: Mapping[str, RunParts], run: RunFolder, console: Console) -> None:
    """Draws the run's pictures, if that raises no error."""
    with optional("picture was drawn", console):
        task_named(recipe.task).draw(arms, run.path)


def rehearse(loaded: LoadedRecipe, overrides: Sequence[str], console: Console) -> dict[str, Any]:
    """Builds every arm and runs one training step of each, without saving anything, to find errors before a long run."""
    quiet()
    result: dict[str, Any] = {}
    for arm in [*load_baselines(loaded, overrides).arms, loaded]:
        parts = build(arm.recipe)
        module = task_named(parts.recipe.task).module(parts)
        module.model.train()
        for bag in {phase.bag for phase in arm.recipe.phases or ()} or {None}:
            rows: Any = (parts.data if bag is None else parts.data.in_bags(bag)).train
            batch = collate([rows[index] for index in range(arm.recipe.data.batch_size)])
            loss = module.training_step(batch, 0)["loss"]
            loss.backward()
        result[arm.name] = {"loss": float(loss.detach()), "steps": parts.total_steps}
        console.print(
            f"{arm.name}: built, one step's loss {float(loss.detach()):.3f}; would train {parts.total_steps:,} steps", highlight=False
        )
    return result


def _arm_name(arm: LoadedRecipe) -> str:
    """``dense``, or the names of the scorers or of the phases' bags; ``static`` for layers that are left out."""
    if bags := {phase.kind for phase in arm.recipe.phases or () if phase.bag is not None}:
        return "+".join(sorted(bags))
    if arm.recipe.compression is None:
        return "dense"
    return "+".join(sorted({"static" if stage.left_out else stage.part("scorer").name for stage in arm.recipe.compression.stages}))


def train_arm(
    loaded: LoadedRecipe,
    name: str,
    folder: Path,
    console: Console,
    data: Splits | None = None,
    resume: str | None = None,
    signals: StopSignals | None = None,
) -> Trained:
    """Trains and evaluates one recipe into its folder; afterwards the model is on the CPU (under DeepSpeed on rank 0 only)."""
    recipe = resolved(task_named(loaded.recipe.task).resolved(loaded.recipe))
    quiet()
    run = RunFolder(folder)
    checkpoint = collective.from_rank_zero(lambda: _checkpoint(run, recipe, resume, console))
    stage = stage_of(recipe.trainer)
    shards = deepspeed_config(recipe.trainer, recipe.data.batch_size) if stage == 3 else None
    calibration, data = calibration_of(recipe, run, data, console, checkpoint is not None)
    parts = build(with_macs(recipe, calibration), data, shards, None if checkpoint is None else RunFolder.of(checkpoint))
    collective.from_rank_zero(lambda: _open_folder(run, recipe, parts))
    with (run.log if collective.rank() == 0 else Path(os.devnull)).open("a" if checkpoint else "w", encoding="utf-8") as log:
        output = RunLog(console, log)
        _describe(parts, name, output)
        for remark in parts.data.remarks:
            output.line(remark)
        fitted = _fitted(run, parts, checkpoint is not None)
        for what, found in (
            ("scorers fitted to updates, rank correlation", fitted.scorers),
            ("shortcuts, explained share", fitted.shortcuts),
        ):
            if found:
                output.line(f"{what} on held-out tokens: {'  '.join(f'{stage} {value:.2f}' for stage, value in found.items())}")
        module = task_named(parts.recipe.task).module(parts)
        line = StepLine(output, parts.total_steps, recipe.trainer.log_every, name, module.task, parts.phases)
        saving = Checkpoints(run, parts.total_steps, recipe.trainer.checkpoint_every, signals or StopSignals(), checkpoint)
        health = RouterHealth(output, parts.total_steps, recipe.trainer.log_every)
        callbacks = [NanGuard(), line, health, RandomState(recipe.seed), saving]
        trainer = lightning_trainer(recipe, run, parts.total_steps, callbacks, _leaves_unused(module, parts))
        data_module = parts.data_module()
        # transformers loads models in evaluation mode, and Lightning does not change it: routers would not train.
        parts.model.train()
        if recipe.trainer.compile:
            module.task.compile(parts.model)
        with saving.signals.deferred():
            trainer.fit(module, datamodule=data_module, ckpt_path=checkpoint, weights_only=True)
            saving.check()
            trainer.test(module, datamodule=data_module, verbose=False)
            saving.check()
        finish_loggers(trainer.loggers)
        for count in (module.bad_rows, module.validation_rows):
            if count.reasons:
                output.line(f"bad rows{f' of the {count.split} data' if count.split else ''}: {count.summary()}")
        built = stages_of(parts.model).values()
        asked = {} if parts.cost is None else parts.cost().keep
        far = strayed(built, asked, module.achieved_keep, str(folder), Cures(parts.budget), module.achieved)
        for remark in (*module.quality.remarks(parts.data), *far, *phase_lines(phase_facts(parts, line.spent), module.task.unit)):
            output.line(remark)
    if collective.rank() == 0 and (answers := module.quality.answered(parts.data)):
        write_answers(run.answers, answers)
    remarks = (*health.warnings, *far)
    times = {} if calibration is None else {**calibration.to_dict(), "macs_ratio": calibration.macs_ratio, "floor": calibration.floor}
    arm = arm_of(loaded.name, parts, module, line)
    arm = replace(arm, fitted=fitted.to_dict(), gradients=health.report, step_time=times, remarks=remarks)
    stages = list(stages_of(parts.model).values())
    if parts.base is None and stages and all(stage.idle for stage in stages):
        # A schedule that ended at full length, such as random-LTD: the result is an ordinary model.
        decompress(parts.model)
    save_trained(parts.model, folder, parts.base, ratio_of(arm, parts), parts.data.save_beside)
    if not stage:
        # They would stay in memory while other arms train.
        for optimizer in trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)
            optimizer.state.clear()
        parts.model.to("cpu")
    elif collective.rank() == 0:
        parts = replace(parts, model=_read_back(run, recipe))
    return Trained(parts, module, arm)


def _checkpoint(run: RunFolder, recipe: Recipe, resume: str | None, console: Console) -> Path | None:
    """The checkpoint to resume from, checked; without one, what an earlier run left is removed."""
    checkpoint, passed_over = find_checkpoint(run, resume)
    for fault in passed_over:
        console.print(f"passed over: {fault}; {f'resuming from {checkpoint}' if checkpoint else 'starting anew'}", soft_wrap=True)
    if checkpoint is None:
        if resume is not None and (run.model or run.adapter):
            raise RecipeError(f"{run.path} has a trained model and no checkpoint: its run has ended; --overwrite trains it anew")
        run.clear(arms=False)
    else:
        check_same_run(run, recipe)
        check_same_processes(checkpoint, processes_of(recipe.trainer), stage_of(recipe.trainer))
    return checkpoint


def _fitted(run: RunFolder, parts: RunParts, resumed: bool) -> Fitted:
    """How well fitted parts predict, of a run that goes on as it was when they were fitted."""
    if resumed:
        return run.read_fitted()
    fitted = started(parts)
    if fitted and collective.rank() == 0:
        write_json(run.fitted, fitted.to_dict())
    return fitted


def _open_folder(run: RunFolder, recipe: Recipe, parts: RunParts) -> None:
    write_file(run.recipe, dump(recipe))
    if not run.data.is_dir():
        with whole_folder(run.data) as partial:
            parts.data.save_beside(partial)
            write_json(partial / "data.json", parts.data.record)
            if recipe.model.tower_of is not None:
                config: Any = parts.model.config
                # Without the name that it was loaded by, which is no setting.
                settings = {name: value for name, value in config.vision_config.to_diff_dict().items() if not name.startswith("_")}
                write_json(partial / run.tower.name, settings)


def _leaves_unused(module: TaskModule, parts: RunParts) -> bool:
    """True if a training step leaves parameters without gradient, found on a step of one row; DDP needs to know."""
    if stage_of(parts.recipe.trainer) or collective.world_size() == 1:
        return False
    ends = () if parts.budget is None else (parts.budget.keep(0), parts.budget.keep(parts.total_steps - 1))
    whole = any(keep == 1 for keeps in ends for keep in keeps.values())
    if whole or parts.recipe.training_keep is not None or any(phase.keep is not None for phase in parts.recipe.phases or ()):
        # A step with all tokens trains no router.
        return True
    rows = parts.data.train_rows
    row = next((item for item in (parts.data.train[index] for index in range(rows if rows is not None else 1)) if "bad" not in item), None)
    if row is None:
        return False
    parts.model.train()
    buffers = {name: value.clone() for name, value in parts.model.named_buffers()}
    controls = None if parts.budget is None else parts.budget.state_dict()
    module.losses(collate([row]))["loss"].backward()
    for name, value in parts.model.named_buffers():
        # Restored, so that an adaptive threshold has not seen this row.
        value.copy_(buffers[name])
    if parts.budget is not None and controls is not None:
        # Nor has the controller.
        parts.budget.load_state_dict(controls)
    unused = any(parameter.grad is None for parameter in parts.model.parameters() if parameter.requires_grad)
    parts.model.zero_grad(set_to_none=True)
    return unused


def _read_back(run: RunFolder, recipe: Recipe) -> PreTrainedModel:
    """The model loaded from the saved files: DeepSpeed leaves the trained one in shards and with hooks."""
    model = load_model(run.path) if run.adapter is None else from_pretrained(run.path)
    if recipe.trainer.gradient_checkpointing:
        checkpoint_activations(model)
    return model


def _describe(parts: RunParts, name: str, log: RunLog) -> None:
    recipe, cost = parts.recipe, None if parts.cost is None else parts.cost()
    counts = parameter_counts(parts.model)
    total, trainable = (sum(group[kind] for group in counts.values()) for kind in ("total", "trainable"))
    groups = described(counts, rates_of(groups_of(parts.model, recipe.optimizer)) if parts_of(parts.model) else {})
    processes = processes_of(recipe.trainer)
    spread = f" on {processes} processes with {recipe.trainer.strategy}" if processes > 1 or stage_of(recipe.trainer) else ""
    log.line(
        f"{name}: {parts.model.config.model_type} with {total:,} parameters, {trainable:,} of them trained ({groups}); "
        f"{parts.total_steps:,} steps of {recipe.data.batch_size * recipe.trainer.accumulate * processes} {task_named(recipe.task).item}{spread}"
        + (
            ""
            if cost is None
            else f"; macs_ratio {cost.macs_ratio:.3f}, tokens by layer {' '.join(f'{tokens.attention:g}' for tokens in cost.layers)}"
        )
        + ("" if parts.phases is None else f"; {parts.phases.described}")
    )


def _bench(arms: Mapping[str, Trained], recipe: Recipe, console: Console) -> Bench | None:
    compressed = {name: trained for name, trained in arms.items() if stages_of(trained.parts.model)}
    if not recipe.trainer.bench_rounds or not compressed:
        return None
    if recipe.trainer.strategy == "deepspeed_3":
        console.print("speed is not measured: it needs the whole model in one process, which deepspeed_3 may not fit; use laconic bench")
        return None
    # The arms are trained: a measurement without enough memory, for example, does not cost their report.
    with optional("speed was measured", console):
        return bench_models({name: trained.parts for name, trained in compressed.items()}, recipe, console, recipe.trainer.bench_seconds)
    return None
