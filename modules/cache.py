"""RoutedCache: keys and values of a causal model whose layers process different tokens of a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

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
        slots: (B, S) int64 slot of each stored key, ascending in a row, -1 behind its last; None while rows are alike.
        lengths: (B,) int64 keys of each row; None while rows are alike.
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
        self.lengths: Tensor | None = None

    @property
    def stored(self) -> int:
        """Keys of the row that has most."""
        if self.slots is not None:
            return self.slots.shape[1]
        return 0 if self.keys is None else self.keys.shape[2]

    def tokens_stored(self) -> int:
        """Keys of all rows together, filler not counted."""
        if self.lengths is not None:
            return int(self.lengths.sum())
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
        self.slots, self.lengths = self.slots.masked_fill(~stays, -1), stays.sum(-1)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for name in ("keys", "values", "slots", "lengths"):
            part = getattr(self, name)
            if part is not None:
                setattr(self, name, part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        for name in ("keys", "values", "slots", "lengths"):
            part = getattr(self, name)
            if part is not None:
                setattr(self, name, part[indices.to(part.device)])

    # What a compressed layer does with it.

    def enter(self, tokens: int) -> LayerEntry:
        """Called once a forward, before any of its ``tokens`` is processed."""
        before, self.seen = self.seen, self.seen + tokens
        return LayerEntry(self, before)

    def extend(self, slots: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Makes room for (B, K) new slots; filler, not ``valid``, gets none.

        Returns:
            (B, S) slots of all keys, -1 for filler; and (B, K) where each new one is stored, S for filler.
        """
        rows = slots.shape[0]
        if self.slots is None:
            before = 0 if self.keys is None else self.keys.shape[2]
            self.slots = torch.arange(self.start, self.start + before, device=slots.device).repeat(rows, 1)
            self.lengths = torch.full((rows,), before, device=slots.device)
        self._forget(slots)
        assert self.lengths is not None
        taken = torch.ones_like(slots) if valid is None else valid.long()
        lengths = self.lengths + taken.sum(-1)
        width = int(lengths.max())
        places = self.lengths[:, None] + taken.cumsum(-1) - 1
        places = places if valid is None else places.masked_fill(~valid, width)
        # One more column takes the writes of filler.
        table = self.slots.new_full((rows, width + 1), -1)
        table[:, : min(width, self.slots.shape[1])] = self.slots[:, :width]
        table.scatter_(1, places, slots if valid is None else slots.masked_fill(~valid, -1))
        self.slots, self.lengths = table[:, :width], lengths
        return self.slots, places

    def _forget(self, arriving: Tensor) -> None:
        """Tidies away what no query can see any more, once there is enough of it."""
        if self.window is None or self.record_past or self.keys is None or self.values is None or self.stored < self.window + _BLOCK:
            return
        assert self.slots is not None
        stays = self.slots > arriving.amin() - self.window
        order = (~stays).byte().sort(dim=-1, stable=True).indices
        self.lengths = stays.sum(-1)
        width = int(self.lengths.max())
        order = order[:, :width]
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

    def write(self, key_states: Tensor, value_states: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Stores (B, H, K, D) at the (B, K) places that ``extend`` gave, and gives all there are, zeros in place of filler."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        width = self.stored
        self.keys, self.values = (
            self._written(old, new, places, width) for old, new in ((self.keys, key_states), (self.values, value_states))
        )
        return self.keys[:, :, :width], self.values[:, :, :width]

    @staticmethod
    def _written(old: Tensor | None, new: Tensor, places: Tensor, width: int) -> Tensor:
        # Filler is written to the last column, which nothing ever reads.
        if old is None or old.shape[2] <= width:
            grown = new.new_zeros(*new.shape[:2], (width // _BLOCK + 1) * _BLOCK, new.shape[3])
            if old is not None:
                grown[:, :, : min(width, old.shape[2])] = old[:, :, :width]
            old = grown
        places = places.masked_fill(places >= width, old.shape[2] - 1)[:, None, :, None]
        places = places.expand(-1, new.shape[1], -1, new.shape[3])
        # Where somebody wants gradients, what earlier forwards read must stay as it was.
        return old.scatter(2, places, new) if torch.is_grad_enabled() else old.scatter_(2, places, new)


@dataclass(frozen=True)
class LayerEntry:
    """One layer's part of a cache during one forward.

    Attributes:
        layer: what is stored.
        before: tokens seen before this forward.
    """

    layer: RoutedLayer
    before: int

    def everything(self) -> LayerView:
        """All tokens of the forward are about to be processed, in every row."""
        if self.layer.slots is None:
            return LayerView(self.layer, self.layer.start, None, None)
        rows, tokens = self.layer.slots.shape[0], self.layer.seen - self.before
        return self.chosen(torch.arange(tokens, device=self.layer.slots.device).expand(rows, -1), None)

    def chosen(self, position: Tensor, valid: Tensor | None) -> LayerView:
        """The tokens at (B, K) positions of the forward are about to be processed, but for filler."""
        slots, places = self.layer.extend(position + self.before, valid)
        return LayerView(self.layer, 0, slots, places)


@dataclass(frozen=True)
class LayerView:
    """What an attention module is handed as its cache: it knows which tokens the keys belong to.

    Attributes:
        layer: what is stored.
        start: first slot stored where every row has all of them.
        slots: (B, S) int64 of the keys that attention will see, -1 for filler; None where every row has all from ``start``.
        places: (B, K) int64 where the new ones go; None where every row has all.
    """

    layer: RoutedLayer
    start: int
    slots: Tensor | None
    places: Tensor | None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores the keys and values (B, H, K, D) of the tokens that were announced, and gives all (B, H, S, D)."""
        if self.places is None:
            return self.layer.append(key_states, value_states)
        return self.layer.write(key_states, value_states, self.places)


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
