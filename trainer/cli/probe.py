"""``laconic probe``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import console, emit, running, user_input

KEEPS, SCORER = "0.5", "update"


def probe(
    target: Annotated[str, typer.Argument(help="any folder, hub name or .gguf file of a model, or a run")],
    overrides: Annotated[list[str] | None, typer.Argument(help="overrides, data.key=value and seed=value")] = None,
    rows: Annotated[int, typer.Option(min=1, help="training rows that are measured")] = 16,
    batch_size: Annotated[int, typer.Option(min=1, help="rows of a forward")] = 4,
    scope: Annotated[str | None, typer.Option(help="tokens that are left out: all, prompt or visual; default: the model's first")] = None,
    to: Annotated[Path, typer.Option(help="JSON file of the measurements, with a plot beside it; an existing one is continued")] = Path(
        "probe.json"
    ),
    plan: Annotated[str | None, typer.Option(help="macs_ratio=0.8: choose parts by measured loss until it is reached")] = None,
    overlay: Annotated[Path | None, typer.Option(help="recipe to write for the plan; default: beside --to, with .yaml")] = None,
    base: Annotated[str | None, typer.Option(help="recipe that the plan is laid over; default: one for fine-tuning, by the task")] = None,
    halves: Annotated[bool, typer.Option(help="a plan may leave out attention or MLP alone")] = True,
    keeps: Annotated[str, typer.Option(help="shares of the tokens that a layer of a plan may process; '' for none")] = KEEPS,
    scorer: Annotated[str, typer.Option(help="scorer of layers that process some tokens; update is fitted and measured")] = SCORER,
    shortcut: Annotated[str | None, typer.Option(help="linear: what tokens that bypass a layer get, in place of what it adds")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object to stdout, progress to stderr")] = False,
) -> None:
    """Measure the loss of a model without each layer and half of a layer; plan where to save MACs."""
    with user_input():
        from ..build.plain_recipe import recipe_of
        from ..probe.planning import PlanOptions, check_plan, write_plan
        from ..probe.plot import plot
        from ..probe.probe import Options, Probe
        from ..show.optional import optional

        if to.suffix != ".json":
            raise ValueError(f"--to {to} must end in .json; plot and plan are written beside it")
        given = {"overlay": overlay, "base": base, "no-halves": not halves, "keeps": keeps != KEEPS, "scorer": scorer != SCORER}
        if plan is None and (unread := [name for name, value in {**given, "shortcut": shortcut}.items() if value]):
            raise ValueError(f"--{unread[0]} is of a plan, and --plan is not given: remove it, or give --plan macs_ratio=0.8")
        wanted = None if plan is None else PlanOptions.of(plan, overlay or to.with_suffix(".yaml"), base, halves, keeps, scorer, shortcut)
        recipe, weights = recipe_of(target, overrides or [])
        out = console(as_json)
        probing = Probe(target, recipe, weights, Options(rows, batch_size, scope), to, out)
        if wanted is not None:
            check_plan(probing, wanted, overrides or [])
    with running():
        probing.run()
        written = [to]
        if wanted is not None:
            write_plan(probing, wanted, overrides or [])
            written.append(wanted.overlay)
        emit(probing.record.to_dict() | {"layers": probing.rows()}, as_json)
        out.print(probing.table())
        with optional("plot was drawn", out):
            plot(probing.rows(), f"{target}: {probing.meter.answers:,} answers", to.with_suffix(".png"))
            written.append(to.with_suffix(".png"))
        out.print(f"written: {', '.join(map(str, written))}", highlight=False, soft_wrap=True)
