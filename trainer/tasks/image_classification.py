"""Image classification."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import transformers
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from ...data.images.mixing import Mixing, soft_labels
from ...data.images.recipe import ImageRecipe, LabelledImageRecipe
from ...data.images.splits import ImageData, hub_images, scattered_digits
from ...data.images.transform import ImageTransform
from ...data.labels.classes import KnownClasses
from ...modules.backbones import adapter_for, families
from ...modules.checkpoints.foreign_config import load_config
from ..build.image_size import load_at_own_size
from ..build.parts import RunParts
from ..metrics.accuracy import Accuracy
from ..metrics.quality import Quality
from ..recipe.schema import ITSELF, ModelRecipe, Recipe
from ..task_module import TaskModule
from .base import Task, check_teacher_itself, give_labels
from .base_image import ImageTask, image_input

_CLASSIFIER_FOR = {
    "siglip_vision_model": "the whole SigLIP model (model_type siglip), whose classifier uses its vision tower only",
    "clip_vision_model": "the whole CLIP model (model_type clip), whose classifier uses its vision tower only",
    "vit_mae": "its encoder as a ViT: set model.encoder_of to the folder or hub name, in place of model.name or model.config",
}


class ImageClassificationModule(TaskModule):
    """Trains a classifier, on mixed images and smoothed labels if the recipe has them."""

    def __init__(self, task: type[Task], parts: RunParts) -> None:
        super().__init__(task, parts)
        recipe, data = parts.recipe, parts.recipe.data
        assert isinstance(data, LabelledImageRecipe)
        mixing = data.mixing
        self.mixing = None if mixing is None else Mixing(**mixing.model_dump(), seed=recipe.seed)
        self.label_smoothing = data.label_smoothing

    def prepared(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with mixed images if they are mixed, and with float32 (B, classes) labels if they are mixed or smoothed."""
        pixels, labels = batch["pixel_values"], batch["labels"]
        if self.mixing is None and not self.label_smoothing:
            return batch
        labels = soft_labels(labels, self.model.config.num_labels, self.label_smoothing)
        if self.mixing is None:
            return {**batch, "labels": labels}
        mixed = self.mixing(pixels, labels, self.global_step, batch["sample_ids"])
        return {**batch, "pixel_values": mixed.pixel_values, "labels": mixed.labels}


class ImageClassification(ImageTask):
    """One label an image, with any backbone that has a classifier in transformers."""

    metric = "accuracy"
    resizes = True
    quality: ClassVar[type[Quality]] = Accuracy

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        if recipe.distillation is not None and recipe.distillation.teacher == ITSELF:
            check_teacher_itself(recipe)

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
    def loaded_model(cls, recipe: ModelRecipe, config: PretrainedConfig, **options: Any) -> Any:
        load = super().loaded_model
        if recipe.image_scale == 1:
            return load(recipe, config, **options)
        assert recipe.name is not None
        own, _ = image_input(load_config(recipe.name, recipe.revision))
        return load_at_own_size(lambda of: load(recipe, of, **options), config, own)

    @classmethod
    def step(cls, model: PreTrainedModel, batch: Mapping[str, Any], **options: Any) -> tuple[Tensor, Any]:
        if not batch["labels"].is_floating_point():
            return super().step(model, batch, **options)
        # transformers' models accept integer labels only.
        give_labels(options, batch)
        out = model(pixel_values=batch["pixel_values"], **options)
        return functional.cross_entropy(out.logits.float(), batch["labels"]), out

    @classmethod
    def downsampled(cls, recipe: Recipe, scale: float) -> list[str]:
        return [f"model.image_scale={scale}"]

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
