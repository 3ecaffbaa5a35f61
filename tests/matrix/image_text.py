"""Tiny models of vision-language families beside LLaVA, and batches for them. A new family is one more line in FAMILIES."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from .decoders import _COMMON as TEXT

PLACEHOLDER, LAYERS, SIDE = 47, 4, 24
# Images of each row: one amid text, two, and text alone.
IMAGES = (1, 2, 0)
_WORDS = 9
_SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": SIDE, "patch_size": 4, "vision_use_head": False,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_QWEN = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}
_QWEN_TEXT = {**TEXT, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": _ROPE}


@dataclass(frozen=True)
class ImageTextFamily:
    """A family.

    Attributes:
        model_type: ``model_type`` of its models.
        vision: settings of the tower.
        text: settings of the language model.
        tokens: visual tokens of one image.
        inputs: inputs of the model for images (I, 3, SIDE, SIDE) and ids (B, N).
        settings: other settings.
        patches: tokens of a row of the tower.
        lines: visual tokens of one image that end a line, which are protected.
    """

    model_type: str
    vision: dict[str, Any]
    text: dict[str, Any]
    tokens: int
    inputs: Callable[[Tensor, Tensor], dict[str, Tensor]]
    settings: dict[str, Any] = field(default_factory=dict)
    patches: int = 36
    lines: int = 0

    @property
    def routable(self) -> int:
        """Visual tokens of one image that a stage may touch."""
        return self.tokens - self.lines


def _patches(images: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """Patches of all images as rows, in squares of two by two, each pixel twice in time."""
    side = SIDE // 4
    cut = functional.unfold(images, 4, stride=4).transpose(1, 2).view(-1, side // 2, 2, side // 2, 2, 3, 1, 16)
    cut = cut.permute(0, 1, 3, 2, 4, 5, 6, 7).expand(-1, -1, -1, -1, -1, -1, 2, -1)
    return {
        "pixel_values": cut.reshape(len(images) * side**2, -1),
        "image_grid_thw": torch.tensor([[1, side, side]] * len(images)),
        "mm_token_type_ids": (ids == PLACEHOLDER).int(),
    }


def _by_row(images: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """(B, most images of a row, 3, SIDE, SIDE), zeros where a row has fewer."""
    numbers = ((ids == PLACEHOLDER).sum(-1) // 9).tolist()
    rows = functional.pad(images, (0, 0) * 3 + (0, 1)).new_zeros(len(ids), max(numbers), *images.shape[1:])
    place = iter(images)
    for row, number in enumerate(numbers):
        for at in range(number):
            rows[row, at] = next(place)
    return {"pixel_values": rows}


def _tiles(images: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """The whole image and itself as its only tile."""
    return {"pixel_values": images[:, None].repeat(1, 2, 1, 1, 1), "image_sizes": torch.tensor([[SIDE, SIDE]] * len(images))}


def _alone(images: Tensor, ids: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": images}


def _typed(images: Tensor, ids: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": images, "token_type_ids": (ids == PLACEHOLDER).int()}


_NEXT = {"image_grid_pinpoints": [[SIDE, SIDE]], "vision_feature_select_strategy": "full", "vision_feature_layer": -1}
_COARSE = {**_SIGLIP, "patch_size": 8}
FAMILIES = {
    "llava_next": ImageTextFamily("llava_next", _COARSE, {**TEXT, "model_type": "llama"}, 21, _tiles, _NEXT, 9, 3),
    "llava_onevision": ImageTextFamily(
        "llava_onevision", _COARSE, {**TEXT, "model_type": "qwen2"}, 21, _tiles, {**_NEXT, "vision_aspect_ratio": "anyres_max_9"}, 9, 3
    ),
    "qwen2_vl": ImageTextFamily(
        "qwen2_vl", {**_QWEN, "embed_dim": 16, "hidden_size": 16, "mlp_ratio": 2}, {**_QWEN_TEXT, "model_type": "qwen2_vl_text"}, 9, _patches
    ),
    "qwen2_5_vl": ImageTextFamily(
        "qwen2_5_vl",
        {**_QWEN, "hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 16, "window_size": 16, "fullatt_block_indexes": [1]},
        {**_QWEN_TEXT, "model_type": "qwen2_5_vl_text"},
        9,
        _patches,
    ),
    "qwen3_vl": ImageTextFamily(
        "qwen3_vl",
        {**_QWEN, "hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 16, "num_position_embeddings": 36,
         "deepstack_visual_indexes": [0]},
        {**_QWEN_TEXT, "model_type": "qwen3_vl_text", "head_dim": 8},
        9,
        _patches,
    ),
    "smolvlm": ImageTextFamily("smolvlm", {**_SIGLIP, "model_type": "smolvlm_vision"}, {**TEXT, "model_type": "llama"}, 9, _by_row, {"scale_factor": 2}),
    "idefics3": ImageTextFamily("idefics3", {**_SIGLIP, "model_type": "idefics3_vision"}, {**TEXT, "model_type": "llama"}, 9, _by_row, {"scale_factor": 2}),
    "internvl": ImageTextFamily(
        "internvl",
        {"model_type": "internvl_vision", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "image_size": [SIDE, SIDE], "patch_size": [4, 4]},
        {**TEXT, "model_type": "qwen2"},
        9,
        _alone,
        patches=37,
    ),
    "gemma3": ImageTextFamily(
        "gemma3", _SIGLIP, {**TEXT, "model_type": "gemma3_text", "sliding_window": 128, "head_dim": 8}, 9, _typed, {"mm_tokens_per_image": 9}
    ),
}  # fmt: skip


def dense(family: str, **settings: Any) -> PreTrainedModel:
    """A tiny random model in evaluation mode. What reads images is not tiny, so that answers depend on them."""
    torch.manual_seed(1)
    about, attention = FAMILIES[family], settings.pop("attn_implementation", "sdpa")
    ids = {"image_token_id": PLACEHOLDER, "image_token_index": PLACEHOLDER, "video_token_id": 46, "vision_start_token_id": 45}
    config = AutoConfig.for_model(
        about.model_type, vision_config=about.vision, text_config={**about.text, **settings}, **ids, **about.settings
    )
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language_model" not in name and "text_model" not in name and "lm_head" not in name and parameter.ndim > 1:
                parameter.normal_(0, 0.3)
            elif "image_newline" in name:
                parameter.normal_(0, 1.0)
    return model


def row(family: str, number: int) -> dict[str, Tensor]:
    """One row alone: a word, then each image with a word behind it, then words."""
    about, draws = FAMILIES[family], torch.Generator().manual_seed(number)
    images = torch.randn(IMAGES[number], 3, SIDE, SIDE, generator=draws)
    ids = torch.randint(2, 45, (1, 1 + IMAGES[number] * (about.tokens + 1) + _WORDS), generator=draws)
    for image in range(IMAGES[number]):
        start = 1 + image * (about.tokens + 1)
        ids[:, start : start + about.tokens] = PLACEHOLDER
    return {"input_ids": ids} | (about.inputs(images, ids) if len(images) else {}) | {"images": images}


def batch(family: str, rows: Sequence[int] = (0, 1, 2)) -> dict[str, Tensor]:
    """Rows, padded on the left as ``generate`` takes them."""
    about, alone = FAMILIES[family], [row(family, number) for number in rows]
    length = max(one["input_ids"].shape[1] for one in alone)
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for at, one in enumerate(alone):
        number = one["input_ids"].shape[1]
        ids[at, length - number :], mask[at, length - number :] = one["input_ids"][0], 1
    images = torch.cat([one["images"] for one in alone])
    return {"input_ids": ids, "attention_mask": mask} | (about.inputs(images, ids) if len(images) else {})


def given_of(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a model takes of a row or a batch."""
    return {key: value for key, value in inputs.items() if key != "images"}


def labels_of(ids: Tensor) -> Tensor:
    """The words behind the last image are learned, but the first one."""
    place = torch.arange(ids.shape[1])
    last = torch.where(ids == PLACEHOLDER, place, 0).amax(1, keepdim=True)
    return ids.masked_fill((place <= last + 1) | (ids == 0), -100)


def language_layers(model: PreTrainedModel) -> Any:
    """Layers of the language model."""
    inner: Any = model.model
    return (inner.language_model if hasattr(inner, "language_model") else inner.text_model).layers


def attend_to(layer: nn.Module, seen: Tensor) -> None:
    """Hides all tokens but the (B, N) ``seen`` ones from the attention of a layer of a language model."""

    def masked(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        length = seen.shape[1]
        mask = kwargs.get("attention_mask")
        mask = torch.ones(1, 1, length, length).tril().bool() if mask is None else mask > -1 if mask.is_floating_point() else mask
        return args, kwargs | {"attention_mask": mask & seen[:, None, None]}

    layer.register_forward_pre_hook(masked, with_kwargs=True)
