"""Adapters for Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images and videos of any size, with positions in time, height and width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import CompressionConfig
from ..cost.shape import StackShape
from ..site import TokenSpec
from ..tokens.documents import DocumentRows
from ..tokens.state import TokenState
from ..tokens.trace import Trace
from .before_text import OTHERS, PROJECTOR, VISION, BeforeText, Images
from .decoder import Decoder
from .image_features import TowerInput, image_features
from .layer_adapter import LayerAdapter
from .llama import LlamaLayers
from .multimodal import check_no_early_drop, linear_macs
from .qwen_vision import QwenMerger, QwenVisionLayers, pack, packed_slots, unpack
from .stack import Stack
from .tiles import Tile

# Height and width of the cost model's default image, in pixels.
_IMAGE = (448, 448)
# Visual tokens along one side of the smallest image.
_SIDE = 4
_GRIDS = {"image": "image_grid_thw", "video": "video_grid_thw"}


class _Text(Decoder):
    """The language models of these families. transformers builds them only inside the whole model."""

    layer_adapter = LlamaLayers


@dataclass(frozen=True)
class _Packed:
    """Input of a tower's first layer, all images in one row of S patches.

    Attributes:
        hidden_states: (S, C).
        cos, sin: (S, D) rotary positions.
        places: (S, 2) int64, row and column of each patch in its image.
        windows: (S,) int64, ascending number of the window of each patch; None if all layers attend to whole images.
        units: (S / unit,) int64, place of each unit among all placeholders; None if they are in this order.
    """

    hidden_states: Tensor
    cos: Tensor
    sin: Tensor
    places: Tensor
    windows: Tensor | None = None
    units: Tensor | None = None


class QwenVL(BeforeText):
    """What these families have in common: a tower that runs all images as one row, and a merger of squares of patches.

    A stage before the language model scores patches, and keeps or removes squares by the mean score of their patches. Each image, and each frame
    of a video, has a count of its own.
    """

    vision_at = "visual"
    blocks_at = "visual.blocks"
    projector_at = "visual.merger"
    projector_layers = QwenMerger
    parts_at: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("visual",),
        "projector": ("visual.merger", "visual.deepstack_merger_list"),
    }
    image_inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "image_grid_thw")
    types_at = "mm_token_type_ids"

    @classmethod
    def plain_images(cls, config: Any, number: int) -> dict[str, Tensor]:
        vision = config.vision_config
        side = _SIDE * vision.spatial_merge_size
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return {"pixel_values": torch.zeros(number * side**2, values), "image_grid_thw": torch.tensor([[1, side, side]] * number)}

    @classmethod
    def packed_positions(cls, model: PreTrainedModel, batch: Mapping[str, Any]) -> Tensor:
        """(4, B, N): places in the text, by which transformers tells chats apart, then time, height and width."""
        places, documents = super().packed_positions(model, batch), batch["documents"]
        base: Any = cls.base(model)
        if "image_grid_thw" not in batch:
            return places.expand(4, -1, -1)
        packed = TokenState.initial(len(places), places.shape[1], 0, documents >= 0, places.device, documents.clamp(min=0))
        chats = DocumentRows.of(packed)
        ids = batch["input_ids"].flatten()[chats.index]
        of_images = {"mm_token_type_ids": (ids == model.config.image_token_id).int(), "image_grid_thw": batch["image_grid_thw"]}
        found, _ = base.get_rope_index(ids, attention_mask=chats.state.valid, **of_images)
        return torch.stack([places, *(chats.put(axis, packed) for axis in found)])

    @classmethod
    def pictures(cls, config: Any, inputs: Mapping[str, Tensor]) -> list[Tile]:
        found, vision, start = list[Tile](), config.vision_config, 0
        merged, patch = vision.spatial_merge_size, vision.patch_size
        for time, height, width in inputs["image_grid_thw"].tolist() if "image_grid_thw" in inputs else []:
            patches = inputs["pixel_values"][start : start + time * height * width]
            start += len(patches)
            rows, columns = height // merged, width // merged
            # Patches of a token follow each other; a still image is there twice in time.
            of_time = patches.view(time, rows, columns, merged, merged, vision.in_channels, -1, patch, patch)[0, ..., 0, :, :]
            pixels = of_time.permute(4, 0, 2, 5, 1, 3, 6).reshape(vision.in_channels, height * patch, width * patch)
            found.append(Tile(pixels, rows, columns, joined=merged))
        return found

    @classmethod
    def tower_adapter(cls, config: Any) -> type[LayerAdapter]:
        return QwenVisionLayers

    @classmethod
    def tower_depth(cls, config: Any) -> int:
        return int(config.vision_config.depth)

    @classmethod
    def unit(cls, config: Any) -> int:
        """Number of patches that the merger joins."""
        return int(config.vision_config.spatial_merge_size**2)

    @classmethod
    def patch_spec(cls, model: PreTrainedModel, stack: Stack) -> TokenSpec:
        return TokenSpec(cls.width(stack.config), classes=0, family=cls.model_type, unit=cls.unit(model.config))

    @classmethod
    def tower_shape(cls, model: PreTrainedModel, size: tuple[int, int] | None) -> StackShape:
        vision, (height, width), tower = model.config.vision_config, size or _IMAGE, cls.tower(model)
        patches = (height // vision.patch_size) * (width // vision.patch_size)
        return StackShape(
            hidden=cls.width(vision),
            intermediate=cls.intermediate(vision),
            layers=vision.depth,
            heads=vision.num_heads,
            protected=0,
            routable=patches,
            embed_macs=patches * tower.patch_embed.proj.weight.numel(),
            head_macs=0,
        )

    @classmethod
    def projector_shape(cls, model: PreTrainedModel, seen: StackShape) -> StackShape:
        return cls.joining(super().projector_shape(model, seen), cls.unit(model.config))

    @classmethod
    def width(cls, vision: Any) -> int:
        """Width of the tower's tokens."""
        return int(vision.hidden_size)

    @classmethod
    def intermediate(cls, vision: Any) -> int:
        """Width of the hidden layer of the tower's MLPs."""
        return int(vision.intermediate_size)

    @classmethod
    def full_attention(cls, vision: Any, layer: int) -> bool:
        """True if a layer of the tower attends to whole images, not to windows of them."""
        return True

    @classmethod
    def taps(cls, tower: Any) -> dict[int, nn.Module]:
        """Mergers of the outputs of earlier layers, by layer."""
        return {}

    @classmethod
    def packed(cls, tower: Any, patches: Tensor, grid: Tensor) -> _Packed:
        """Input of the tower's first layer, for the (S, values) pixels of all patches.

        Args:
            tower: the tower.
            patches: pixels of the patches, square by square.
            grid: (images, 3) frames, rows and columns of each image.
        """
        # Imported here: versions of transformers in which these models have no stages lack the module.
        from transformers.vision_utils import get_vision_position_ids

        hidden_states: Tensor = tower.patch_embed(patches)
        places = get_vision_position_ids(grid, tower.spatial_merge_size)
        cos, sin = tower.rotary_pos_emb(hidden_states, places)
        return _Packed(hidden_states, cos, sin, places)

    @classmethod
    def images(cls, base: PreTrainedModel, trace: Trace, kind: str, inputs: Mapping[str, Any]) -> Images:
        tower, unit, grid = cls.tower(base), cls.unit(base.config), inputs[_GRIDS[kind]]
        pixels: Tensor = inputs["pixel_values" if kind == "image" else "pixel_values_videos"]
        given = cls.packed(tower, pixels.type(tower.dtype), grid)
        # Frames are rows, padded to the longest.
        lengths = [down * across for frames, down, across in grid.tolist() for _ in range(frames)]
        rows, longest, device = len(lengths), max(lengths), given.hidden_states.device
        valid = None
        if min(lengths) < longest:
            valid = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
        slots = packed_slots(valid)

        def by_row(parts: Tensor) -> Tensor:
            return unpack(parts, slots, rows, longest)

        # Images of a batch lie in the upper left corner of the largest grid.
        largest = int(grid[:, 1].max()), int(grid[:, 2].max())
        places = by_row((given.places[:, :1] * largest[1] + given.places[:, 1:]).long()).squeeze(-1)
        cls._bind(trace, rows, largest, places, valid, torch.arange(longest, device=device)[None] // unit)
        embeddings = by_row(given.cos), by_row(given.sin)
        windows = None if given.windows is None else by_row(given.windows[:, None]).squeeze(-1)
        vision, projector, _ = cls.stacks(base)

        def of_layer(index: int) -> dict[str, Any]:
            whole = cls.full_attention(vision.config, index)
            return {"position_embeddings": embeddings, "windows": None if whole else windows}

        made = image_features(
            TowerInput(by_row(given.hidden_states), unit=unit, inputs=of_layer, taps=cls.taps(tower)), vision, projector, trace
        )
        of_units = packed_slots(None if valid is None else valid[:, ::unit])
        numbers: list[int] = (grid.prod(-1) // unit).tolist()

        def by_image(parts: Tensor) -> list[Tensor]:
            flat = pack(parts, of_units)
            flat = flat if given.units is None else flat[given.units.argsort()]
            return list(torch.split(flat, numbers))

        gone = None if made.gone is None else [part.squeeze(-1) for part in by_image(made.gone.unsqueeze(-1))]
        return Images(by_image(made.values), gone, [by_image(part) for part in made.tapped])

    @classmethod
    def _bind(cls, trace: Trace, rows: int, grid: tuple[int, int], places: Tensor, valid: Tensor | None, units: Tensor) -> None:
        seen = trace.flow(VISION)
        if seen.rows:
            raise ValueError(
                "pixel_values and pixel_values_videos in one forward: stages before the language model take images or videos; split a batch "
                f"of such rows, or {OTHERS}"
            )
        seen.valid, seen.places, seen.units = valid, places, units
        for flow in (seen, trace.flow(PROJECTOR)):
            flow.rows, flow.grid = rows, grid


class Qwen2VL(QwenVL):
    """Qwen2-VL models."""

    model_type = "qwen2_vl"
    languages: ClassVar[Mapping[str, type[Decoder]]] = {"qwen2_vl_text": _Text}
    classes: ClassVar[tuple[str, ...]] = ("Qwen2VLModel", "Qwen2VLForConditionalGeneration")

    @classmethod
    def width(cls, vision: Any) -> int:
        return int(vision.embed_dim)

    @classmethod
    def intermediate(cls, vision: Any) -> int:
        return int(vision.embed_dim * vision.mlp_ratio)


class Qwen25VL(QwenVL):
    """Qwen2.5-VL models. Most layers of the tower attend inside windows, of what is left of them."""

    model_type = "qwen2_5_vl"
    languages: ClassVar[Mapping[str, type[Decoder]]] = {"qwen2_5_vl_text": _Text}
    classes: ClassVar[tuple[str, ...]] = ("Qwen2_5_VLModel", "Qwen2_5_VLForConditionalGeneration")

    @classmethod
    def tower_shape(cls, model: PreTrainedModel, size: tuple[int, int] | None) -> StackShape:
        vision: Any = model.config.vision_config
        window = (vision.window_size // vision.patch_size) ** 2
        windows = tuple(None if cls.full_attention(vision, layer) else window for layer in range(vision.depth))
        return replace(super().tower_shape(model, size), gated=True, windows=windows)

    @classmethod
    def full_attention(cls, vision: Any, layer: int) -> bool:
        return layer in vision.fullatt_block_indexes

    @classmethod
    def packed(cls, tower: Any, patches: Tensor, grid: Tensor) -> _Packed:
        from transformers.vision_utils import get_vision_window_index

        made, number = super().packed(tower, patches, grid), len(patches)
        order, ends = get_vision_window_index(grid, tower.spatial_merge_size, tower.window_size, tower.patch_size)
        order = order.to(patches.device)

        def permuted(parts: Tensor) -> Tensor:
            moved: Tensor = tower.permute_input_for_window_attn(parts, order, seq_len=number)
            return moved

        windows = torch.arange(len(ends) - 1, device=patches.device).repeat_interleave(ends.diff().to(patches.device))
        parts = {name: permuted(getattr(made, name)) for name in ("hidden_states", "cos", "sin", "places")}
        return replace(made, **parts, windows=windows, units=order)


class Qwen3VL(QwenVL):
    """Qwen3-VL models. The first layers of the language model are given features of the tower again, at all visual tokens (DeepStack)."""

    model_type = "qwen3_vl"
    languages: ClassVar[Mapping[str, type[Decoder]]] = {"qwen3_vl_text": _Text}
    classes: ClassVar[tuple[str, ...]] = ("Qwen3VLModel", "Qwen3VLForConditionalGeneration")

    @classmethod
    def check_stages(cls, model: PreTrainedModel, config: CompressionConfig) -> None:
        super().check_stages(model, config)
        first = cls.whole_until(model)
        check_no_early_drop(
            config, first, f"DeepStack adds features of the tower to all visual tokens behind each of the first {first} layers"
        )

    @classmethod
    def whole_until(cls, model: PreTrainedModel) -> int:
        vision: Any = model.config.vision_config
        return len(vision.deepstack_visual_indexes)

    @classmethod
    def tower_shape(cls, model: PreTrainedModel, size: tuple[int, int] | None) -> StackShape:
        taps = {layer: linear_macs(merger) / cls.unit(model.config) for layer, merger in cls.taps(cls.tower(model)).items()}
        return replace(super().tower_shape(model, size), taps=taps)

    @classmethod
    def taps(cls, tower: Any) -> dict[int, nn.Module]:
        return dict(zip(tower.deepstack_visual_indexes, tower.deepstack_merger_list, strict=True))

    @classmethod
    def packed(cls, tower: Any, patches: Tensor, grid: Tensor) -> _Packed:
        from transformers.vision_utils import get_vision_interpolation_indices_and_weights

        made = super().packed(tower, patches, grid)
        cells, weights = get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=tower.spatial_merge_size,
        )
        positions = (tower.pos_embed(cells) * weights[:, :, None]).sum(1)
        return replace(made, hidden_states=made.hidden_states + positions.to(made.hidden_states.dtype))

    @classmethod
    def encoded(cls, features: Sequence[Tensor], deep: Sequence[Sequence[Tensor]] | None = None) -> Any:
        output = super().encoded(features)
        output.deepstack_features = [list(part) for part in deep or ()]
        return output
