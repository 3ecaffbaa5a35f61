"""The matrix of the tests: families × methods of images, text encoders, causal and vision-language models. Names without
a kind are those of images."""

from __future__ import annotations

from . import decoders, encoders, vision, visual
from .case import Batch, Case, settle, spread, stack_of
from .method import Family, Method
from .vision import (
    BACKBONES,
    CLASSES,
    FAMILIES,
    IMAGE,
    LAYERS,
    METHODS,
    PAIRS,
    PATCH,
    answer,
    compressed,
    dense,
    images,
    inputs,
    labels,
    loss_of,
    masked_reference,
    traced,
)

CASES: list[Case] = [*vision.CASES, *encoders.CASES, *decoders.CASES, *visual.CASES]

__all__ = [
    "BACKBONES", "CASES", "CLASSES", "FAMILIES", "IMAGE", "LAYERS", "METHODS", "PAIRS", "PATCH",
    "Batch", "Case", "Family", "Method",
    "answer", "compressed", "decoders", "dense", "encoders", "images", "inputs", "labels", "loss_of", "masked_reference", "settle",
    "spread", "stack_of", "traced", "vision", "visual",
]  # fmt: skip
