"""One training of a comparison: an arm with a seed, in a run folder of its own."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..distributed.resume import check_same_run
from ..distributed.strategies import resolved
from ..recipe.schema import Recipe
from ..run_folder import RunFolder
from ..tasks.base import task_named
from .arms import Arm

# A comparison has its own arms, and measures no arm alone.
_ALWAYS = ("baselines=[]", "trainer.bench_rounds=0")


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        arm: name of the arm.
        seed: its seed.
        recipe: the recipe, as the run records it.
        steps: its optimizer steps.
        run: folder of the run.
        command: program and arguments of the training, an ordinary ``laconic train``.
    """

    arm: str
    seed: int
    recipe: Recipe
    steps: int
    run: RunFolder
    command: tuple[str, ...]

    @staticmethod
    def of(arm: Arm, seed: int, steps: int, output: Path) -> Job:
        """The training of an arm with a seed.

        Args:
            arm: the arm.
            seed: the seed.
            steps: its optimizer steps, if it has a number of epochs.
            output: folder of the comparison.

        Raises:
            RecipeError: the arm's recipe is wrong.
        """
        run = RunFolder(output / f"{arm.name}-{seed}")
        given = [*arm.of_seed(seed), *_ALWAYS, f"output={run.path}"]
        recipe = arm.load(seed, [*_ALWAYS, f"output={run.path}"])
        command = (sys.executable, "-m", "laconic", "train", arm.source, *given, "--resume", "auto")
        return Job(arm.name, seed, resolved(task_named(recipe.task).resolved(recipe)), recipe.trainer.max_steps or steps, run, command)

    @property
    def title(self) -> str:
        """Arm and seed, for messages."""
        return f"{self.arm}, seed {self.seed}"

    @property
    def done(self) -> bool:
        """The run has ended, with its report."""
        return self.run.report.is_file()

    def check_unchanged(self) -> None:
        """Raises RecipeError if an earlier run in the folder had other settings; the message has the key."""
        if self.run.started:
            check_same_run(self.run, self.recipe)


def jobs_of(arms: Sequence[Arm], seeds: Sequence[int], steps: Mapping[str, int], output: Path) -> list[Job]:
    """The trainings of a comparison, seed by seed, so that an interrupted comparison has whole pairs.

    Args:
        arms: the arms.
        seeds: the seeds.
        steps: optimizer steps of a run, by arm, for arms with a number of epochs.
        output: folder of the comparison.

    Raises:
        RecipeError: a recipe is wrong, or an earlier run in a folder had other settings.
    """
    jobs = [Job.of(arm, seed, steps[arm.name], output) for seed in seeds for arm in arms]
    for job in jobs:
        job.check_unchanged()
    return jobs
