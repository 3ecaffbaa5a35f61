"""RoutedCache: keys and values of a causal model whose layers process different tokens of a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

# Storage of a layer grows by this many tokens at a time; a sliding layer removes old keys once this many are outside its window.
_BLOCK = 64


class RoutedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer; each row has those of the tokens that it processed.

    A slot is a token's index in the whole sequence, padding included. As long as every row has processed every token, the stored slots
    are consecutive from ``start`` and ``slots`` is None.

    Args:
        window: attention window of a sliding layer, in slots; None for full attention.

    Attributes:
        seen: number of tokens seen, processed or not; transformers calls it the sequence length.
        start: first stored slot, while all rows store the same slots.
        slots: (B, S) int64 slot of each stored key, ascending in a row, -1 after its last key; None while all rows store the same slots.
            S is larger than the number of keys of any row.
        lengths: number of keys of each row; None while all rows store the same slots.
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
        """Largest number of keys in a row."""
        if self.lengths is not None:
            return max(self.lengths)
        return 0 if self.keys is None else self.keys.shape[2]

    def tokens_stored(self) -> int:
        """Number of keys of all rows together, without padding."""
        if self.lengths is not None:
            return sum(self.lengths)
        return 0 if self.keys is None else self.keys.shape[0] * self.keys.shape[2]

    def bytes_stored(self) -> int:
        """Bytes of the keys and values of all rows, without padding."""
        if self.keys is None or self.values is None:
            return 0
        each = sum(part.shape[1] * part.shape[3] * part.element_size() for part in (self.keys, self.values))
        return self.tokens_stored() * each

    # The interface that transformers requires.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise RuntimeError("a RoutedCache was passed to a layer that is not compressed: use it with the compressed model it was made for")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def activate_past_recording(self) -> None:
        """Keeps keys that leave the window, so that ``crop`` can restore them."""
        self.record_past = True

    def reset(self) -> None:
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last ``-tokens_to_remove`` tokens. Raises RuntimeError if keys that the window needs again were removed."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the number of tokens to remove as a negative integer")
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

    # The interface for compressed layers.

    def begin_forward(self, rows: int, tokens: int) -> LayerEntry:
        """Registers (rows, tokens) of a forward; called once per forward, before any of its tokens is processed."""
        before, self.seen = self.seen, self.seen + tokens
        return LayerEntry(self, rows, before)

    def extend(self, batch: int, slots: Tensor, valid: Tensor | None, rows: Tensor | None = None) -> LayerView:
        """Allocates columns for new tokens.

        Args:
            batch: number of rows of the batch.
            slots: (R, K) slots of the new tokens, ascending in a row.
            valid: (R, K) bool, False for padding, which gets no column; None without padding.
            rows: (R,) int64, rows of the batch that the tokens are in; None means every row.
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
            # Padding is written to the last column, which is never read.
            columns, slots = columns.masked_fill(~valid, self.slots.shape[1] - 1), slots.masked_fill(~valid, -1)  # type: ignore[union-attr]
        _store(self.slots, rows, columns, slots)
        return LayerView(self, self.start, _of_rows(self.slots[:, :width], rows), columns, rows, even)

    def _forget(self, arriving: Tensor) -> None:
        """Removes keys that no query can attend to any more, once there are enough of them."""
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
        """Stores (B, H, K, D) for every row and returns all keys and values; those outside the window are removed afterwards."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys = key_states if self.keys is None else torch.cat([self.keys, key_states], 2)
        values = value_states if self.values is None else torch.cat([self.values, value_states], 2)
        first = 0 if self.window is None or self.record_past else max(0, self.seen - self.window + 1 - self.start)
        self.keys, self.values, self.start = keys[:, :, first:], values[:, :, first:], self.start + first
        return keys, values

    def write(self, key_states: Tensor, value_states: Tensor, view: LayerView) -> tuple[Tensor, Tensor]:
        """Stores (R, H, K, D) at the columns of a view from ``extend`` and returns (R, H, S, D), all keys and values of its rows."""
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


def _with_room(table: Tensor, width: int, padding: int, dim: int) -> Tensor:
    """A writable table with more than ``width`` columns along ``dim``, new ones filled with ``padding``."""
    if table.shape[dim] <= width:
        shape = list(table.shape)
        shape[dim] = (width // _BLOCK + 1) * _BLOCK - table.shape[dim]
        return torch.cat([table, table.new_full(shape, padding)], dim)
    if torch.is_grad_enabled() or table.requires_grad or (table.is_inference() and not torch.is_inference_mode_enabled()):
        # With gradients, tensors that earlier forwards read must not change; torch forbids writing to inference tensors.
        return table.clone()
    return table


def _store(table: Tensor, rows: Tensor | None, columns: Tensor | slice, new: Tensor) -> None:
    """Writes (R, K, …) into the given rows of a (B, S, …) table, or into all rows."""
    if isinstance(columns, slice):
        table[:, columns] = new
    else:
        of = torch.arange(table.shape[0], device=table.device) if rows is None else rows
        table[of[:, None], columns] = new


def _of_rows(table: Tensor, rows: Tensor | None) -> Tensor:
    """The given rows of a table, or all rows."""
    return table if rows is None else table.index_select(0, rows)


@dataclass(frozen=True)
class LayerEntry:
    """The cache of one layer during one forward.

    Attributes:
        layer: the stored keys and values.
        rows: number of rows of the forward.
        before: number of tokens seen before the forward.
    """

    layer: RoutedLayer
    rows: int
    before: int

    def everything(self, position: Tensor) -> LayerView:
        """The view for processing all tokens of the forward, at (B, N) positions, in every row."""
        layer = self.layer
        if layer.slots is None and layer.start + layer.stored == self.before:
            return LayerView(layer, layer.start, None, slice(0), None, even=True)
        return self.chosen(position, None)

    def chosen(self, position: Tensor, valid: Tensor | None, rows: Tensor | None = None) -> LayerView:
        """The view for processing the tokens at (R, K) positions of the forward, without padding, in the given rows or in all."""
        return self.layer.extend(self.rows, position + self.before, valid, rows)


@dataclass(frozen=True)
class LayerView:
    """The cache as an attention module receives it, with the token of each key.

    Attributes:
        layer: the stored keys and values.
        start: first stored slot, if every row stores the same slots.
        slots: (R, S) int64 slots of the keys that attention will use, -1 for padding; None if every row stores all slots from ``start``.
        columns: columns of the slot table for the new tokens: (R, K) int64, or a slice if they are the same in every row.
        rows: (R,) int64, rows of the batch that are processed; None for all.
        even: all rows have the same number of keys, and no new token is padding.
    """

    layer: RoutedLayer
    start: int
    slots: Tensor | None
    columns: Tensor | slice
    rows: Tensor | None
    even: bool

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores the keys and values (R, H, K, D) of the view's new tokens and returns all (R, H, S, D)."""
        if self.slots is None:
            return self.layer.append(key_states, value_states)
        return self.layer.write(key_states, value_states, self)


class RoutedCache(Cache):
    """The cache of a compressed causal model. ``generate``, and a forward with ``use_cache``, create one if none is passed.

    Args:
        config: config of the model.

    Attributes:
        carry: (B, …) tensors by name, data of stages about each row's earlier tokens.
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
        """Removes the last ``-tokens_to_remove`` tokens. Raises RuntimeError if stages made chunks of them, which cannot be undone."""
        if self.carry and tokens_to_remove != 0:
            raise RuntimeError(
                f"crop({tokens_to_remove}): this model makes chunks, and its cache stores only the last token of each row: make a new "
                "RoutedCache and fill it with the shorter text; generate without an assistant model or prompt lookup"
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
        """Bytes of all keys and values, without padding."""
        return sum(layer.bytes_stored() for layer in self.layers)

    def tokens_stored(self) -> list[int]:
        """Number of keys of each layer, over all rows."""
        return [layer.tokens_stored() for layer in self.layers]


def routed_cache(config: Any, given: Any) -> RoutedCache:
    """The cache for a forward with ``use_cache``.

    Args:
        config: config of the model.
        given: cache that the caller passed; None and an empty DynamicCache are replaced by a RoutedCache.

    Raises:
        ValueError: the given cache does not record which tokens each layer processed, or cannot hold rows of different lengths.
    """
    if isinstance(given, RoutedCache):
        return given
    if given is None or (type(given) is DynamicCache and not given.offloading and given.get_seq_length() == 0):
        cache = RoutedCache(config)
        if given is not None and any(getattr(layer, "record_past", False) for layer in given.layers):
            # Assisted decoding enables cropping on the cache it passes; copy that setting.
            cache.activate_past_recording()  # type: ignore[no-untyped-call]
        return cache
    if type(given) is DynamicCache and not given.offloading:
        raise ValueError(
            f"past_key_values is a DynamicCache that holds {given.get_seq_length()} tokens: it does not record which tokens each layer "
            "processed. Fill a laconic.RoutedCache(model.config) with this model instead"
        )
    kind = "an offloaded cache" if getattr(given, "offloading", False) else type(given).__name__
    raise ValueError(
        f"past_key_values is {kind}, which cannot hold rows with different numbers of keys: leave cache_implementation out (or set it to "
        "'dynamic'); the compressed model then makes a RoutedCache"
    )
