"""``laconic calibrate``."""

from __future__ import annotations

from typing import Annotated

import typer

from .output import console, emit, running, user_input


def calibrate(
    target: Annotated[str, typer.Argument(help="run, or folder of a causal model with stages; its thresholds are written")],
    overrides: Annotated[list[str] | None, typer.Argument(help="overrides, data.key=value and seed=value")] = None,
    rows: Annotated[int, typer.Option(min=1, help="training rows")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object to stdout, progress to stderr")] = False,
) -> None:
    """Set the thresholds of a causal model anew, so that its stages keep what they request on your data."""
    with user_input():
        from ..build.plain_recipe import recipe_of
        from ..calibrate import calibrate as run

        recipe, weights = recipe_of(target, overrides or [])
    with running():
        emit(run(target, recipe, weights, rows, console(as_json)), as_json)
