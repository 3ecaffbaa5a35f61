"""The processor of a vision-language model: whether it fits the model."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from transformers import PretrainedConfig

from ...modules.backbones.multimodal import Multimodal

_CURE = "set data.processor to the model's own"
# Width and height of a picture that is tried: not square, so that tiles and grids are counted too.
_TRIED = (320, 200)


def image_token_id(processor: Any) -> int:
    """Id of the token that a processor puts for each visual token."""
    number: int = processor.image_token_ids[0]
    return number


def check_processor(family: type[Multimodal], config: PretrainedConfig, processor: Any) -> None:
    """Raises ValueError, with the cure, if a processor makes other ids, images or numbers of tokens than the model reads.

    Args:
        family: adapter of the model.
        config: config of the model.
        processor: processor of transformers.
    """
    given: Any = config
    picture = Image.new("RGB", _TRIED, (90, 120, 150))
    # Also where a model is built without values.
    with torch.device("cpu"):
        made = processor(text=[processor.image_token], images=[[picture]], return_tensors="pt", add_special_tokens=False)
        plain = family.plain_images(config, 1)
    tokens = int((made["input_ids"] == given.image_token_id).sum())
    if not tokens:
        raise ValueError(
            f"the model's image_token_id is {given.image_token_id}, and the processor's placeholder {processor.image_token!r} has the id "
            f"{image_token_id(processor)}: {_CURE}"
        )
    if lacking := [name for name in family.image_inputs if name not in made]:
        raise ValueError(
            f"the processor {type(processor).__name__} makes no {', '.join(lacking)}, which a {family.model_type} reads: {_CURE}"
        )
    seen, read = (tuple(values["pixel_values"].shape) for values in (made, plain))
    # Images have channels, height and width; patches in a row have their values alone.
    last = min(3, len(read) - 1)
    if len(seen) != len(read) or seen[-last:] != read[-last:]:
        raise ValueError(f"the processor makes images of {list(seen[-last:])}, and the model reads {list(read[-last:])}: {_CURE}")
    expected = sum(tile.tokens for tile in family.pictures(config, made))
    if tokens != expected:
        raise ValueError(f"the processor makes {tokens} tokens of an image, and the model {expected}: {_CURE}")
