"""The commands. Imports are inside the functions, so that ``laconic --help`` needs neither torch nor transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .answers import answers
from .bench import bench
from .calibrate import calibrate
from .compare import compare
from .evaluate import evaluate
from .output import console, emit, first_process, keep_stdout_clean, running, user_input
from .probe import probe
from .report import report

app = typer.Typer(
    name="laconic",
    help="Train transformers that run on fewer tokens: run recipes, measure the results, export the trained models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

for command in (evaluate, bench, answers, probe, calibrate, compare, report):
    app.command()(command)

RecipeName = Annotated[str, typer.Argument(help="name of a shipped recipe, or path of a YAML file")]
Overrides = Annotated[list[str] | None, typer.Argument(help="overrides, key.path=value")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object to stdout, progress to stderr")]


def main() -> None:
    """Entry point."""
    keep_stdout_clean()
    app()


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="show this recipe with all keys resolved")] = None,
    copy: Annotated[Path | None, typer.Option(help="write the resolved recipe to this file")] = None,
    with_controls: Annotated[bool, typer.Option("--all", help="list control arms too")] = False,
    as_json: Json = False,
) -> None:
    """List the shipped recipes by task, show one, or copy it."""
    from rich.text import Text

    from ..recipe.files import dump, load, shipped
    from ..recipe.listing import listed

    with user_input():
        if name is None and copy is not None:
            raise ValueError(f"--copy {copy}: name the recipe to copy")
        if name is not None and with_controls:
            raise ValueError("--all is for the list of recipes: remove it, or the name")
    if name is None:
        found = listed(with_controls)
        emit(found, as_json)
        if not as_json:
            out = console(as_json)
            for task, lines in found.items():
                out.print(task, style="bold", highlight=False)
                for key, line in lines.items():
                    out.print(Text.assemble("  ", (key, "bold"), "  ", line), soft_wrap=True)
            if hidden := len(shipped()) - sum(map(len, found.values())):
                out.print(f"{hidden} control arms are not listed; --all lists them", highlight=False)
        return
    with user_input():
        loaded = load(name)
        if copy is not None and copy.exists():
            raise ValueError(f"--copy {copy}: the file exists already")
    if copy is not None:
        copy.write_text(dump(loaded.recipe))
        console(as_json).print(f"written: {copy}", highlight=False)
    emit(loaded.recipe.model_dump(mode="json"), as_json)
    if not as_json and copy is None:
        typer.echo(dump(loaded.recipe), nl=False)


@app.command()
def validate(recipe: RecipeName, overrides: Overrides = None, as_json: Json = False) -> None:
    """Check everything that can be checked without training."""
    from dataclasses import asdict

    with user_input():
        from ..recipe.files import load

        loaded = load(recipe, overrides or [])
        from ..build.memory import memory_here, run_memory
        from ..build.part_rates import described
        from ..build.validate import validate as check
        from ..measure.shares import shares, static_of
        from ..recipe.baselines import load_baselines

        checked = {loaded.name: check(loaded.recipe)}
        baselines = load_baselines(loaded, overrides or [])
        for arm in baselines.arms:
            checked[arm.name] = check(arm.recipe)
    emit({name: asdict(item) for name, item in checked.items()}, as_json)
    out = console(as_json)
    for note in baselines.notes:
        out.print(note, highlight=False, soft_wrap=True)
    for name, item in checked.items():
        keep = (
            "  ".join(f"{stage} keep {value:.4f}" for stage, value in item.keep.items())
            if len(item.keep) <= 4
            else f"{len(item.keep)} stages with keep {shares(item.keep, static_of(item.keep))}"
        )
        out.print(
            f"{name} is valid: {item.parameters:,} parameters, {item.trainable:,} of them trained, "
            f"{'streamed' if item.train_rows is None else f'{item.train_rows:,}'} training rows"
            f"{f' of {item.classes} classes' if item.classes else ''}, {item.steps:,} steps, "
            + (
                f"macs_ratio {item.macs_ratio:.3f}, tokens by layer {' '.join(map(str, item.tokens))}{'  ' if keep else ''}{keep}, "
                if item.tokens
                else ""
            )
            + f"about {item.memory_bytes / 2**30:.2f} GiB to train{'' if item.tokens else ', without activations'}",
            highlight=False,
            soft_wrap=True,
        )
        if item.groups:
            out.print(f"{name}: {described(item.groups, item.rates)}", highlight=False, soft_wrap=True)
        for line in item.remarks:
            out.print(f"{name}: {line}", highlight=False, soft_wrap=True)
    # The recipe itself is trained last.
    order = {**{name: item for name, item in checked.items() if name != loaded.name}, loaded.name: checked[loaded.name]}
    out.print(run_memory(order, loaded.recipe).remark(memory_here()), highlight=False, soft_wrap=True)


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check, build and run one step of every arm, and save nothing")] = False,
    resume: Annotated[str | None, typer.Option(help="auto (newest whole checkpoint of this run) or a .ckpt file")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="delete an earlier run in the same folder")] = False,
    as_json: Json = False,
) -> None:
    """Train a recipe and its control arms, measure them, and write the run folder."""
    given = overrides or []
    with user_input():
        from ..recipe.files import load

        loaded = load(recipe, given)
        from ..build.memory import memory_here, run_memory
        from ..build.validate import check_memory
        from ..build.validate import validate as check
        from ..distributed.processes import leave
        from ..recipe.baselines import load_baselines
        from ..run import output_folder, rehearse
        from ..run import train as run
        from ..run_folder import RunFolder

        if resume is not None and overwrite:
            raise ValueError("--resume continues a run, and --overwrite deletes it: give one of them")
        if dry_run and (resume is not None or overwrite):
            raise ValueError("--dry-run saves nothing, and neither resumes nor overwrites: remove --resume and --overwrite")
        folder = RunFolder(output_folder(loaded))
        checked = {}
        for arm in [*load_baselines(loaded, given).arms, loaded]:
            begun = None if resume is None else folder if arm is loaded else folder.arm(arm.name)
            checked[arm.name] = check(arm.recipe, resumed=begun)
            check_memory(checked[arm.name], arm.recipe)
        needed, memory = run_memory(checked, loaded.recipe), memory_here()
        if needed.peak > memory and first_process():
            console(as_json).print(needed.remark(memory), highlight=False, soft_wrap=True)
    with running():
        if dry_run:
            emit(rehearse(loaded, given, console(as_json)), as_json)
        else:
            results = run(loaded, given, console(as_json), resume, overwrite)
            if results is not None:
                emit(results.to_dict(), as_json)
            leave()


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="run folder, or an earlier export")],
    to: Annotated[str, typer.Option(help="folder to write")],
    format: Annotated[str, typer.Option(help="merged, adapter, standalone, plain, onnx or torch-export")] = "merged",
    dtype: Annotated[str, typer.Option(help="dtype of the weights: fp32, bf16 or fp16")] = "fp32",
    shard_size: Annotated[str, typer.Option(help="largest size of a weight file, such as 500MB or 5GB")] = "5GB",
    push: Annotated[str | None, typer.Option(help="hub repository to push to; a new one is private")] = None,
    keep: Annotated[float | None, typer.Option(help="another keep of every stage than the one that it was trained with")] = None,
    as_json: Json = False,
) -> None:
    """Export a checkpoint and verify it in a clean process."""
    with user_input():
        from ..export.base import format_named
        from ..export.export import check
        from ..export.export import export as write
        from ..export.source import Settings
        from ..run_folder import RunFolder

        settings = Settings(dtype, shard_size)
        check(format_named(format), Path(to), settings)
        RunFolder.open(run)
    with running():
        record = write(run, to, format, settings, push, keep)
    emit(record, as_json)
    console(as_json).print(
        f"exported to {to}; reloaded in a clean process, the largest difference of the logits is {record['max_abs_logit_diff']:.1e}"
        + (f"; pushed: {record['pushed']}" if push else ""),
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def inspect(
    target: Annotated[str, typer.Argument(help="run folder, or folder of an export")],
    to: Annotated[Path, typer.Option(help="file to write: .html for text, .png for images")],
    overrides: Overrides = None,
    given: Annotated[
        str | None,
        typer.Option(
            "--input", help="a text or its file; of a vision-language model, the file of a picture and a question; default: held-out data"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the tokens that every stage of a trained model keeps."""
    with user_input():
        from ..build.plain_recipe import check_beside, check_overrides
        from ..evaluate import inspect_run
        from ..run_folder import RunFolder

        check_overrides(overrides or [])
        run = RunFolder.open(target)
        check_beside(overrides or [], run)
        kept = inspect_run(target, run.read_recipe(overrides or []), given, to)
    emit({"target": target, "written": str(to), "keep": dict(kept)}, as_json)
    shares = "  ".join(f"{name} {value:.3f}" for name, value in kept.items())
    console(as_json).print(f"written: {to}; achieved keep by stage: {shares}", highlight=False, soft_wrap=True)


COST_COLUMNS = ("stack", "layer", "stages", "tokens", "tokens in MLP", "MACs", "MACs dense", "of stages")


@app.command()
def cost(
    recipe: Annotated[str | None, typer.Argument(help="recipe; alternative: --model")] = None,
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option(help="folder of a trained or exported model")] = None,
    as_json: Json = False,
) -> None:
    """MACs, tokens and activation bytes by layer, computed from token counts."""
    from rich.table import Table

    with user_input():
        if (recipe is None) == (model is None):
            raise ValueError("name either a recipe or --model")
        from ..measure.tables import cost_of_model, cost_of_recipe

        result = cost_of_recipe(recipe, overrides or []) if recipe is not None else cost_of_model(str(model))
    emit(result, as_json)
    table = Table(title=f"one row: macs_ratio {result['macs_ratio']:.4f}, mean token fraction {result['mean_token_fraction']:.4f}")
    composite = any(row["stack"] for row in result["layers"])
    for column in COST_COLUMNS[not composite :]:
        table.add_column(column, justify="left" if column in ("stack", "stages") else "right")
    for row in result["layers"]:
        items = list(row.values())[not composite :]
        table.add_row(
            *(f"{item:,.1f}" if isinstance(item, float) else f"{item:,}" if isinstance(item, int) else item or "" for item in items)
        )
    out = console(as_json)
    out.print(table)
    out.print(
        f"embedding {result['embed_macs']:,} and head {result['head_macs']:,} MACs; activations of a training step about "
        f"{result['activation_bytes'] / 2**20:.2f} MiB a row, dense {result['dense_activation_bytes'] / 2**20:.2f} MiB",
        highlight=False,
    )
    if result["kv_bytes"]:
        tokens = result["tokens"]
        out.print(
            f"keys and values in a cache about {result['kv_bytes'] / tokens:,.0f} bytes a token, dense "
            f"{result['dense_kv_bytes'] / tokens:,.0f}, in float32",
            highlight=False,
        )


@app.command()
def env(as_json: Json = False) -> None:
    """Versions and devices, for a bug report."""
    from ..measure.environment import environment

    found = environment()
    emit(found, as_json)
    if not as_json:
        for key, value in found.items():
            typer.echo(f"{key}: {value}")
