"""Adapter for Gemma 3 with images: the tokens of an image attend to each other in both directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..cost.shape import StackShape
from ..tokens.gather import look_up, take
from ..tokens.state import TokenState
from ..tokens.units import Units
from .decoder import Decoder
from .gemma import Gemma3Text
from .grid_tower import GridTower
from .projector import JoiningProjector
from .tiles import Tile


class PoolingProjector(JoiningProjector):
    """A projector that averages squares of patches. It runs on the whole grid, where squares that are gone are zero and not read."""

    @classmethod
    def layer_inputs(cls, layer: nn.Module, state: TokenState, dtype: torch.dtype, inputs: Mapping[str, Any]) -> dict[str, Any]:
        parts: Any = layer
        return super().layer_inputs(layer, state, dtype, inputs) | {"across": parts.tokens_per_side}

    @classmethod
    def call(cls, forward: Callable[..., Any], hidden_states: Tensor, inputs: Mapping[str, Any]) -> Any:
        units, across = inputs["units"], inputs["across"]
        assert isinstance(units, Units)
        rows, width, side, every = len(hidden_states), hidden_states.shape[-1], round(units.size**0.5), across**2
        # Padding is written to one more place, which is cut off.
        number = units.number if units.state.valid is None else units.number.masked_fill(~units.state.valid, every)
        squares = take(hidden_states, units.order).reshape(rows, -1, units.size * width)
        full = squares.new_zeros(rows, every + 1, units.size * width)
        full = full.scatter(1, number.unsqueeze(-1).expand_as(squares), squares)[:, :-1]
        grid = full.reshape(rows, across, across, side, side, width).transpose(2, 3).reshape(rows, -1, width)
        made: Tensor = forward(grid)
        return look_up(made, number.clamp(max=every - 1))


class Gemma3(GridTower):
    """Gemma 3 models with images. A layer's mask, causal but for the tokens of an image, is gathered on both of its axes."""

    model_type = "gemma3"
    languages: ClassVar[Mapping[str, type[Decoder]]] = {Gemma3Text.model_type: Gemma3Text}
    blocks_at = "vision_tower.encoder.layers"
    projector_layers = PoolingProjector
    # transformers finds the images of a row by positions, which start again in each chat.
    no_packing = "transformers' masks let chats of a row see tokens of each other's images"
    types_at = "token_type_ids"
    mask_inputs = (*GridTower.mask_inputs, types_at)
    classes: ClassVar[tuple[str, ...]] = ("Gemma3Model", "Gemma3ForConditionalGeneration")

    @classmethod
    def pictures(cls, config: Any, inputs: Mapping[str, Tensor]) -> list[Tile]:
        side = math.isqrt(config.mm_tokens_per_image)
        return [Tile(pixels, side, side) for pixels in inputs.get("pixel_values", ())]

    @classmethod
    def side(cls, config: Any) -> int:
        vision = config.vision_config
        return int(vision.image_size // vision.patch_size // int(config.mm_tokens_per_image**0.5))

    @classmethod
    def projector_shape(cls, model: PreTrainedModel, seen: StackShape) -> StackShape:
        shape, config = super().projector_shape(model, seen), model.config
        # The whole grid is read, whatever is left of it.
        macs = seen.routable // shape.joined * seen.hidden * config.text_config.hidden_size
        return replace(shape, embed_macs=macs, macs_per_token=0)

    @classmethod
    def encoded(cls, features: Sequence[Tensor], deep: Sequence[Sequence[Tensor]] | None = None) -> Any:
        output = super().encoded(features, deep)
        output.pooler_output = torch.stack(list(features))
        return output
