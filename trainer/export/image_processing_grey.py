"""Image processor of a model of grey images, copied into its export: transformers' pipelines convert every image to RGB.

Loads with ``AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)``.
"""

from __future__ import annotations

from typing import Any

from PIL.Image import Image
from transformers import ViTImageProcessor


class GreyImageProcessor(ViTImageProcessor):
    """Converts images to grey first; arrays and tensors must have one channel already."""

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        """As in ViTImageProcessor, for an image or a list of images."""
        grey = [_grey(image) for image in images] if isinstance(images, list | tuple) else _grey(images)
        return super().preprocess(grey, *args, **kwargs)


def _grey(image: Any) -> Any:
    # By way of RGB, as in training: the direct way rounds otherwise for some modes.
    return image.convert("RGB").convert("L") if isinstance(image, Image) else image
