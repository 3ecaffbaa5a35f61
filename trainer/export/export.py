"""Writing a trained model in a format, seeing in a clean process that it answers as before, and recording that."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import RecipeError
from ..measure.report import versions, write_json
from ..run_folder import RunFolder
from .base import Format, format_named
from .card import facts, write_card
from .preprocessing import save_preprocessing
from .push import push as push_to_hub
from .source import DTYPES, NEW_TOKENS, ExportSource, Settings, answers
from .verify import clean_answers

RECORD = "export.json"


def export(run: str, to: str, format: str = "merged", settings: Settings | None = None, push: str | None = None) -> dict[str, Any]:
    """Writes and verifies an export; returns what ``export.json`` holds.

    Args:
        run: run folder, or an earlier export that Laconic loads.
        to: folder to write; must not exist yet, or be empty.
        format: one of ``base.names()``.
        settings: dtype and shard size.
        push: repository on the hub that the export goes to; None leaves it here.

    Raises:
        RecipeError: the run has no model, the model cannot be written so, or ``to`` is taken.
        RuntimeError: the export answers otherwise in a clean process; the folder is left for a look, without ``export.json``.
    """
    settings = settings or Settings()
    form, folder = format_named(format), Path(to)
    check(form, folder, settings)
    source = ExportSource.open(run)
    try:
        of_run = answers(source.model, source.batches())
    except ValueError as error:
        # A causal model that was trained with stages that look ahead cannot be deployed.
        raise RecipeError(f"{run} cannot be exported: {error}") from None
    form.check(source)
    about, usage = facts(source), form.usage(source.model)
    source.model.to(DTYPES[settings.dtype])  # type: ignore[arg-type]
    batches = source.batches()
    cast = answers(source.model, batches)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        form.write(source, settings, folder)
    except RecipeError:
        # There was nothing in it before.
        shutil.rmtree(folder)
        raise
    save_preprocessing(source, folder)
    if form.hugging_face:
        shutil.copy(source.run.recipe, RunFolder(folder).recipe)
    found = clean_answers(form, folder, batches, NEW_TOKENS if "generated" in cast[0] else 0)
    added = _difference(found, cast)
    if not added <= form.tolerance:
        raise RuntimeError(f"the export in {folder} answers otherwise when it is loaded: its logits are off by {added:.2e}")
    same = _same_generation(found, cast)
    if same is False:
        raise RuntimeError(f"the export in {folder} generates otherwise when it is loaded, though its logits are off by {added:.2e} only")
    write_card(source, form, settings, about, usage, folder)
    record = {
        "format": format,
        "dtype": settings.dtype,
        "task": source.recipe.task,
        "architecture": about["architecture"],
        # Against the run's own float32 answers, so with what the dtype does; and what writing and loading alone added.
        "max_abs_logit_diff": _difference(found, of_run),
        "max_abs_reload_diff": added,
        "generation_equal": same,
        "batch_sizes": [len(next(iter(batch.values()))) for batch in batches],
        "keep": about["keep"],
        "macs_ratio": about["macs_ratio"],
        "files": {str(path.relative_to(folder)): _file(path) for path in sorted(folder.rglob("*")) if path.is_file()},
        "versions": versions(),
    }
    write_json(folder / RECORD, record)
    _note_in_report(source, record)
    return record if push is None else record | {"pushed": push_to_hub(folder, push)}


def check(form: type[Format], folder: Path, settings: Settings) -> None:
    """Raises RecipeError for what is wrong whatever the model is."""
    name = form.__module__.rpartition(".")[2].replace("_", "-")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise RecipeError(f"--to {folder}: the folder is not empty; give a new one")
    if settings.dtype not in form.dtypes:
        raise RecipeError(
            f"--dtype {settings.dtype}: format {name} is written in {', '.join(form.dtypes)}; what runs it has tools of its own for less"
        )
    form.requirements()


def _difference(found: Sequence[dict[str, Tensor]], wanted: Sequence[dict[str, Tensor]]) -> float:
    """Largest absolute difference of the logits; infinite where they are of another shape."""
    pairs = [(one["logits"], other["logits"]) for one, other in zip(found, wanted, strict=True)]
    if any(one.shape != other.shape for one, other in pairs):
        return float("inf")
    return max(float((one - other).abs().max()) for one, other in pairs)


def _same_generation(found: Sequence[dict[str, Tensor]], wanted: Sequence[dict[str, Tensor]]) -> bool | None:
    """Whether greedy generation gives the same tokens; None where one of the two generates nothing."""
    pairs = [
        (one["generated"], other["generated"])
        for one, other in zip(found, wanted, strict=True)
        if "generated" in one and "generated" in other
    ]
    return all(one.equal(other) for one, other in pairs) if pairs else None


def _file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _note_in_report(source: ExportSource, record: dict[str, Any]) -> None:
    report = source.run.read_report()
    if report is not None:
        report["export"] = {key: record[key] for key in ("format", "dtype", "max_abs_logit_diff")}
        write_json(source.run.report, report)
