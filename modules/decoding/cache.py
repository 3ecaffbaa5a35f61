"""RoutedCache: keys and values of a causal model whose layers process different tokens of a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

# A layer's storage grows by so many tokens at a time, and is tidied when so many lie outside its window.
_BLOCK = 64


class RoutedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, each row with as many as it has processed.

    A slot is a token's place in the whole sequence, padding included. As long as every row has processed every token, the slots
    are ``start`` and those that follow, and nothing is noted of them.

    Args:
        window: of a sliding layer, how many slots back a query looks; None looks at all.

    Attributes:
        seen: tokens that came by, processed or not: what transformers calls the sequence length.
        start: first slot that is stored, while rows are alike.
        slots: (B, S) int64 slot of each stored key, ascending in a row, -1 behind its last; None while rows are alike. It has more
            columns than any row has keys.
        lengths: keys of each row; None while rows are alike.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, window: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.window = window
        self.is_sliding = window is not None
        self.record_past = False
        self._clear()

    def _clear(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.is_initialized = False
        self.seen, self.start = 0, 0
        self.slots: Tensor | None = None
        self.lengths: list[int] | None = None

    @property
    def stored(self) -> int:
        """Keys of the row that has most."""
        if self.lengths is not None:
            return max(self.lengths)
        return 0 if self.keys is None else self.keys.shape[2]

    def tokens_stored(self) -> int:
        """Keys of all rows together, filler not counted."""
        if self.lengths is not None:
            return sum(self.lengths)
        return 0 if self.keys is None else self.keys.shape[0] * self.keys.shape[2]

    def bytes_stored(self) -> int:
        """Bytes of the keys and values of all rows, filler not counted."""
        if self.keys is None or self.values is None:
            return 0
        each = sum(part.shape[1] * part.shape[3] * part.element_size() for part in (self.keys, self.values))
        return self.tokens_stored() * each

    # What transformers asks of a layer.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise RuntimeError("a RoutedCache was handed to a layer that is not compressed: give it to the compressed model it was made for")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def activate_past_recording(self) -> None:
        """Keeps what leaves the window, so that ``crop`` can go back."""
        self.record_past = True

    def reset(self) -> None:
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last ``-tokens_to_remove`` tokens that came by. Raises RuntimeError where what they had pushed out is gone."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the number of tokens to forget as a negative integer")
        if tokens_to_remove == 0 or self.keys is None or self.values is None:
            self.seen += tokens_to_remove
            return
        if self.window is not None and not self.record_past and self.seen >= self.window:
            raise RuntimeError("crop after the sliding window is full: call activate_past_recording() on the cache before it fills")
        self.seen += tokens_to_remove
        if self.slots is None:
            self.keys, self.values = (part[:, :, : self.seen - self.start] for part in (self.keys, self.values))
            return
        stays = (self.slots >= 0) & (self.slots < self.seen)
        self.slots, self.lengths = self.slots.masked_fill(~stays, -1), stays.sum(-1).tolist()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for name in ("keys", "values", "slots"):
            part = getattr(self, name)
            if part is not None:
                setattr(self, name, part.repeat_interleave(repeats, dim=0))
        if self.lengths is not None:
            self.lengths = [length for length in self.lengths for _ in range(repeats)]

    def batch_select_indices(self, indices: Tensor) -> None:
        for name in ("keys", "values", "slots"):
            part = getattr(self, name)
            if part is not None:
                setattr(self, name, part[indices.to(part.device)])
        if self.lengths is not None:
            self.lengths = torch.tensor(self.lengths)[indices.cpu()].tolist()

    # What a compressed layer does with it.

    def begin_forward(self, rows: int, tokens: int) -> LayerEntry:
        """Called once a forward, before any of its ``tokens`` of each row is processed."""
        before, self.seen = self.seen, self.seen + tokens
        return LayerEntry(self, rows, before)

    def extend(self, batch: int, slots: Tensor, valid: Tensor | None, rows: Tensor | None = None) -> LayerView:
        """Makes room for new tokens.

        Args:
            batch: rows that there are.
            slots: (R, K) their slots, ascending in a row.
            valid: (R, K) bool, False for filler, which gets no room; None without any.
            rows: (R,) int64, the rows that they are of; None where they are of every row.
        """
        if self.slots is None or self.lengths is None:
            before = self.stored
            self.slots = torch.arange(self.start, self.start + before, device=slots.device).repeat(batch, 1)
            self.lengths = [before] * batch
        self._forget(slots)
        of = range(batch) if rows is None else rows.tolist()
        starts = [self.lengths[row] for row in of]
        added = [slots.shape[1]] * len(starts) if valid is None else valid.sum(-1).tolist()
        for row, number in zip(of, added, strict=True):
            self.lengths[row] += number
        width, even = max(self.lengths[row] for row in of), valid is None and min(starts) == max(starts)
        self.slots = _with_room(self.slots, max(self.lengths), -1, 1)
        columns: Tensor | slice = slice(starts[0], width)
        if not even or rows is not None:
            taken = torch.ones_like(slots) if valid is None else valid.long()
            columns = torch.tensor(starts, device=slots.device)[:, None] + taken.cumsum(-1) - 1
        if valid is not None:
            # The last column takes the writes of filler; nothing reads it.
            columns, slots = columns.masked_fill(~valid, self.slots.shape[1] - 1), slots.masked_fill(~valid, -1)  # type: ignore[union-attr]
        _store(self.slots, rows, columns, slots)
        return LayerView(self, self.start, _of_rows(self.slots[:, :width], rows), columns, rows, even)

    def _forget(self, arriving: Tensor) -> None:
        """Tidies away what no query can see any more, once there is enough of it."""
        if self.window is None or self.record_past or self.keys is None or self.values is None or self.stored < self.window + _BLOCK:
            return
        assert self.slots is not None
        stays = self.slots > arriving.amin() - self.window
        order = (~stays).byte().sort(dim=-1, stable=True).indices
        self.lengths = stays.sum(-1).tolist()
        order = order[:, : max(self.lengths)]
        self.slots = self.slots.masked_fill(~stays, -1).gather(1, order)
        at = order[:, None, :, None]
        self.keys, self.values = (part.gather(2, at.expand(-1, part.shape[1], -1, part.shape[3])) for part in (self.keys, self.values))

    def append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Stores (B, H, K, D) of every row, and gives all there are; what leaves the window goes afterwards."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys = key_states if self.keys is None else torch.cat([self.keys, key_states], 2)
        values = value_states if self.values is None else torch.cat([self.values, value_states], 2)
        first = 0 if self.window is None or self.record_past else max(0, self.seen - self.window + 1 - self.start)
        self.keys, self.values, self.start = keys[:, :, first:], values[:, :, first:], self.start + first
        return keys, values

    def write(self, key_states: Tensor, value_states: Tensor, view: LayerView) -> tuple[Tensor, Tensor]:
        """Stores (R, H, K, D) where a view of ``extend`` says, and gives (R, H, S, D), all that there are of its rows."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert view.slots is not None
        width = view.slots.shape[1]
        self.keys, self.values = (self._written(old, new, view) for old, new in ((self.keys, key_states), (self.values, value_states)))
        return _of_rows(self.keys[:, :, :width], view.rows), _of_rows(self.values[:, :, :width], view.rows)

    def _written(self, old: Tensor | None, new: Tensor, view: LayerView) -> Tensor:
        assert self.slots is not None
        batch, columns = self.slots.shape
        table = new.new_zeros(batch, new.shape[1], 0, new.shape[3]) if old is None else old
        table = _with_room(table, columns - 1, 0, 2)
        _store(table.transpose(1, 2), view.rows, view.columns, new.transpose(1, 2))
        return table


def _with_room(table: Tensor, width: int, filler: int, dim: int) -> Tensor:
    """A table that may be written to, with more than ``width`` columns along ``dim``."""
    if table.shape[dim] <= width:
        shape = list(table.shape)
        shape[dim] = (width // _BLOCK + 1) * _BLOCK - table.shape[dim]
        return torch.cat([table, table.new_full(shape, filler)], dim)
    if torch.is_grad_enabled() or table.requires_grad or (table.is_inference() and not torch.is_inference_mode_enabled()):
        # Where somebody wants gradients, what earlier forwards read must stay as it was; and torch guards what it made for inference.
        return table.clone()
    return table


def _store(table: Tensor, rows: Tensor | None, columns: Tensor | slice, new: Tensor) -> None:
    """Writes (R, K, …) into some rows of a (B, S, …) table, or into all."""
    if isinstance(columns, slice):
        table[:, columns] = new
    else:
        of = torch.arange(table.shape[0], device=table.device) if rows is None else rows
        table[of[:, None], columns] = new


def _of_rows(table: Tensor, rows: Tensor | None) -> Tensor:
    """What a table holds of some rows, or of all."""
    return table if rows is None else table.index_select(0, rows)


@dataclass(frozen=True)
class LayerEntry:
    """One layer's part of a cache during one forward.

    Attributes:
        layer: what is stored.
        rows: of the forward.
        before: tokens seen before it.
    """

    layer: RoutedLayer
    rows: int
    before: int

    def everything(self, position: Tensor) -> LayerView:
        """All tokens of the forward, at (B, N) positions, are about to be processed, in every row."""
        layer = self.layer
        if layer.slots is None and layer.start + layer.stored == self.before:
            return LayerView(layer, layer.start, None, slice(0), None, even=True)
        return self.chosen(position, None)

    def chosen(self, position: Tensor, valid: Tensor | None, rows: Tensor | None = None) -> LayerView:
        """The tokens at (R, K) positions of the forward are about to be processed, but for filler: of some rows, or of all."""
        return self.layer.extend(self.rows, position + self.before, valid, rows)


@dataclass(frozen=True)
class LayerView:
    """What an attention module is handed as its cache: it knows which tokens the keys belong to.

    Attributes:
        layer: what is stored.
        start: first slot stored where every row has all of them.
        slots: (R, S) int64 of the keys that attention will see, -1 for filler; None where every row has all from ``start``.
        columns: of the table of slots, where the new ones go: (R, K) int64, or a slice where that is the same for every row.
        rows: (R,) int64, the rows that are processed; None for all.
        even: the rows have the same number of keys, and no new one is filler.
    """

    layer: RoutedLayer
    start: int
    slots: Tensor | None
    columns: Tensor | slice
    rows: Tensor | None
    even: bool

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores the keys and values (R, H, K, D) of the tokens that were announced, and gives all (R, H, S, D)."""
        if self.slots is None:
            return self.layer.append(key_states, value_states)
        return self.layer.write(key_states, value_states, self)


class RoutedCache(Cache):
    """The cache of a compressed causal model. ``generate`` and a forward with ``use_cache`` make one by themselves.

    Args:
        config: of the model.

    Attributes:
        carry: (B, …) what stages remember of each row's earlier tokens, by name.
    """

    layers: list[RoutedLayer]  # type: ignore[assignment]

    def __init__(self, config: PretrainedConfig) -> None:
        text: Any = config.get_text_config(decoder=True)
        window = getattr(text, "sliding_window", None)
        kinds = getattr(text, "layer_types", None)
        if kinds is None:
            kinds = ["sliding_attention" if window else "full_attention"] * text.num_hidden_layers
        super().__init__(layers=[RoutedLayer(window if kind == "sliding_attention" else None) for kind in kinds])
        self.carry: dict[str, Tensor] = {}

    @property
    def is_croppable(self) -> bool:
        return not self.carry and bool(super().is_croppable)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last ``-tokens_to_remove`` tokens. Raises RuntimeError where stages made chunks of them, which stay made."""
        if self.carry and tokens_to_remove != 0:
            raise RuntimeError(
                f"crop({tokens_to_remove}): this model makes chunks, and its cache knows the last token of each row alone, not those before: "
                "make a new RoutedCache and fill it with the shorter text; generate without an assistant model or prompt lookup"
            )
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()  # type: ignore[no-untyped-call]
        self.carry.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._carry_rows(lambda part: part[beam_idx.to(part.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._carry_rows(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._carry_rows(lambda part: part[indices.to(part.device)])

    def _carry_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        for name, part in self.carry.items():
            self.carry[name] = change(part)

    def bytes_stored(self) -> int:
        """Bytes of all keys and values, filler not counted."""
        return sum(layer.bytes_stored() for layer in self.layers)

    def tokens_stored(self) -> list[int]:
        """Keys of each layer, over all rows."""
        return [layer.tokens_stored() for layer in self.layers]


def routed_cache(config: Any, given: Any) -> RoutedCache:
    """The cache for a forward that wants one.

    Args:
        config: of the model.
        given: what the caller passed; None or an empty DynamicCache is replaced.

    Raises:
        ValueError: it holds tokens that a compressed model cannot tell apart, or is of a kind that cannot hold rows of
            different lengths.
    """
    if isinstance(given, RoutedCache):
        return given
    if given is None or (type(given) is DynamicCache and not given.offloading and given.get_seq_length() == 0):
        cache = RoutedCache(config)
        if given is not None and any(getattr(layer, "record_past", False) for layer in given.layers):
            # Assisted decoding enables cropping on the cache that it passes; copy that setting.
            cache.activate_past_recording()  # type: ignore[no-untyped-call]
        return cache
    if type(given) is DynamicCache and not given.offloading:
        raise ValueError(
            f"past_key_values is a DynamicCache that holds {given.get_seq_length()} tokens: it does not say which tokens each layer "
            "processed. Fill a laconic.RoutedCache(model.config) with this model instead"
        )
    kind = "an offloaded cache" if getattr(given, "offloading", False) else type(given).__name__
    raise ValueError(
        f"past_key_values is {kind}, which cannot hold rows with different numbers of keys: leave cache_implementation out (or set it "
        "to 'dynamic'), and the compressed model makes a RoutedCache"
    )
