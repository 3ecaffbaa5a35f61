"""``laconic report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import console, emit, user_input


def report(
    runs: Annotated[list[str], typer.Argument(help="run folders; a single one is shown with its control arms")],
    to: Annotated[Path | None, typer.Option(help="HTML file to write; default: report.html in the folder of a single run")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object to stdout, progress to stderr")] = False,
) -> None:
    """Write a page about runs: curves, results, kept tokens, cost by layer, configuration."""
    with user_input():
        if to is not None and to.suffix not in (".html", ".htm"):
            raise ValueError(f"--to {to} must be a file that ends in .html")
        if to is None and len(runs) > 1:
            raise ValueError(f"{len(runs)} runs on one page: say where to write it, --to comparison.html for example")
        from ..report_page.page import write_page
        from ..run_folder import RunFolder

        page = RunFolder.of(runs[0]).page if to is None else to
        write_page(runs, page)
    emit({"runs": runs, "written": str(page)}, as_json)
    console(as_json).print(f"written: {page}", highlight=False, soft_wrap=True)
