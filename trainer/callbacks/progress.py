"""One line every few steps, and a progress bar in a terminal."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, TextIO

import lightning
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..build.part_rates import rates_of
from ..distributed import collective
from ..measure.shares import shares, static_of
from ..recipe.phases import PhasePlan
from ..tasks.base import Task


@dataclass
class Spent:
    """Images or tokens that a phase of training has read, and seconds of its steps."""

    amount: int = 0
    seconds: float = 0.0


class Throughput:
    """Images or tokens per second of loading and training, without validation.

    Attributes:
        amount: images or tokens of the whole training.
        seconds: seconds of the whole training.
    """

    def __init__(self) -> None:
        self.amount, self.seconds = 0, 0.0
        self._read, self._since = (0, 0.0), 0.0

    def resume(self, amount: int, seconds: float) -> None:
        """Continues from the amount and the seconds of a checkpoint."""
        self.amount, self.seconds, self._read = amount, seconds, (amount, seconds)

    def start(self) -> None:
        self._since = time.perf_counter()

    def add(self, amount: int) -> None:
        """Adds an amount processed since the last call, or since ``start``."""
        now = time.perf_counter()
        self.amount += amount
        self.seconds += now - self._since
        self._since = now

    def read(self) -> float:
        """Rate since the last call."""
        amount, seconds = self._read
        self._read = self.amount, self.seconds
        return (self.amount - amount) / (self.seconds - seconds) if self.seconds > seconds else 0.0

    @property
    def mean(self) -> float | None:
        """Rate of the whole training; None before the first step."""
        return self.amount / self.seconds if self.seconds else None


class RunLog:
    """Writes lines to the console and to the run's ``log.txt``.

    Args:
        console: output console.
        file: the open log file.
    """

    def __init__(self, console: Console, file: TextIO) -> None:
        self.console, self.file = console, file

    def line(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        self.file.write(text + "\n")
        self.file.flush()


class StepLine(Callback):
    """Writes step, loss, achieved keep, speed and time left, and logs the same values as scalars.

    Args:
        log: output of the lines; the progress bar uses its console.
        total_steps: optimizer steps of the run.
        every: steps between lines.
        title: name of the arm.
        task: task, with its metric and the unit of its speed.
        phases: phases of the run; None if it has none.

    Attributes:
        spent: what each phase has read so far, and in which time.
    """

    def __init__(self, log: RunLog, total_steps: int, every: int, title: str, task: type[Task], phases: PhasePlan | None = None) -> None:
        self.lines, self.total_steps, self.every, self.title, self.task = log, total_steps, every, title, task
        self.phases = phases
        self.spent = [Spent() for _ in phases.phases] if phases is not None else []
        self.throughput = Throughput()
        self._bar: Progress | None = None
        self._began = 0.0
        self._loss: Any = 0.0
        self._first_step = 0

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._began, self._first_step = time.perf_counter(), trainer.global_step
        self.throughput.start()
        if self.lines.console.is_terminal and trainer.is_global_zero:
            columns = TextColumn(self.title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self._bar = Progress(*columns, console=self.lines.console, transient=True)
            self._bar.add_task(self.title, total=self.total_steps, completed=trainer.global_step)
            self._bar.start()

    def state_dict(self) -> dict[str, Any]:
        spent = [[phase.amount, phase.seconds] for phase in self.spent]
        return {"train_seconds": self.throughput.seconds, "amount": self.throughput.amount, "phases": spent}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.throughput.resume(state_dict["amount"], state_dict["train_seconds"])
        self.spent = [Spent(amount, seconds) for amount, seconds in state_dict["phases"]]

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        amount, before = self.task.amount(batch) * trainer.world_size, self.throughput.seconds
        self.throughput.add(amount)
        # The task's losses of a step's batches have their weights already.
        self._loss = self._loss + outputs["task_loss"] / trainer.accumulate_grad_batches
        step = trainer.global_step
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step)
        whole = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        phase = ""
        if self.phases is not None:
            # A batch that ends a step has raised the count of steps.
            number = self.phases.number(step - whole)
            phase = f"  {self.phases.phases[number].name}"
            self.spent[number].amount += amount
            self.spent[number].seconds += self.throughput.seconds - before
        if not whole:
            return
        of_step, self._loss = self._loss, 0.0
        if step % self.every and step != self.total_steps:
            return
        rate = self.throughput.read()
        routings = outputs["trace"].routings if outputs["trace"] is not None else {}
        counts: list[float] = [count for routing in routings.values() for count in routing.counts()]
        cost = module.cost if routings else None
        stacks = () if cost is None else cost.by_stack
        if stacks:
            uses = cost.uses(outputs["trace"])
            counts += [number for name in stacks for number in (uses[name].processed, uses[name].present)]
        # The loss of the whole step, and the token counts of its last batch, summed over ranks before the division.
        loss, *summed = collective.total([float(of_step), *counts])
        loss /= trainer.world_size
        groups = trainer.optimizers[0].param_groups
        scalars = {"train/loss": loss, f"train/{self.task.unit}_per_second": rate, "train/lr": groups[0]["lr"]}
        rates = rates_of(groups)
        scalars |= {f"train/lr_{name}": rate for name, rate in rates.items() if len(rates) > 1}
        keeps = {}
        for (name, routing), kept, present in zip(routings.items(), summed[::2], summed[1::2], strict=False):
            achieved = kept / present if present else 1.0
            scalars |= {f"{name}/keep_requested": routing.requested, f"{name}/keep_achieved": achieved}
            keeps[name] = achieved
            if routing.agreement is not None:
                scalars[f"{name}/agreement"] = float(routing.agreement)
        visual, of_stacks = [], summed[2 * len(routings) :]
        for name, processed, present in zip(stacks, of_stacks[::2], of_stacks[1::2], strict=True):
            requested = cost(outputs["trace"].keep).stack_keep[name]
            achieved = processed / present if present else 1.0
            scalars |= {f"{name}/visual_keep_requested": requested, f"{name}/visual_keep_achieved": achieved}
            visual.append(f"{name} {achieved:.3f} of {requested:.3f}")
        budget = outputs["budget"]
        if budget is not None:
            scalars |= {f"{name}/keep_soft": float(value) for name, value in budget.soft_keep.items()}
            if budget.regularizer is not None:
                scalars |= {"budget/regularizer": float(budget.regularizer), "budget/weight": float(budget.weight)}
            scalars |= {f"budget/gap/{name}": float(gap) for name, gap in budget.gaps.items()}
            for name, state in module.budget.controls.items():
                scalars |= {f"budget/{key}/{name}": float(state[key]) for key in ("multiplier", "penalty") if key in state}
            if budget.auxiliary is not None:
                scalars["train/auxiliary_loss"] = float(budget.auxiliary)
        if outputs["distillation"] is not None:
            scalars["train/distillation"] = float(outputs["distillation"].answers)
            if outputs["distillation"].hidden is not None:
                scalars["train/distillation_hidden"] = float(outputs["distillation"].hidden)
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step)
        done = max(1, step - self._first_step)
        left = (time.perf_counter() - self._began) / done * (self.total_steps - step)
        static = static_of({name: routing.requested for name, routing in routings.items()})
        keep = (f"  keep {shares(keeps, static)}" if keeps else "") + (f"  visual keep {', '.join(visual)}" if visual else "")
        if trainer.is_global_zero:
            self.lines.line(
                f"{self.title}  step {step}/{self.total_steps}{phase}  loss {loss:.3f}{keep}  {rate:,.0f} {self.task.unit}/s  {clock(left)} left"
            )

    def on_validation_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.throughput.start()
        metric = self.task.metric
        value = trainer.callback_metrics.get(f"val/{metric}")
        if value is not None and module.validated and trainer.is_global_zero:
            self.lines.line(f"{self.title}  step {trainer.global_step}  validation {metric.replace('_', ' ')} {float(value):.4f}")

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if self._bar is not None:
            self._bar.stop()

    def on_exception(self, trainer: lightning.Trainer, module: lightning.LightningModule, exception: BaseException) -> None:
        if self._bar is not None:
            self._bar.stop()


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
