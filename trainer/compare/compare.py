"""A comparison from recipe to table: arms alike over several seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ...modules.checkpoints.whole_files import write_file, write_json
from ..build.validate import Checked, check_memory, validate
from ..distributed.lock import locked
from ..errors import RecipeError
from ..recipe.schema import Recipe
from ..run_folder import RunFolder
from ..show.optional import optional
from .arms import Arm, arms_of
from .equal_time import of_equal_time
from .job import jobs_of
from .page import write
from .plot import draw
from .results import results_of
from .running import check_at_once, run_all

EQUAL = ("steps", "time")


@dataclass(frozen=True)
class Options:
    """Settings of a comparison.

    Attributes:
        arms: names of the arms, as ``arms_of`` takes them.
        seeds: number of seeds, from the recipe's own upwards.
        reference: arm that differences are to; None takes ``dense`` if it is among the arms, otherwise the first.
        equal: ``steps``: as many as the recipe has; ``time``: as many as take as long as the recipe's (``of_equal_time``).
        at_once: number of trainings at the same time.
        output: folder of the comparison; None is ``runs/compare-RECIPE``.
    """

    arms: Sequence[str]
    seeds: int = 3
    reference: str | None = None
    equal: str = "steps"
    at_once: int = 1
    output: Path | None = None


@dataclass(frozen=True)
class Plan:
    """A checked comparison.

    Attributes:
        recipe: name of the recipe.
        main: the recipe itself.
        arms: its arms.
        length: optimizer steps of the recipe.
        steps: optimizer steps of a run, by arm.
        seeds: the seeds.
        scale: by arm, dense MACs of its model ÷ those of the recipe's.
        reference: arm that differences are to.
        equal: what the arms have alike.
        at_once: number of trainings at the same time.
        output: folder of the comparison.
    """

    recipe: str
    main: Recipe
    arms: Sequence[Arm]
    length: int
    steps: Mapping[str, int]
    seeds: Sequence[int]
    scale: Mapping[str, float]
    reference: str
    equal: str
    at_once: int
    output: Path


def plan(source: str, overrides: Sequence[str], options: Options) -> Plan:
    """Checks a comparison before anything trains.

    Args:
        source: name or path of the recipe.
        overrides: as ``arms_of`` takes them.
        options: the settings.

    Raises:
        ValueError: an arm, a recipe or a setting is wrong.
    """
    main, arms = arms_of(source, options.arms, overrides)
    names = [arm.name for arm in arms]
    reference = options.reference or ("dense" if "dense" in names else names[0])
    if reference not in names:
        raise RecipeError(f"--reference {reference} is not among --arms {','.join(names)}")
    if options.equal not in EQUAL:
        raise RecipeError(f"--equal {options.equal} must be one of {', '.join(EQUAL)}")
    recipes = {arm.name: arm.load(main.recipe.seed) for arm in arms}
    checked = {name: _checked(name, recipe, options.at_once) for name, recipe in recipes.items()}
    # Of the recipe itself; its data are opened again for it only if no arm has its model and length.
    alike = [name for name, recipe in recipes.items() if (recipe.model, recipe.trainer) == (main.recipe.model, main.recipe.trainer)]
    own = checked[alike[0]] if alike else validate(main.recipe)
    return Plan(
        recipe=main.name,
        main=main.recipe,
        arms=arms,
        length=own.steps,
        steps={name: item.steps for name, item in checked.items()},
        seeds=range(main.recipe.seed, main.recipe.seed + options.seeds),
        scale={name: item.dense_macs / own.dense_macs if own.dense_macs else 1.0 for name, item in checked.items()},
        reference=reference,
        equal=options.equal,
        at_once=options.at_once,
        output=options.output or Path("runs") / f"compare-{main.name}",
    )


def _checked(name: str, recipe: Recipe, at_once: int) -> Checked:
    """The recipe of an arm, checked. Raises RecipeError that names the arm."""
    try:
        check_at_once(recipe.trainer, at_once)
        checked = validate(recipe)
        check_memory(checked, recipe)
    except ValueError as error:
        raise RecipeError(f"arm {name}: {error}") from None
    return checked


def compare(planned: Plan, console: Console) -> dict[str, Any]:
    """Trains what is not trained yet, writes ``compare.json``, ``.csv``, ``.png``, ``.svg`` and ``.html``, and prints the table.

    Args:
        planned: a checked comparison.
        console: console for progress.

    Returns:
        The content of ``compare.json``.

    Raises:
        RecipeError: an earlier run in the folder had other settings.
    """
    folder, arms = planned.output, planned.arms
    with locked(RunFolder(folder)):
        if planned.equal == "time":
            arms = of_equal_time(arms, planned.main, planned.length, folder, console, planned.at_once)
        jobs = jobs_of(arms, planned.seeds, planned.steps, folder)
        run_all(jobs, planned.at_once, console)
        found = results_of(planned.recipe, arms, jobs, planned.scale, planned.reference, planned.equal)
        result = found.to_dict()
        write_json(folder / "compare.json", result)
        write_file(folder / "compare.csv", found.csv())
        console.print(found.table())
        files = [folder / "compare.json", folder / "compare.csv"]
        with optional("plot and page were written", console):
            pictures = draw(found, folder)
            files += pictures
            write(found, jobs, planned.scale, pictures[0], folder / "compare.html")
            files.append(folder / "compare.html")
    console.print(f"written: {', '.join(map(str, files))}", highlight=False, soft_wrap=True)
    return result
