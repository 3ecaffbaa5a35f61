"""``laconic answers``."""

from __future__ import annotations

from typing import Annotated

import typer

from .output import console, emit, user_input


def answers(
    reference: Annotated[str, typer.Argument(help="run folder that the others are compared with, of the dense model for example")],
    runs: Annotated[list[str], typer.Argument(help="run folders")],
    downsampled: Annotated[
        str | None, typer.Option(help="run on smaller images: splits the reference's right answers into hard and easy")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object to stdout, progress to stderr")] = False,
) -> None:
    """Runs of chats compared answer by answer on the same held-out questions."""
    from rich.table import Table

    with user_input():
        from ..measure.answers import compare

        found = compare(reference, runs, downsampled)
    emit({folder: vars(paired) for folder, paired in found.items()}, as_json)
    kinds = list(found[reference].accuracy)
    table = Table(title=f"right answers, beside {reference}", title_justify="left", box=None)
    for column in ("run", *kinds, "difference", "agreement", *(("hard", "easy") if downsampled else ())):
        table.add_column(column, justify="left" if column == "run" else "right")
    for folder, paired in found.items():
        apart = ["–" if share is None else f"{share:.3f}" for share in (paired.hard, paired.easy)] if downsampled else []
        shown = (f"{paired.difference:+.3f} ± {paired.interval:.3f}", f"{paired.agreement:.3f}", *apart)
        table.add_row(folder, *(f"{paired.accuracy[kind]:.3f}" for kind in kinds), *shown)
    console(as_json).print(table)
