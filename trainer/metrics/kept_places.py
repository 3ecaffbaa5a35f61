"""Where kept tokens lie, in pictures or in rows of text: a choice that follows places instead of content shows here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...modules.backbones.tiles import Tile
from ...modules.tokens.trace import Trace

# Equal bands that the height and the width of a picture, or the length of a text, are divided into.
BANDS = 4


def kept_cells(trace: Trace, stacks: Mapping[str, str], tiles: Iterable[Tile] = ()) -> dict[str, list[Tensor]]:
    """The grids of visual tokens that each stage keeps, or processes in a bypass, of those that it may touch.

    Args:
        trace: trace of a forward.
        stacks: stack of each stage, by the stage's name.
        tiles: the pictures of all rows, in their order; for stages in a language model, and in towers that read pictures of any size. If they
            are the first ones only, so is the result.

    Returns:
        By stage, (rows, columns) bool of each picture; a stage of which places are unknown is left out.
    """
    tiles, found = list(tiles), dict[str, list[Tensor]]()
    for stage, routing in trace.routings.items():
        flow, position = trace.flow(stacks[stage]), routing.state.position
        kept = routing.decision.kept_mask(routing.state.tokens)
        if routing.state.valid is not None:
            kept = kept & routing.state.valid
        if flow.visual is not None:
            visual = _placed(kept, position, flow.visual.shape[1])[flow.visual]
            parts = visual[: sum(tile.tokens for tile in tiles)].split([tile.tokens for tile in tiles])
            found[stage] = [tile.cells(part) for tile, part in zip(tiles, parts, strict=True)]
        elif flow.grid is not None and (flow.pixel_values is not None or tiles):
            # Rows are what the tower reads at once, or what it has left of that for the projector.
            place = position if flow.places is None else flow.places.gather(1, position)
            placed = _placed(kept & routing.routable, place, flow.leading + flow.grid[0] * flow.grid[1])[:, flow.leading :]
            grids = placed.view(-1, *flow.grid)
            if flow.pixel_values is None:
                # Pictures of any size lie in the upper left corner of the largest one's grid.
                sizes = [(tile.rows * tile.joined, tile.columns * tile.joined) for tile in tiles]
                found[stage] = [grid[:rows, :columns] for grid, (rows, columns) in zip(grids, sizes, strict=False)]
            else:
                found[stage] = list(grids)
    return found


def kept_parts(trace: Trace, lengths: Tensor) -> dict[str, list[Tensor]]:
    """The tokens of each row of text that each stage keeps, or processes in a bypass, protected ones among them.

    Args:
        trace: trace of a forward.
        lengths: (B,) int64 tokens of each row, without padding, which is at the end.

    Returns:
        By stage, (tokens,) bool of each row.
    """
    found, tokens = dict[str, list[Tensor]](), lengths.tolist()
    for stage, routing in trace.routings.items():
        state = routing.state
        kept = routing.decision.kept_mask(state.tokens)
        placed = _placed(kept if state.valid is None else kept & state.valid, state.position, state.source.shape[1])
        if state.batch_rows is not None:
            # Rows without a token for a layer are left out of it.
            placed = placed.new_zeros(len(lengths), placed.shape[1]).index_copy(0, state.batch_rows, placed)
        found[stage] = [row[:length] for row, length in zip(placed, tokens, strict=True)]
    return found


def _placed(kept: Tensor, place: Tensor, number: int) -> Tensor:
    """(B, number) bool: (B, M) flags at their places. Padding may have any place, and adding keeps it from overwriting a kept token."""
    return torch.zeros(len(kept), number, dtype=torch.long, device=kept.device).scatter_add(1, place, kept.long()) > 0


@dataclass
class KeptPlaces:
    """Position bias of each stage: how far the rows and columns of what it keeps, or its places in a text, are from those of all tokens.

    Attributes:
        kept: by stage, (2, BANDS) kept tokens by band of the height and of the width, top and left first; (1, BANDS) by band of the length
            of a text, its start first.
        present: likewise, all tokens of the pictures or texts.
    """

    kept: dict[str, Tensor] = field(default_factory=dict)
    present: dict[str, Tensor] = field(default_factory=dict)

    def add(self, cells: Mapping[str, list[Tensor]]) -> None:
        """Adds the result of ``kept_cells`` or ``kept_parts``."""
        for stage, grids in cells.items():
            by_size: dict[torch.Size, list[Tensor]] = {}
            for grid in grids:
                by_size.setdefault(grid.shape, []).append(grid)
            for grids_of_size in by_size.values():
                counts = torch.stack(grids_of_size).sum(0).double()
                self._add(stage, _bands(counts), _bands(torch.full_like(counts, len(grids_of_size))))

    def _add(self, stage: str, kept: Tensor, present: Tensor) -> None:
        self.kept[stage] = self.kept.get(stage, 0) + kept
        self.present[stage] = self.present.get(stage, 0) + present

    def merge(self, other: KeptPlaces) -> None:
        """Adds the counts of another rank."""
        for stage, kept in other.kept.items():
            self._add(stage, kept, other.present[stage])

    @property
    def bias(self) -> dict[str, dict[str, float | list[float]]]:
        """By stage, ``rows`` and ``columns``: total variation distance, 0 to 1, between the places of kept tokens and those of all tokens, 0
        for a choice that prefers no place; and ``by_row`` and ``by_column``: the share of each band in what is kept. Of text ``length`` and
        ``by_part`` in their place."""
        found: dict[str, dict[str, float | list[float]]] = {}
        for stage, kept in self.kept.items():
            shares = kept / kept.sum(1, keepdim=True).clamp(min=1)
            distance = 0.5 * (shares - self.present[stage] / self.present[stage].sum(1, keepdim=True)).abs().sum(1)
            names = (("rows", "by_row"), ("columns", "by_column")) if len(kept) == 2 else (("length", "by_part"),)
            far = distance.tolist() if kept.sum() else [0.0] * len(kept)
            found[stage] = {name: value for (name, _), value in zip(names, far, strict=True)}
            found[stage] |= {name: band.tolist() for (_, name), band in zip(names, shares, strict=True)}
        return found


def _bands(counts: Tensor) -> Tensor:
    """(2, BANDS): sums of a (rows, columns) grid by band of its height and of its width; (1, BANDS) of a row of (tokens,). A line belongs to
    the band of its middle."""
    sums = []
    for lines in (counts.sum(1).cpu(), counts.sum(0).cpu()) if counts.ndim == 2 else (counts.cpu(),):
        band = (2 * torch.arange(len(lines)) + 1) * BANDS // (2 * len(lines))
        sums.append(torch.zeros(BANDS, dtype=lines.dtype).index_add(0, band, lines))
    return torch.stack(sums)
