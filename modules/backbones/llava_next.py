"""Adapters for LLaVA-NeXT and LLaVA-OneVision: images in tiles, with a token at the end of each line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from ..tokens.trace import Trace
from .before_text import OTHERS, Images
from .llava import LlavaTower
from .tiles import Tile

# Tiles of the cost model's default image: the whole image and four parts of it.
_TILES = 5
# Functions of transformers without types.
_parts_of: Any = get_anyres_image_grid_shape
_unpadded: Any = unpad_image


class LlavaNext(LlavaTower):
    """LLaVA-NeXT models. Each tile of an image is a row of the tower.

    The learned token at the end of a line of patches is protected: it tells the lines apart. Patches of the tiles' padding, which the language
    model of the dense model does not get, are protected in the tower; no stack counts them.
    """

    model_type = "llava_next"
    image_inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")
    classes: ClassVar[tuple[str, ...]] = ("LlavaNextModel", "LlavaNextForConditionalGeneration")

    @classmethod
    def not_before_text(cls, model: PreTrainedModel) -> str | None:
        config: Any = model.config
        if cls.leading_tokens(config):
            return (
                f"vision_feature_select_strategy = {config.vision_feature_select_strategy!r} puts the class token among the lines of patches; "
                f"{OTHERS}"
            )
        return super().not_before_text(model)

    @classmethod
    def plain_images(cls, config: Any, number: int) -> dict[str, Tensor]:
        side, channels = config.vision_config.image_size, config.vision_config.num_channels
        height, width = min(config.image_grid_pinpoints, key=lambda size: size[0] * size[1])
        tiles = 1 + (height // side) * (width // side)
        return {
            "pixel_values": torch.zeros(number, tiles, channels, side, side),
            "image_sizes": torch.tensor([[height, width]] * number),
        }

    @classmethod
    def pictures(cls, config: Any, inputs: Mapping[str, Tensor]) -> list[Tile]:
        found, vision = list[Tile](), config.vision_config
        patches = vision.image_size // vision.patch_size
        sizes = inputs["image_sizes"].tolist() if "image_sizes" in inputs else []
        for size, pixels, alone in zip(sizes, inputs.get("pixel_values", ()), cls.in_parts(inputs), strict=True):
            found.append(Tile(pixels[0], patches, patches, trailing=int(not alone)))
            if alone:
                down, across = _parts_of(size, config.image_grid_pinpoints, vision.image_size)
                # Parts of the image, line after line, as one picture without the borders that leave no token.
                parts = pixels[1 : 1 + down * across].unflatten(0, (down, across)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
                places = torch.arange(down * across * patches**2).view(1, down * patches, across * patches)
                (grid,) = _unpadded(places, size)
                top, left = (start * vision.patch_size for start in divmod(int(grid[0, 0]), across * patches))
                height, width = (cells * vision.patch_size for cells in grid.shape)
                rows, columns = cls.part_grid(config, grid.shape[0], grid.shape[1], patches)
                found.append(Tile(parts[:, top : top + height, left : left + width], rows, columns, line_ends=1))
        return found

    @classmethod
    def in_parts(cls, inputs: Mapping[str, Tensor]) -> list[bool]:
        """For each image, whether the tower reads parts of it beside the whole."""
        return [True] * len(inputs.get("image_sizes", ()))

    @classmethod
    def part_grid(cls, config: Any, rows: int, columns: int, patches: int) -> tuple[int, int]:
        """Lines and columns of the tokens of an image's parts, for those of the tower's patches.

        Args:
            config: config of the model.
            rows: lines of patches without borders.
            columns: columns of patches without borders.
            patches: patches along one side of a tile.
        """
        return rows, columns

    @classmethod
    def protect(cls, model: PreTrainedModel, trace: Trace, inputs: Mapping[str, Any], encoded: Mapping[str, Any]) -> None:
        parts: Any = model
        flow = trace.flow(cls.stack_name)
        assert flow.protected is not None
        for kind, output in encoded.items():
            values: Tensor = torch.cat(list(output.pooler_output))
            ends = (values == parts.image_newline.to(values.dtype)).all(-1)
            flow.protected = flow.protected | torch.zeros_like(flow.protected).masked_scatter(cls.placeholders(model, inputs, [kind]), ends)

    @classmethod
    def images(cls, base: PreTrainedModel, trace: Trace, kind: str, inputs: Mapping[str, Any]) -> Images:
        given: Tensor = inputs["pixel_values"]
        tiles, patches = cls.tiles_of(base, inputs), cls.patches(base.config)
        # Images have the largest number of tiles of any; those behind an image's own are padding.
        pixel_values = torch.cat([part[:number] for part, number in zip(given, tiles, strict=True)]) if given.ndim == 5 else given
        places = cls.places(base, tiles, inputs) if cls.staged(base) else None
        unused = None if places is None else cls.unused(places, sum(tiles), patches)
        made = cls.rows_of(base, trace, pixel_values, inputs, None if unused is None else unused.to(given.device))
        packed = cls.packed(base, torch.split(made.values, tiles), base.get_parameter("image_newline"), inputs)
        if made.gone is None or places is None:
            return Images(packed, None)
        marks = torch.cat([made.gone.flatten(), made.gone.new_zeros(1)])
        return Images(packed, [marks[place.to(marks.device)] for place in places])

    @classmethod
    def places(cls, base: PreTrainedModel, tiles: list[int], inputs: Mapping[str, Any]) -> list[Tensor]:
        """For each image (T,) int64, the patch of each placeholder, counted over the patches of all tiles; their number at the end of a line.

        Raises:
            ValueError: an image is interpolated.
        """
        patches = cls.patches(base.config)
        number = torch.arange(sum(tiles) * patches, dtype=torch.float64).view(-1, patches, 1)
        # transformers' own function orders the numbers and their squares in place of features; -1 is the end of a line.
        packed = cls.packed(base, torch.split(torch.cat([number, number.square()], -1), tiles), torch.tensor([-1.0, 1.0]), inputs)
        if any(bool((part[:, 0].square() != part[:, 1]).any()) for part in packed):
            # The square of a mean of several numbers is less than the mean of their squares.
            raise ValueError(
                f"an image of {max(tiles) - 1} tiles is interpolated to fewer patches by {cls.model_type}, and stages before the language model "
                f"would leave holes in it: give the processor smaller images or fewer image_grid_pinpoints, or {OTHERS}"
            )
        return [part[:, 0].long() % (number.numel() + 1) for part in packed]

    @classmethod
    def unused(cls, places: list[Tensor], tiles: int, patches: int) -> Tensor | None:
        """(tiles, patches) bool, patches of padding, which have no placeholder; None without any."""
        unused = torch.ones(tiles * patches + 1, dtype=torch.bool).scatter(0, torch.cat(places), False)[:-1]
        return unused.view(tiles, patches) if bool(unused.any()) else None

    @classmethod
    def tiles_of(cls, base: PreTrainedModel, inputs: Mapping[str, Any]) -> list[int]:
        """Number of tiles of each image, the whole image included."""
        # Imported here: versions of transformers in which these models have no stages lack the function.
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        config: Any = base.config
        side = config.vision_config.image_size
        return [image_size_to_num_patches(size, config.image_grid_pinpoints, side) for size in inputs["image_sizes"]]

    @classmethod
    def packed(cls, base: Any, rows: Any, newline: Tensor, inputs: Mapping[str, Any]) -> list[Tensor]:
        """What transformers makes of the (tiles, patches, C) rows of each image: one line of patches after the other, without padding."""
        strategy = base.config.vision_feature_select_strategy
        made: list[Tensor] = base.pack_image_features(
            rows, inputs["image_sizes"], vision_feature_select_strategy=strategy, image_newline=newline
        )[0]
        return made

    @classmethod
    def tile_size(cls, config: Any, size: tuple[int, int] | None) -> tuple[int, int] | None:
        return None

    @classmethod
    def tiles(cls, config: Any, size: tuple[int, int] | None) -> int:
        # Tiles are of one size, whatever the image's.
        side = config.vision_config.image_size
        return _TILES if size is None else 1 + (-(-size[0] // side)) * (-(-size[1] // side))


class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision models, for images and videos. Stages before the language model are for images that are not interpolated."""

    model_type = "llava_onevision"
    image_inputs: ClassVar[tuple[str, ...]] = (*LlavaNext.image_inputs, "batch_num_images")
    classes: ClassVar[tuple[str, ...]] = ("LlavaOnevisionModel", "LlavaOnevisionForConditionalGeneration")

    @classmethod
    def leaves_to_model(cls, model: PreTrainedModel, inputs: Mapping[str, Any]) -> bool:
        given = inputs.get("mm_encoder_outputs") or {}
        if inputs.get("pixel_values_videos") is None and given.get("video") is None:
            return False
        if cls.staged(model):
            raise ValueError(
                "the frames of a video are interpolated to a quarter of their patches, and stages before the language model would leave "
                f"holes in them; {OTHERS}"
            )
        return True

    @classmethod
    def tiles_of(cls, base: PreTrainedModel, inputs: Mapping[str, Any]) -> list[int]:
        # An image in a row with others is not cut into tiles.
        number = inputs.get("batch_num_images")
        alone = [True] * len(inputs["image_sizes"]) if number is None else [one == 1 for one in number for _ in range(one)]
        return [tiles if cut else 1 for tiles, cut in zip(super().tiles_of(base, inputs), alone, strict=True)]

    @classmethod
    def packed(cls, base: Any, rows: Any, newline: Tensor, inputs: Mapping[str, Any]) -> list[Tensor]:
        ratio = base.config.vision_aspect_ratio
        made: list[Tensor] = base.pack_image_features(rows, inputs["image_sizes"], image_newline=newline, vision_aspect_ratio=ratio)[0]
        return made

    @classmethod
    def plain_images(cls, config: Any, number: int) -> dict[str, Tensor]:
        return {**super().plain_images(config, number), "batch_num_images": torch.ones(number, dtype=torch.long)}

    @classmethod
    def in_parts(cls, inputs: Mapping[str, Tensor]) -> list[bool]:
        numbers = inputs["batch_num_images"].tolist() if "batch_num_images" in inputs else [1] * len(inputs.get("image_sizes", ()))
        # Images of a row with several are read whole.
        return [number == 1 for number in numbers for _ in range(number)]

    @classmethod
    def part_grid(cls, config: Any, rows: int, columns: int, patches: int) -> tuple[int, int]:
        largest = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(rows * columns / (largest * patches**2))
        # transformers makes larger grids smaller.
        return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)
