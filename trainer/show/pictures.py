"""Pictures of kept tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data.rows import collate, good_rows
from ...modules.backbones.tiles import Tile
from ...modules.stage import stages_of
from ...modules.tokens.trace import Trace
from ..build.parts import RunParts
from ..metrics.kept_places import kept_cells
from ..tasks.base import task_named
from .figures import plain, save

PICTURED = 8


def kept_pixels(trace: Trace) -> Tensor:
    """(B, height, width) bool: pixels whose token remains, unmerged, after the last stage and before a restore.

    Args:
        trace: trace of a forward with images.
    """
    flow = trace.flow()
    assert flow.pixel_values is not None
    assert flow.grid is not None
    state = flow.shortest or flow.tokens
    # A token merged with others counts as dropped in a picture.
    alone = (state.source >= 0) & (state.size.gather(1, state.source.clamp(min=0)) == 1)
    patches = alone[:, flow.leading :]
    if flow.places is not None:
        # Patches hidden by the model's own mask count as dropped too.
        cells = flow.places[:, flow.leading :] - flow.leading
        patches = patches.new_zeros(len(patches), flow.grid[0] * flow.grid[1]).scatter(1, cells, patches)
    patches = patches.view(-1, *flow.grid)
    down, across = (side // cells for side, cells in zip(flow.pixel_values.shape[-2:], flow.grid, strict=True))
    return patches.repeat_interleave(down, 1).repeat_interleave(across, 2)


def overlays(trace: Trace, number: int) -> np.ndarray:
    """(number, height, width, 3) uint8: images with dropped patches darkened and tinted blue."""
    pixel_values = trace.flow().pixel_values
    assert pixel_values is not None
    return _darkened(pixel_values[:number], kept_pixels(trace)[:number])


def _darkened(pixel_values: Tensor, kept: Tensor) -> np.ndarray:
    """(n, height, width, 3) uint8: images (n, C, height or more, width or more), darkened where (n, height, width) ``kept`` is False."""
    shown = kept[..., None].cpu().numpy()
    image = pixel_values[:, :, : kept.shape[1], : kept.shape[2]].float().cpu()
    low, high = image.amin((1, 2, 3), keepdim=True), image.amax((1, 2, 3), keepdim=True)
    image = ((image - low) / (high - low).clamp(min=1e-6)).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    dropped = 0.3 * image + np.array([0.05, 0.08, 0.25])
    return (np.where(shown, image, dropped).clip(0, 1) * 255).astype(np.uint8)


def visual_overlays(trace: Trace, stacks: Mapping[str, str], tiles: Sequence[Tile]) -> dict[str, list[np.ndarray]]:
    """Pictures of the visual tokens that each stage of a vision-language model keeps.

    Args:
        trace: trace of a forward.
        stacks: stack of each stage, by the stage's name.
        tiles: the first pictures of all rows, in their order.

    Returns:
        (height, width, 3) uint8 of each picture by stage, dropped tokens darkened and tinted blue.
    """
    found = {}
    for stage, grids in kept_cells(trace, stacks, tiles).items():
        rows = trace.flow(stacks[stage]).pixel_values
        pictures = [tile.pixels for tile in tiles] if trace.flow(stacks[stage]).visual is not None or rows is None else rows[: len(tiles)]
        found[stage] = [
            _darkened(pixels[None], _spread(cells, pixels)[None])[0] for pixels, cells in zip(pictures, grids[: len(pictures)], strict=True)
        ]
    return found


def _spread(kept: Tensor, pixels: Tensor) -> Tensor:
    """(height, width) bool: the cell of a grid that each pixel of a (C, height, width) picture is in."""
    for side, cells in enumerate(kept.shape):
        length = pixels.shape[1 + side]
        kept = kept.index_select(side, torch.arange(length, device=kept.device) * cells // length)
    return kept


def save_kept_tokens(path: Path, rows: Sequence[tuple[str, Sequence[np.ndarray]]], titles: Sequence[str]) -> None:
    """Writes a PNG with a row of pictures for each arm and a column for each image.

    Args:
        path: file to write.
        rows: label and n (height, width, 3) uint8 pictures of each row.
        titles: title of each column.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = len(titles)
    figure = Figure(figsize=(1.4 * columns + 1.0, 1.5 * len(rows) + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, ((label, pictures), line) in enumerate(zip(rows, axes, strict=True)):
        for column, axis in enumerate(line):
            if column < len(pictures):
                axis.imshow(pictures[column], interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(plain(titles[column]), fontsize=9)
        line[0].set_ylabel(plain(label), fontsize=9)
    save(figure, [path], dpi=110)


def draw_arms(arms: Mapping[str, RunParts], path: Path) -> None:
    """Draws the same test images for every compressed arm, with its answers below if they are pictures; without such an arm, no file.

    Args:
        arms: parts by arm name, the recipe itself last.
        path: file to write.
    """
    compressed = {name: parts for name, parts in arms.items() if stages_of(parts.model)}
    if not compressed:
        return
    first = next(iter(arms.values()))
    task: Any = task_named(first.recipe.task)
    data = first.data
    batch = collate(good_rows(data.test, PICTURED))
    rows = []
    # The recipe itself first, its control arms below.
    for name, parts in reversed(compressed.items()):
        trace = Trace(seed=parts.recipe.seed, sample_ids=batch["sample_ids"])
        with torch.no_grad():
            out = task.forward(parts.model.eval(), batch, trace=trace)
        rows.append((name, overlays(trace, len(batch["sample_ids"]))))
        answer = task.answer(out, data)
        if answer is not None:
            rows.append(("", answer))
    truth = task.truth(batch, data)
    save_kept_tokens(path, rows if truth is None else [*rows, ("right", truth)], task.titles(batch, data))
