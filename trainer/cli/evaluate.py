"""``laconic evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import console, emit, numbers, running, user_input


def evaluate(
    target: Annotated[str, typer.Argument(help="run, export, or any folder, hub name or .gguf file of a model")],
    overrides: Annotated[list[str] | None, typer.Argument(help="overrides, data.key=value and seed=value")] = None,
    keep: Annotated[list[float] | None, typer.Option(help="measure with this keep of every stage too; may be given several times")] = None,
    sweep: Annotated[str | None, typer.Option(help="measure with keeps over a range too: LOWEST:HIGHEST, 0.1:1 for example")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="PNG or SVG of quality against MACs for keeps that are measured; both are written, and the data as JSON"),
    ] = None,
    dense: Annotated[
        str | None,
        typer.Option(help="run or any model whose predictions and times count as dense; default: the same weights without stages"),
    ] = None,
    arms: Annotated[str, typer.Option(help="dense weights with a smaller input, with commas: pooled, downsampled")] = "",
    equal: Annotated[
        str, typer.Option(help="what --arms have in common with the compressed model: tokens, or latency as measured")
    ] = "tokens",
    batch_sizes: Annotated[str, typer.Option(help="time forwards of batches of these sizes in pairs: 1,8,32 for example")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object to stdout, progress to stderr")] = False,
) -> None:
    """Quality, achieved ratios and latency of a run, the dense model and simpler methods with as many tokens; quality of any model."""
    with user_input():
        from ..build.initial_weights import start_of
        from ..build.plain_recipe import recipe_of
        from ..build.validate import validate as check
        from ..evaluate import Options
        from ..evaluate import evaluate as run
        from ..evaluation.smaller import arms_of
        from ..evaluation.tables import tables
        from ..recipe.schema import ModelRecipe
        from ..show.optional import optional
        from ..show.sweep import check_plot, draw, swept, write_data

        keeps = [*(keep or []), *(swept(sweep) if sweep else [])]
        if plot is not None:
            check_plot(plot, keeps)
        given = " with ".join([*(["--keep"] if keep else []), *([f"--sweep {sweep}"] if sweep else [])])
        options = Options(keeps, dense, arms_of(arms, equal), equal, numbers("--batch-sizes", batch_sizes, least=1), given)
        recipe, weights = recipe_of(target, overrides or [])
        start = start_of(ModelRecipe(name=weights))
        assert start is not None
        check(recipe, start.config)
    out = console(as_json)
    with running():
        result = run(target, recipe, out, weights, options)
        written = [] if plot is None else [write_data(result, plot)]
    emit(result, as_json)
    for table in tables(result):
        out.print(table)
    if plot is not None:
        with optional("plot was drawn", out):
            written += draw(result, plot)
        out.print(f"written: {', '.join(map(str, written))}", highlight=False, soft_wrap=True)
