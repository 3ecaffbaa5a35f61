"""``laconic compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import console, emit, running, user_input


def compare(
    recipe: Annotated[str, typer.Argument(help="name of a shipped recipe, or path of a YAML file")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="overrides, key.path=value; ARM:key.path=value for one arm; {seed} is the run's seed")
    ] = None,
    arms: Annotated[
        str,
        typer.Option(
            help="arms with commas: dense, learned, random, uniform, pooled, downsampled, …; NAME@0.3 at that ratio; LABEL=FILE.yaml"
        ),
    ] = "dense,learned,random",
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="runs of each arm, with the recipe's seed and those after it")] = 3,
    reference: Annotated[str | None, typer.Option(help="arm that differences are to; default: dense, or the first")] = None,
    equal: Annotated[
        str,
        typer.Option(help="steps: arms train as many as the recipe; time: as many as take as long as the recipe's, by measured step times"),
    ] = "steps",
    jobs: Annotated[int, typer.Option(min=1, help="runs at the same time, which share the cores and have a GPU each")] = 1,
    output: Annotated[Path | None, typer.Option(help="folder of the runs and results; default: runs/compare-RECIPE")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object to stdout, progress to stderr")] = False,
) -> None:
    """Train arms of a recipe alike over several seeds: means, paired differences, curves of quality and cost; continues what was interrupted."""
    with user_input():
        from ..compare.compare import Options, plan
        from ..compare.compare import compare as run

        given = Options([name for name in arms.split(",") if name], seeds, reference, equal, jobs, output)
        planned = plan(recipe, overrides or [], given)
    with running():
        emit(run(planned, console(as_json)), as_json)
