"""Tiny models of vision-language families with processors that fit them, saved as users have them. A new family is one more line in MADE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.smolvlm import processing_smolvlm

from laconic.data.chats.without_videos import without_videos
from tests.data.texts import jsonl, small_tokenizer

from .image_text import FAMILIES, SIDE

_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + '\\n' }}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ 'IMAGE' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ eos_token if message['role'] == 'assistant' else '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}"
)
_SIZE = {"height": SIDE, "width": SIDE}
_PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [SIDE, SIDE]]
_OF_QWEN = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "start": "<|vision_start|>", "end": "<|vision_end|>"}
_OF_LLAVA = {"image_token": "<image>", "video_token": "<video>"}
_OF_SMOLVLM = {
    **_OF_LLAVA, "fake": "<fake_token_around_image>", "globally": "<global-img>", "end_of_utterance": "<end_of_utterance>",
    **{f"place_{row}_{column}": f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)},
}  # fmt: skip


def _qwen(tokenizer: Any) -> dict[str, Any]:
    size = {"shortest_edge": 16 * 16, "longest_edge": 2 * SIDE * SIDE}
    return {"image_processor": transformers.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=size)}


def _tiles(tokenizer: Any) -> dict[str, Any]:
    images = transformers.LlavaNextImageProcessorPil(size=_SIZE, crop_size=_SIZE, image_grid_pinpoints=_PINPOINTS)
    return {"image_processor": images, "patch_size": 8, "vision_feature_select_strategy": "full"}


def _onevision(tokenizer: Any) -> dict[str, Any]:
    images = transformers.LlavaOnevisionImageProcessorPil(size=_SIZE, image_grid_pinpoints=_PINPOINTS)
    return {"image_processor": images, "num_image_tokens": 9, "vision_feature_select_strategy": "full"}


def _smolvlm(tokenizer: Any, name: str = "SmolVLM") -> dict[str, Any]:
    kind = getattr(transformers, f"{name}ImageProcessorPil")
    return {"image_processor": kind(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}), "image_seq_len": 9}


def _internvl(tokenizer: Any) -> dict[str, Any]:
    return {"image_processor": transformers.GotOcr2ImageProcessorPil(size=_SIZE, max_patches=3), "image_seq_length": 9}


def _gemma3(tokenizer: Any) -> dict[str, Any]:
    return {"image_processor": transformers.Gemma3ImageProcessorPil(size=_SIZE), "image_seq_length": 9}


_QWEN = (_qwen, _OF_QWEN, "<|vision_start|><|image_pad|><|vision_end|>")
# What makes the parts of a family's processor, its special tokens, and what its template writes for an image.
MADE: dict[str, tuple[Callable[[Any], dict[str, Any]], dict[str, str], str]] = {
    "llava_next": (_tiles, _OF_LLAVA, "<image>\n"),
    "llava_onevision": (_onevision, _OF_LLAVA, "<image>\n"),
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "smolvlm": (_smolvlm, _OF_SMOLVLM, "<image>"),
    "idefics3": (lambda tokenizer: _smolvlm(tokenizer, "Idefics3"), _OF_SMOLVLM, "<image>"),
    "internvl": (
        _internvl,
        {"context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>", "video_token": "<video>"},
        "<IMG_CONTEXT>\n",
    ),
    "gemma3": (
        _gemma3,
        {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
        "<start_of_image>",
    ),
}


def processor(family: str) -> Any:
    """A processor of a family's class, without its part for videos."""
    make, special, written = MADE[family]
    plain = small_tokenizer()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer, eos_token=plain.eos_token, pad_token=plain.pad_token, extra_special_tokens=special
    )
    of_images = PROCESSOR_MAPPING[type(AutoConfig.for_model(family))]
    kind = without_videos(of_images, {})
    videos = {"video_processor": None} if "video_processor" in of_images.get_attributes() else {}
    # For the lengths of videos alone.
    processing_smolvlm.num2words = str
    return kind(tokenizer=tokenizer, chat_template=_TEMPLATE.replace("IMAGE", written.replace("\n", "\\n")), **make(tokenizer), **videos)


def save(family: str, folder: Path, **settings: Any) -> Path:
    """A folder with a tiny random model and its processor; what reads images is not tiny, so that answers depend on them."""
    torch.manual_seed(1)
    about, made = FAMILIES[family], processor(family)
    tokenizer, tokens = made.tokenizer, MADE[family][1]
    ids = {
        name: tokenizer.convert_tokens_to_ids(tokens[of])
        for name, of in (("image_token_id", "image_token"), ("image_token_id", "context_image_token"), ("video_token_id", "video_token"))
        if of in tokens
    }
    own = {key: value for key, value in about.settings.items() if key != "image_grid_pinpoints"}
    tiles = {"image_grid_pinpoints": _PINPOINTS} if family.startswith("llava") else {}
    text = {**about.text, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(
        about.model_type, vision_config=about.vision, text_config={**text, **settings}, **ids, **own, **tiles, tie_word_embeddings=False
    )
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language_model" not in name and "text_model" not in name and "lm_head" not in name and parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def picture(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


# Sizes of the images of each row: two of different sizes, one, and text alone.
ROWS: Sequence[Sequence[tuple[int, int]]] = (((24, 24), (40, 24)), ((48, 24),), ())


def chat(number: int) -> dict[str, Any]:
    """A chat with the images of ROWS, as a row of a data set."""
    images = [picture(*size, seed=3 * number + at) for at, size in enumerate(ROWS[number % len(ROWS)])]
    asked = [*({"type": "image"} for _ in images), {"type": "text", "text": f"What is in picture {number}?"}]
    said = [{"role": "user", "content": asked}, {"role": "assistant", "content": "A fox slept in the yard."}]
    return {"messages": said, "images": images}


def chat_file(folder: Path, number: int) -> str:
    """A jsonl file of chats, with the pictures in files beside it."""
    folder.mkdir()
    rows = []
    for index in range(number):
        row = chat(index)
        names = [f"{index}_{at}.png" for at in range(len(row["images"]))]
        for name, image in zip(names, row["images"], strict=True):
            image.save(folder / name)
        said = "".join("<image>" for _ in names) + row["messages"][0]["content"][-1]["text"]
        chats = [{"role": "user", "content": said}, row["messages"][1]]
        rows.append({"messages": chats, "images": names})
    return jsonl(folder / "chats.jsonl", rows)
