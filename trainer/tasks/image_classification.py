"""Image classification."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import transformers
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from ...data.images.mixing import Mixing, soft_labels
from ...data.images.recipe import ImageRecipe, LabelledImageRecipe
from ...data.images.splits import ImageData, hub_images, scattered_digits
from ...data.images.transform import ImageTransform
from ...data.labels.classes import KnownClasses
from ...modules.backbones import adapter_for, families
from ..build.parts import RunParts
from ..losses.distillation import Distillation, load_teacher
from ..metrics.accuracy import Accuracy
from ..metrics.quality import Quality
from ..recipe.schema import ITSELF, Recipe
from ..task_module import TaskModule
from .base import Task
from .base_image import ImageTask

_CLASSIFIER_FOR = {
    "siglip_vision_model": "the whole SigLIP model (model_type siglip), whose classifier uses its vision tower only",
    "clip_vision_model": "the whole CLIP model (model_type clip), whose classifier uses its vision tower only",
    "vit_mae": "its encoder as a ViT: set model.encoder_of to the folder or hub name, in place of model.name or model.config",
}


class ImageClassificationModule(TaskModule):
    """Trains a classifier; mixing, label smoothing and a teacher if the recipe has them."""

    def __init__(self, task: type[Task], parts: RunParts) -> None:
        super().__init__(task, parts)
        recipe, data = parts.recipe, parts.recipe.data
        assert isinstance(data, LabelledImageRecipe)
        mixing, teacher = data.mixing, recipe.distillation
        self.mixing = None if mixing is None else Mixing(**mixing.model_dump(), seed=recipe.seed)
        self.label_smoothing = data.label_smoothing
        self.distillation: Distillation | None = (
            None if teacher is None else load_teacher(teacher, recipe.model, parts.model.config, parts.data.classes)
        )

    def losses(self, batch: dict[str, Any]) -> dict[str, Any]:
        trace = self.training_trace(batch)
        pixels, labels = self._prepared(batch)
        if trace is not None:
            trace.labels = labels
        options = self.with_trace(trace) | (self.distillation.student_options if self.distillation is not None else {})
        if labels.is_floating_point():
            # transformers' models accept integer labels only.
            out = self.model(pixel_values=pixels, **options)
            task_loss = functional.cross_entropy(out.logits.float(), labels)
        else:
            out = self.model(pixel_values=pixels, labels=labels, **options)
            task_loss = out.loss
        distilled = self.distillation(task_loss, out, pixels, trace) if self.distillation is not None else None
        return self.total(batch, task_loss if distilled is None else distilled.total, task_loss, trace, distilled)

    def _prepared(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Pixels, and labels: int64 (B,), or float32 (B, classes) if mixed or smoothed."""
        pixels, labels = batch["pixel_values"], batch["labels"]
        if self.mixing is None and not self.label_smoothing:
            return pixels, labels
        labels = soft_labels(labels, self.model.config.num_labels, self.label_smoothing)
        if self.mixing is None:
            return pixels, labels
        mixed = self.mixing(pixels, labels, self.global_step, batch["sample_ids"])
        return mixed.pixel_values, mixed.labels


class ImageClassification(ImageTask):
    """One label an image, with any backbone that has a classifier in transformers."""

    metric = "accuracy"
    quality: ClassVar[type[Quality]] = Accuracy

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        if recipe.distillation is not None and recipe.distillation.teacher == ITSELF:
            raise ValueError("distillation.teacher = 'self' is for chats about images: use dense_self, or name a run")

    @classmethod
    def model_class(cls, model_type: str) -> type[PreTrainedModel]:
        if model_type in families() and model_type not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
            raise ValueError(
                f"{model_type} has no image classification head in transformers: use weights of "
                f"{_CLASSIFIER_FOR.get(model_type, 'a family that has one, such as vit or dinov2')}"
            )
        name = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.get(model_type, model_type)
        # DeiT's mapping lists several heads; the plain one comes first.
        name = name if isinstance(name, str) else name[0]
        adapter_for(model_type, name)
        model: type[PreTrainedModel] = getattr(transformers, name)
        return model

    @classmethod
    def embedded_data(cls, recipe: ImageRecipe, seed: int, channels: int) -> ImageData:
        return scattered_digits(recipe.canvas, recipe.train_samples, recipe.eval_samples, seed, channels)

    @classmethod
    def hub_data(cls, recipe: LabelledImageRecipe, transform: ImageTransform, seed: int, known: KnownClasses | None) -> ImageData:
        return hub_images(recipe.source, recipe.splits, recipe.num_labels, transform, seed, recipe.max_bad_fraction, known)

    @classmethod
    def module(cls, parts: RunParts) -> TaskModule:
        return ImageClassificationModule(cls, parts)

    @classmethod
    def titles(cls, batch: Mapping[str, Any], data: ImageData) -> list[str]:
        return [data.classes[int(label)] for label in batch["labels"]]
