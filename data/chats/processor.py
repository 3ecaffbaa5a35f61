"""Processors of vision-language models: loaded, or made for a new model."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from ..text.tokenizer import trained_tokenizer
from .without_videos import load_without_videos

IMAGE = "<image>"
# Text parts and images in their order; an answer ends with the end-of-text token.
_TEMPLATE = (
    "{% for message in messages %}{{ '' if loop.first else '\\n' }}{{ message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nassistant\\n' }}{% endif %}"
)


def load_processor(source: str, revision: str | None = None) -> Any:
    """The processor of a folder or hub name, with image processing by Pillow, as training and export use it, and without a part for videos.

    Raises:
        ValueError: there is none, a package that it needs is missing, or it has no image processor and tokenizer.
    """
    from transformers import AutoProcessor

    try:
        processor = load_without_videos(source, revision)
        if processor is None:
            processor = AutoProcessor.from_pretrained(source, revision=revision, trust_remote_code=False, backend="pil")
    except ImportError as error:
        raise ValueError(
            f"the processor of {source!r} needs a package that is not installed: {' '.join(str(error).split())[:300]}"
        ) from None
    except (OSError, ValueError) as error:
        hint = "" if os.path.isdir(source) else " (a folder of that name does not exist)"
        raise ValueError(f"no processor in {source!r}{hint}: set data.processor to a folder or hub name: {str(error)[:300]}") from None
    if getattr(processor, "tokenizer", None) is None:
        raise ValueError(f"{source!r} has a {type(processor).__name__}, which has no tokenizer: it is no vision-language model")
    return processor


def with_image_size(processor: Any, side: int) -> None:
    """Gives a processor the image size of the model, in place: the model's weights are right, and a processor is often of another one."""
    images = processor.image_processor
    for name in ("size", "crop_size"):
        size = getattr(images, name, None)
        if size is not None:
            setattr(images, name, type(size)(**dict.fromkeys((key for key, value in dict(size).items() if value is not None), side)))


def made_processor(texts: Iterable[str], entries: int, image_size: int, patch_size: int, strategy: str, class_tokens: int) -> Any:
    """A LLaVA processor for a new model.

    Args:
        texts: texts that the tokenizer is trained on.
        entries: largest number of entries of its vocabulary, the placeholder of images included.
        image_size: height and width that images are resized to, in pixels.
        patch_size: height and width of a patch.
        strategy: ``vision_feature_select_strategy`` of the model, ``default`` or ``full``.
        class_tokens: tokens of the tower that are no patches.
    """
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    tokenizer = trained_tokenizer(texts, entries - 1)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    size = {"height": image_size, "width": image_size}
    pixels = CLIPImageProcessorPil(
        size=size, crop_size=size, do_center_crop=False, do_convert_rgb=True, image_mean=[0.0] * 3, image_std=[1.0] * 3
    )
    return LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=class_tokens,
        chat_template=_TEMPLATE,
    )
