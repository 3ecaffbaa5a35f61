"""Base class of the adapters for vision-language models whose tower sees images of one size, and whose projector joins squares of patches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from ..cost.shape import StackShape
from ..site import TokenSpec
from ..tokens.trace import Trace
from .before_text import PROJECTOR, VISION, BeforeText, Images
from .image_features import TowerInput, image_features
from .layer_adapter import LayerAdapter
from .projector import JoiningProjector
from .siglip_vision_model import SiglipVisionLayers
from .stack import Stack
from .vision import VisionLayers, pair


class GridTower(BeforeText):
    """Towers over patches in reading order, of which a projector joins squares of side s. A stage keeps or removes each square as a whole.

    Attributes:
        vision_layers: adapter of the tower's layers.
    """

    vision_layers: ClassVar[type[VisionLayers]] = SiglipVisionLayers
    projector_layers: ClassVar[type[LayerAdapter]] = JoiningProjector

    @classmethod
    def side(cls, config: Any) -> int:
        """Side s of the squares, in patches."""
        raise NotImplementedError

    @classmethod
    def rows(cls, base: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, list[int]]:
        """(I, channels, height, width) rows of the tower, and the number of rows behind each other in each entry of the features."""
        return inputs["pixel_values"], [1] * len(inputs["pixel_values"])

    @classmethod
    def embed(cls, tower: Any, pixel_values: Tensor) -> Tensor:
        """(I, N, C) input of the tower's first layer."""
        hidden: Tensor = tower.embeddings(pixel_values)
        return hidden

    @classmethod
    def behind(cls, tower: Any) -> Any:
        """Norm between the tower's layers and the projector."""
        return tower.post_layernorm

    @classmethod
    def tower_adapter(cls, config: Any) -> type[LayerAdapter]:
        return cls.vision_layers

    @classmethod
    def patch_spec(cls, model: PreTrainedModel, stack: Stack) -> TokenSpec:
        vision: Any = stack.config
        down, across = pair(vision.patch_size)
        return TokenSpec(
            hidden_size=vision.hidden_size,
            classes=vision.num_labels or 0,
            patch_values=down * across * vision.num_channels,
            has_cls=cls.vision_layers.has_cls and stack.name == VISION,
            family=cls.model_type,
            unit=cls.side(model.config) ** 2,
        )

    @classmethod
    def tower_shape(cls, model: PreTrainedModel, size: tuple[int, int] | None) -> StackShape:
        vision: Any = cls.tower(model).config
        (height, width), (down, across) = size or pair(vision.image_size), pair(vision.patch_size)
        patches = (height // down) * (width // across)
        return StackShape(
            hidden=vision.hidden_size,
            intermediate=vision.intermediate_size,
            layers=vision.num_hidden_layers,
            heads=vision.num_attention_heads,
            protected=cls.vision_layers.leading(vision),
            routable=patches,
            embed_macs=patches * vision.hidden_size * vision.num_channels * down * across,
            head_macs=0,
        )

    @classmethod
    def projector_shape(cls, model: PreTrainedModel, seen: StackShape) -> StackShape:
        return cls.joining(super().projector_shape(model, seen), cls.side(model.config) ** 2)

    @classmethod
    def images(cls, base: PreTrainedModel, trace: Trace, kind: str, inputs: Mapping[str, Any]) -> Images:
        pixel_values, numbers = cls.rows(base, inputs)
        tower, config = cls.tower(base), base.config
        (down, across), leading, side = pair(tower.config.patch_size), cls.vision_layers.leading(tower.config), cls.side(config)
        grid = pixel_values.shape[-2] // down, pixel_values.shape[-1] // across
        units = square_numbers(grid, side, pixel_values.device)
        trace.flow(VISION).leading, trace.flow(VISION).units = leading, functional.pad(units, (leading, 0), value=-1)
        for flow in (trace.flow(VISION), trace.flow(PROJECTOR)):
            flow.pixel_values, flow.rows, flow.grid = pixel_values, len(pixel_values), grid
        given = TowerInput(cls.embed(tower, pixel_values.to(base.dtype)), leading, side**2, behind=cls.behind(tower))
        vision, projector, _ = cls.stacks(base)
        made = image_features(given, vision, projector, trace)

        def by_entry(parts: Tensor) -> list[Tensor]:
            return [part.flatten(0, 1) for part in torch.split(parts, numbers)]

        return Images(by_entry(made.values), None if made.gone is None else by_entry(made.gone))


def square_numbers(grid: tuple[int, int], side: int, device: torch.device) -> Tensor:
    """(1, patches) int64, for each patch in reading order the number of its square in reading order."""
    row = torch.arange(grid[0], device=device)[:, None] // side
    column = torch.arange(grid[1], device=device) // side
    return (row * (grid[1] // side) + column).view(1, -1)
