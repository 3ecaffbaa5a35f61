"""The model card: training, cost, quality and loading of the model. Values that were not measured are marked as such."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ..build.build import cost_model
from ..tasks.base import task_named
from .base import Format, auto_class, base_name, compressed
from .source import ExportSource, Settings

_MARKUP = re.compile(r"([\\`*\[\]|])")
# transformers' pipeline for each Auto class that it can run: its segmentation stretches a map of the cropped centre over the whole image,
# and it has none for pretraining.
_PIPELINES = {
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForCausalLM": "text-generation",
}


def facts(source: ExportSource) -> dict[str, Any]:
    """Facts about the model before a format changes it: costs from its token counts, the other values from the run's report."""
    model, report = source.model, source.report or {}
    task = task_named(source.recipe.task)
    costs = cost_model(model, size=task.size(source.recipe))
    cost = None if costs is None else costs()
    is_compressed = compressed(model)
    quality, keep, step_time, about_run = (_block(report, key) for key in ("quality", "keep", "step_time", "versions"))
    achieved = _block(keep, "achieved")
    return {
        "task": source.recipe.task,
        "architecture": base_name(model),
        "base_model": source.recipe.model.name,
        "compressed": is_compressed,
        "metric": task.metric,
        "quality": _number(quality, "compressed" if is_compressed else "dense"),
        "dense_quality": _number(quality, "dense"),
        "split": quality.get("split"),
        "keep": {name: {"requested": value, "achieved": _number(achieved, name)} for name, value in (cost.keep if cost else {}).items()},
        "macs_ratio": {"requested": cost.macs_ratio if cost else None, "achieved": _number(report, "macs_ratio")},
        "step_speedup": _number(step_time, "speedup"),
        "cores": about_run.get("cores"),
        "grey": getattr(model.config, "num_channels", None) == 1,
    }


def _block(report: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A block of a report; empty if it is missing or of another type, because a report may come from anywhere."""
    block = report.get(key)
    return block if isinstance(block, Mapping) else {}


def _number(report: Mapping[str, Any], key: str) -> float | None:
    value = report.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def write_card(source: ExportSource, form: type[Format], settings: Settings, about: Mapping[str, Any], usage: str, folder: Path) -> None:
    """Writes ``README.md``.

    Args:
        source: the exported model.
        form: format of the export.
        settings: dtype and shard size of the export.
        about: result of ``facts``.
        usage: Python that loads the export, from ``Format.usage``.
        folder: folder of the export.
    """
    kind = form.__module__.rpartition(".")[2].replace("_", "-")
    base = about["base_model"]
    header = ModelCardData(
        library_name="transformers",
        tags=["laconic", "token-compression"],
        pipeline_tag=_PIPELINES.get(auto_class(source.model)),
        # A local folder means nothing to readers of the card.
        base_model=base if base and not Path(base).exists() else None,
    )
    title = f"{about['architecture']}, {'compressed by Laconic' if about['compressed'] else 'trained by Laconic'}"
    lines = [
        "---",
        header.to_yaml(),
        "---",
        "",
        f"# {title}",
        "",
        _words(about),
        "",
        "| | |",
        "|---|---|",
        *_rows(about, kind, settings),
        "",
    ]
    lines += ["## Loading", "", "```python", f'folder = "."  # or the name of the repository\n{usage}', "```", "", *_notes(kind, about), ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _words(about: Mapping[str, Any]) -> str:
    if not about["compressed"]:
        return "Every layer processes every token."
    return (
        "It drops or merges tokens on its way through the layers. *Keep* is the share of tokens that a stage keeps; *MACs* are those "
        "of the whole forward, routers included, ÷ those of the dense model."
    )


def _rows(about: Mapping[str, Any], kind: str, settings: Settings) -> list[str]:
    rows = [("task", about["task"].replace("_", " "))]
    quality = "not measured" if about["quality"] is None else f"{about['quality']:.4f} on the {about['split']} split"
    rows.append((about["metric"].replace("_", " "), quality))
    if about["compressed"] and about["dense_quality"] is not None:
        rows.append((f"{about['metric'].replace('_', ' ')} of the dense control", f"{about['dense_quality']:.4f}"))
    for name, keep in about["keep"].items():
        rows.append((f"keep of stage {name}", _pair(keep)))
    if about["compressed"]:
        rows.append(("macs_ratio (MACs ÷ dense)", _pair(about["macs_ratio"])))
        speed = about["step_speedup"]
        rows.append(("training step", "not measured" if speed is None else f"{speed:.2f}× as fast as dense, on {about['cores']} cores"))
    rows.append(("format", f"{kind}, {settings.dtype}"))
    return [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows]


def _cell(text: str) -> str:
    """A text in one cell of a table, without a meaning in Markdown or HTML."""
    return html.escape(_MARKUP.sub(r"\\\1", " ".join(text.split())), quote=False)


def _pair(values: Mapping[str, float | None]) -> str:
    achieved = values["achieved"]
    assert values["requested"] is not None
    return f"{values['requested']:.4f} requested, {'not measured' if achieved is None else f'{achieved:.4f} achieved'}"


def _notes(kind: str, about: Mapping[str, Any]) -> list[str]:
    notes = ["`export.json` has sizes and hashes of all files, and the largest difference between the export's and the model's answers."]
    if about["grey"]:
        notes.append(
            "The model takes grey images. The image processor of this folder converts to grey: "
            "`AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)`, which a pipeline takes as `image_processor`."
        )
    if kind == "standalone":
        notes.append("Without `trust_remote_code=True` transformers builds the dense class and reports the stages' weights as unexpected.")
    return notes
