"""Masked-image pretraining: the model reconstructs hidden patches from the visible ones. No labels are needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, ViTMAEForPreTraining

from ...data.images.recipe import ImageRecipe
from ...data.images.splits import ImageData, hub_images, scattered_digits
from ...data.images.transform import ImageTransform
from ...data.labels.classes import KnownClasses
from ...data.splits import Splits
from ...modules import registry
from ...modules.backbones import adapter_for
from ...modules.backbones.vision import pair
from ...modules.backbones.vit_mae import fill_positions, visible
from ...modules.tokens.draws import masking_order
from ..build.parts import RunParts
from ..metrics.predictions import Predictions
from ..metrics.quality import Quality
from ..metrics.reconstruction import Reconstruction
from ..recipe.schema import Recipe
from ..task_module import TaskModule
from .base import PROBES
from .base_image import ImageTask

# Evaluation masks do not depend on the run's seed, so that runs are comparable.
_EVALUATION_SEED = 0


class MaskedImageModule(TaskModule):
    """Trains the encoder and its decoder; the hidden patches of an image depend on (seed, step, sample id)."""

    def losses(self, batch: dict[str, Any], keep: float | None = None) -> dict[str, Any]:
        trace, pixels = self.training_trace(batch, keep), batch["pixel_values"]
        # Computed here, because the dense arm has no trace with the step.
        noise = masking_order(self.seed, self.global_step, batch["sample_ids"], patches_of(self.model.config))
        loss = self.model(pixel_values=pixels, noise=noise, **self.with_trace(trace)).loss
        return self.total(batch, loss, loss, trace)


class MaskedImagePretraining(ImageTask):
    """ViT-MAE (arXiv 2111.06377): the encoder gets the visible patches only, stages drop or merge more of them, and a restore gives the
    decoder one token for each visible patch."""

    metric = "reconstruction_loss"
    higher_is_better = False
    quality: ClassVar[type[Quality]] = Reconstruction

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        if recipe.distillation is not None:
            raise ValueError(
                "distillation is for tasks with labels, and masked_image_pretraining learns the pixels themselves, which no teacher knows "
                "better: remove distillation"
            )
        for stage in recipe.compression.stages if recipe.compression is not None else ():
            if registry.part_class("scorer", stage.part("scorer")).answers_task:
                raise ValueError(
                    f"stage {stage.key!r}: scorer {stage.part('scorer').name!r} learns from labels, and masked_image_pretraining has none: "
                    "use learned (with estimator key_bias or straight_through), bipartite, patch_energy, uniform_grid or random"
                )

    @classmethod
    def model_class(cls, model_type: str) -> type[PreTrainedModel]:
        if model_type != "vit_mae":
            raise ValueError(
                f"masked_image_pretraining trains vit_mae, which has the decoder for it, not {model_type}: set "
                "model.config.model_type=vit_mae; task image_classification then fine-tunes it as a ViT with model.encoder_of"
            )
        adapter_for(model_type, ViTMAEForPreTraining.__name__)
        return ViTMAEForPreTraining

    @classmethod
    def fresh_model(cls, config: PretrainedConfig, attention: str) -> PreTrainedModel:
        _check_masking(config)
        model = super().fresh_model(config, attention)
        # Skips parameters without values: on the meta device, or partitioned and filled later.
        if not any(parameter.is_meta or hasattr(parameter, "ds_id") for parameter in model.parameters()):
            fill_positions(model)
        return model

    @classmethod
    def embedded_data(cls, recipe: ImageRecipe, seed: int, channels: int) -> ImageData:
        # The labels are ignored.
        return replace(scattered_digits(recipe.canvas, recipe.train_samples, recipe.eval_samples, seed, channels), classes=[])

    @classmethod
    def fit_config(cls, config: PretrainedConfig, data: Splits) -> None:
        config.id2label, config.label2id = {}, {}

    @classmethod
    def hub_data(cls, recipe: ImageRecipe, transform: ImageTransform, seed: int, known: KnownClasses | None) -> ImageData:
        return hub_images(recipe.source, recipe.splits, None, transform, seed, recipe.max_bad_fraction, labelled=False)

    @classmethod
    def module(cls, parts: RunParts) -> TaskModule:
        return MaskedImageModule(cls, parts)

    @classmethod
    def loss(cls, model: PreTrainedModel, batch: Mapping[str, Any], **options: Any) -> Tensor:
        loss: Tensor = model(**cls.step_inputs(batch, model.config), **options).loss
        return loss

    @classmethod
    def predictions(cls, model: PreTrainedModel, out: Any, batch: Mapping[str, Any]) -> Predictions | None:
        return None

    @classmethod
    def step_inputs(cls, batch: Mapping[str, Tensor], config: PretrainedConfig) -> dict[str, Tensor]:
        return cls.evaluation_inputs(batch, config)

    @classmethod
    def evaluation_inputs(cls, batch: Mapping[str, Any], config: PretrainedConfig) -> dict[str, Tensor]:
        noise = masking_order(_EVALUATION_SEED, 0, batch["sample_ids"], patches_of(config))
        return {"pixel_values": batch["pixel_values"], "noise": noise}

    @classmethod
    def probe(cls, config: PretrainedConfig, tokens: int | None = None) -> dict[str, Tensor]:
        pixels = super().probe(config)
        return {**pixels, "noise": masking_order(_EVALUATION_SEED, 0, torch.arange(PROBES), patches_of(config))}

    @classmethod
    def truth(cls, batch: Mapping[str, Any], data: ImageData) -> np.ndarray | None:
        return _pictures(batch["pixel_values"])

    @classmethod
    def answer(cls, out: Any, data: ImageData) -> np.ndarray | None:
        rows, cells, values = out.logits.shape
        side, patch = round(cells**0.5), round((values / data.channels) ** 0.5)
        painted = out.logits.reshape(rows, side, side, patch, patch, data.channels).permute(0, 5, 1, 3, 2, 4)
        return _pictures(painted.reshape(rows, data.channels, side * patch, side * patch))


def patches_of(config: Any) -> int:
    """Patches of an image of the configured size."""
    (height, width), (down, across) = pair(config.image_size), pair(config.patch_size)
    return (height // down) * (width // across)


def _check_masking(config: Any) -> None:
    """Raises ValueError unless the mask hides some patches, leaves some, and the sizes fit position embeddings and patches."""
    seen, patches = visible(config, patches_of(config)), patches_of(config)
    if not 0 < seen < patches:
        raise ValueError(
            f"model.config.mask_ratio = {config.mask_ratio} leaves {seen} of {patches} patches: it is the hidden fraction, above 0 "
            "and below 1; 0.75 is usual for large images, 0.5 for few patches"
        )
    for key in ("hidden_size", "decoder_hidden_size"):
        if getattr(config, key) % 4:
            raise ValueError(f"model.config.{key} = {getattr(config, key)} must be a multiple of 4, for the position embeddings")
    if config.image_size % config.patch_size:
        raise ValueError(f"model.config.patch_size = {config.patch_size} must divide model.config.image_size = {config.image_size}")


def _pictures(pixels: Tensor) -> np.ndarray:
    """(B, channels, height, width) of any range -> (B, height, width, 3) uint8, each image scaled to its own minimum and maximum."""
    image = pixels.detach().float().cpu()
    low, high = image.amin((1, 2, 3), keepdim=True), image.amax((1, 2, 3), keepdim=True)
    image = ((image - low) / (high - low).clamp(min=1e-6)).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    shown: np.ndarray = (image.numpy() * 255).astype(np.uint8)
    return shown
