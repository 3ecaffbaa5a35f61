"""``laconic bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import console, emit, numbers, running, user_input


def bench(
    recipe: Annotated[str, typer.Argument(help="name of a shipped recipe, or path of a YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="overrides, key.path=value")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="paired rounds; use 30 or more for reported results")] = 40,
    prefill: Annotated[
        bool, typer.Option("--prefill", help="time of reading a prompt and bytes of the cache, of a language model")
    ] = False,
    lengths: Annotated[
        str, typer.Option(help="measure at these lengths: tokens of a row of text, or sides of images in pixels; 256,512,1024 for example")
    ] = "",
    to: Annotated[
        Path | None, typer.Option(help="JSON file of the measurements at --lengths, with the plot beside it; default: lengths.json")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object to stdout, progress to stderr")] = False,
) -> None:
    """Training-step time and memory of dense, compressed and oracle, in paired and interleaved rounds; at several lengths with a plot."""
    given = [*(overrides or []), f"trainer.bench_rounds={rounds}", "baselines=[]"]
    with user_input():
        from ..recipe.files import load

        several = numbers("--lengths", lengths, least=2)
        if several and prefill:
            raise ValueError("--lengths measures training steps, and --prefill the reading of prompts: give one of them")
        if to is not None and to.suffix != ".json":
            raise ValueError(f"--to {to} must end in .json; the plot is written beside it")
        if to is not None and not several:
            raise ValueError(f"--to {to} is a file for the measurements at --lengths, and none are given: remove it")
        if own := [item for item in overrides or [] if item.partition("=")[0] == "trainer.bench_rounds"]:
            raise ValueError(f"{own[0]} has no effect: bench measures --rounds rounds; remove it, and give --rounds")
        loaded = load(recipe, given)
        if loaded.recipe.compression is None:
            raise ValueError(f"{recipe} has no compression: bench compares compressed with dense steps")
        from ..build.validate import check_memory
        from ..build.validate import validate as check
        from ..measure.lengths import at_lengths, bench_lengths
        from ..show.target import check_target

        check_memory(check(loaded.recipe), loaded.recipe)
        recipes = at_lengths(loaded, several)
        file = to or Path("lengths.json")
        if recipes:
            check_target("--to", file, ("points", "exponents"))
    from ...modules.checkpoints.whole_files import write_json
    from ..measure.prefill import prefill_recipe
    from ..measure.tables import bench_recipe
    from ..show.lengths import draw_lengths, lengths_table
    from ..show.optional import optional

    with running():
        out = console(as_json)
        if recipes:
            found = bench_lengths(loaded, recipes, out)
            write_json(file, found.to_dict())
            emit(found.to_dict(), as_json)
            out.print(lengths_table(found))
            written = [file]
            with optional("plot was drawn", out):
                written += draw_lengths(found, file)
            out.print(f"written: {', '.join(map(str, written))}", highlight=False, soft_wrap=True)
        else:
            emit(prefill_recipe(loaded, rounds, out) if prefill else bench_recipe(loaded, out), as_json)
