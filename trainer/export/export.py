"""Writes a trained model in a format, verifies its answers in a clean process, and records the result."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...modules.checkpoints.whole_files import hashes_of, whole_folder, write_json
from ..errors import RecipeError
from ..measure.report import versions
from ..run_folder import EXPORTED, RunFolder
from .base import Format, format_named
from .card import facts, write_card
from .preprocessing import save_preprocessing
from .push import push as push_to_hub
from .source import DTYPES, NEW_TOKENS, ExportSource, Settings, answers
from .verify import clean_answers


def export(
    run: str, to: str, format: str = "merged", settings: Settings | None = None, push: str | None = None, keep: float | None = None
) -> dict[str, Any]:
    """Writes and verifies an export; returns the content of ``export.json``.

    Args:
        run: run folder, or an earlier export that Laconic can load.
        to: folder to write; new or empty.
        format: one of ``base.names()``.
        settings: dtype and shard size.
        push: hub repository to push to; None does not push.
        keep: another keep for all stages; None leaves them their own.

    Raises:
        RecipeError: the run has no model, the format does not support the model, or ``to`` is not empty.
        RuntimeError: the export's answers differ in a clean process; nothing is written.
    """
    settings = settings or Settings()
    form, folder = format_named(format), Path(to)
    check(form, folder, settings)
    source = ExportSource.open(run, whole=not form.hugging_face, keep=keep)
    reference = form.reference(source)
    try:
        of_run = answers(reference, source.batches())
    except ValueError as error:
        # A causal model with non-causal stages cannot be deployed.
        raise RecipeError(f"{run} cannot be exported: {error}") from None
    form.check(source)
    about, usage = facts(source), form.usage(source.model)
    source.model.to(DTYPES[settings.dtype])  # type: ignore[arg-type]
    batches = source.batches()
    cast = answers(reference, batches)
    allowed = _allowed(form, cast, settings)
    with whole_folder(folder) as partial:
        form.write(source, settings, partial)
        save_preprocessing(source, partial, form.with_code)
        if form.hugging_face:
            shutil.copy(source.run.recipe, RunFolder(partial).recipe)
        found = clean_answers(form, partial, batches, NEW_TOKENS if "generated" in cast[0] else 0)
        added, same = _difference(found, cast), _same_generation(found, cast)
        if not added <= allowed:
            raise RuntimeError(
                f"{folder} was not written: the reloaded export gives other answers, its logits differ by {added:.2e}, allowed {allowed:.0e}"
            )
        if same is False:
            raise RuntimeError(
                f"{folder} was not written: the reloaded export generates other tokens, although its logits differ by {added:.2e} only"
            )
        write_card(source, form, settings, about, usage, partial)
        record = {
            "format": format,
            "dtype": settings.dtype,
            "task": source.recipe.task,
            "architecture": about["architecture"],
            # Against the run's float32 answers, so the dtype's error is included; then the difference of writing and loading alone.
            "max_abs_logit_diff": _difference(found, of_run),
            "max_abs_reload_diff": added,
            "generation_equal": same,
            "batch_sizes": [len(next(iter(batch.values()))) for batch in batches],
            "input_shapes": {name: list(value.shape[1:]) for name, value in batches[0].items()},
            "keep": about["keep"],
            "macs_ratio": about["macs_ratio"],
            "files": hashes_of(partial),
            "versions": versions(),
        }
        write_json(partial / EXPORTED, record)
    if keep is None:
        # The report is of the stages' own keeps.
        _note_in_report(source, record)
    return record if push is None else record | {"pushed": push_to_hub(folder, push)}


def check(form: type[Format], folder: Path, settings: Settings) -> None:
    """Raises RecipeError for errors that do not depend on the model."""
    name = form.__module__.rpartition(".")[2].replace("_", "-")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise RecipeError(f"--to {folder}: the folder is not empty; name a new one")
    if settings.dtype not in form.dtypes:
        raise RecipeError(
            f"--dtype {settings.dtype}: format {name} supports {', '.join(form.dtypes)}; its runtimes have their own tools for smaller dtypes"
        )
    form.requirements()


def _difference(found: Sequence[dict[str, Tensor]], expected: Sequence[dict[str, Tensor]]) -> float:
    """Largest absolute difference of the logits; infinity if shapes differ."""
    pairs = [(one["logits"], other["logits"]) for one, other in zip(found, expected, strict=True)]
    if any(one.shape != other.shape for one, other in pairs):
        return float("inf")
    return max(float((one - other).abs().max()) for one, other in pairs)


def _allowed(form: type[Format], expected: Sequence[dict[str, Tensor]], settings: Settings) -> float:
    """Largest allowed difference of the logits: relative to their size, and not below the precision of the weights."""
    largest = max(float(answer["logits"].abs().max()) for answer in expected)
    # Small logits are differences of larger values, whose rounding they have.
    return max(form.tolerance, torch.finfo(DTYPES[settings.dtype]).eps) * max(largest, 0.1)


def _same_generation(found: Sequence[dict[str, Tensor]], expected: Sequence[dict[str, Tensor]]) -> bool | None:
    """True if greedy generation gives the same tokens; None if one of the two generates nothing."""
    pairs = [
        (one["generated"], other["generated"])
        for one, other in zip(found, expected, strict=True)
        if "generated" in one and "generated" in other
    ]
    return all(one.equal(other) for one, other in pairs) if pairs else None


def _note_in_report(source: ExportSource, record: dict[str, Any]) -> None:
    report = source.run.read_report()
    if report is not None:
        report["export"] = {key: record[key] for key in ("format", "dtype", "max_abs_logit_diff")}
        write_json(source.run.report, report)
