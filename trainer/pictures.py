"""Pictures of kept tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..modules.state import Trace


def kept_pixels(trace: Trace, stage: str | None = None) -> Tensor:
    """(B, height, width) bool: pixels whose token is left after a stage (None: after the last).

    Args:
        trace: of an evaluation forward with images.
        stage: name of the stage.
    """
    assert trace.pixel_values is not None
    assert trace.grid is not None
    assert trace.state is not None
    routing = trace.routings[stage] if stage is not None else list(trace.routings.values())[-1]
    rows, originals = routing.state.source.shape
    kept = torch.zeros(rows, originals, dtype=torch.bool, device=routing.scores.device)
    kept.scatter_(1, routing.state.position, routing.kept_mask)
    patches = kept[:, routing.state.protected_per_row :].view(rows, *trace.grid)
    height, width = trace.pixel_values.shape[-2:]
    return patches.repeat_interleave(height // trace.grid[0], 1).repeat_interleave(width // trace.grid[1], 2)


def overlays(trace: Trace, number: int) -> np.ndarray:
    """(number, height, width, 3) uint8: images with dropped patches darkened and tinted blue."""
    assert trace.pixel_values is not None
    image = trace.pixel_values[:number].float().cpu()
    low, high = image.amin((1, 2, 3), keepdim=True), image.amax((1, 2, 3), keepdim=True)
    image = ((image - low) / (high - low).clamp(min=1e-6)).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    kept = kept_pixels(trace)[:number, :, :, None].cpu().numpy()
    dropped = 0.3 * image + np.array([0.05, 0.08, 0.25])
    return (np.where(kept, image, dropped).clip(0, 1) * 255).astype(np.uint8)


def save_kept_tokens(path: Path, rows: Sequence[tuple[str, np.ndarray]], titles: Sequence[str]) -> None:
    """A PNG: a row of pictures for each arm, a column for each image.

    Args:
        path: of the file.
        rows: label and (n, height, width, 3) uint8 pictures.
        titles: one a column.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = len(titles)
    figure = Figure(figsize=(1.4 * columns + 1.0, 1.5 * len(rows) + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for (label, pictures), line in zip(rows, axes, strict=True):
        for column, axis in enumerate(line):
            axis.imshow(pictures[column], interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if line is axes[0]:
                axis.set_title(titles[column], fontsize=9)
        line[0].set_ylabel(label, fontsize=9)
    figure.savefig(path, dpi=110)
