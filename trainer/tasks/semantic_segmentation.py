"""Semantic segmentation: a class for every pixel."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...data.images.masks import hub_masks
from ...data.images.recipe import ImageRecipe, MaskRecipe
from ...data.images.splits import ImageData, scattered_digits
from ...data.images.transform import ImageTransform
from ...data.labels.classes import KnownClasses
from ...modules.backbones import adapter_for
from ...modules.heads import own_models
from ...modules.tokens.labels import IGNORE_PIXEL
from ..build.parts import RunParts
from ..metrics.mean_iou import MeanIoU
from ..metrics.predictions import Predictions
from ..metrics.quality import Quality
from ..recipe.schema import Recipe
from ..task_module import TaskModule
from .base import check_teacher_itself
from .base_image import ImageTask

# Lines and columns of pixels of which one is compared: pixels beside each other are nearly the same.
_EVERY = 8


class SemanticSegmentation(ImageTask):
    """One class a pixel, with backbones that have a segmentation head in Laconic."""

    metric = "mean_iou"
    quality: ClassVar[type[Quality]] = MeanIoU

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        check_teacher_itself(recipe)

    @classmethod
    def at_labels(cls, logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
        return logits.movedim(1, -1)[batch["labels"] != IGNORE_PIXEL]

    @classmethod
    def label_shape(cls, rows: int, length: int) -> tuple[int, ...]:
        return rows, length, length

    @classmethod
    def predictions(cls, model: PreTrainedModel, out: Any, batch: Mapping[str, Any]) -> Predictions | None:
        logits, labels = out.logits[..., ::_EVERY, ::_EVERY], batch["labels"][..., ::_EVERY, ::_EVERY]
        return Predictions.of(cls.at_labels(logits, {"labels": labels}), labels[labels != IGNORE_PIXEL])

    @classmethod
    def model_class(cls, model_type: str) -> type[PreTrainedModel]:
        heads = {model.config_class.model_type: model for name, model in own_models().items() if name.endswith("ForSemanticSegmentation")}
        if model_type not in heads:
            if model_type == "beit":
                adapter_for(model_type, "BeitForSemanticSegmentation")
            raise ValueError(f"{model_type} has no head for semantic segmentation here: use model_type {' or '.join(sorted(heads))}")
        return heads[model_type]

    @classmethod
    def embedded_data(cls, recipe: ImageRecipe, seed: int, channels: int) -> ImageData:
        return scattered_digits(recipe.canvas, recipe.train_samples, recipe.eval_samples, seed, channels, pixel_labels=True)

    @classmethod
    def hub_data(cls, recipe: MaskRecipe, transform: ImageTransform, seed: int, known: KnownClasses | None) -> ImageData:
        # Masks hold numbers, and the classes of such a model are numbers too: there are no names to compare.
        if recipe.num_labels is None or recipe.num_labels > IGNORE_PIXEL:
            raise ValueError(
                f"data.num_labels = {recipe.num_labels} must be the number of classes in the masks, from 2 to {IGNORE_PIXEL}: finding it "
                "would need all pixels of all masks; pixels of data.ignore_index have no class"
            )
        return hub_masks(recipe.source, recipe.splits, recipe.num_labels, recipe.ignore_index, transform, seed)

    @classmethod
    def module(cls, parts: RunParts) -> TaskModule:
        return TaskModule(cls, parts)

    @classmethod
    def titles(cls, batch: Mapping[str, Any], data: ImageData) -> list[str]:
        """The largest class of each image, without the class that is largest over all images."""
        counts = torch.stack([torch.bincount(labels[labels != IGNORE_PIXEL], minlength=len(data.classes)) for labels in batch["labels"]])
        counts[:, counts.sum(0).argmax()] = 0
        return [data.classes[int(row.argmax())] if row.any() else "" for row in counts]

    @classmethod
    def truth(cls, batch: Mapping[str, Any], data: ImageData) -> np.ndarray:
        return _painted(batch["labels"], len(data.classes))

    @classmethod
    def answer(cls, out: Any, data: ImageData) -> np.ndarray:
        return _painted(out.logits.argmax(1), len(data.classes))


def _painted(labels: Tensor, classes: int) -> np.ndarray:
    """(B, height, width) classes -> (B, height, width, 3) uint8, one colour a class; black for pixels without a class."""
    colours = np.zeros((IGNORE_PIXEL + 1, 3), np.uint8)
    for code in range(classes):
        # Steps of the golden ratio give neighbouring classes different hues, for any number of classes.
        colours[code] = [round(255 * part) for part in colorsys.hsv_to_rgb(code * 0.618034 % 1, 0.65, 0.5 + 0.4 * (code % 2))]
    return colours[labels.cpu().numpy()]
