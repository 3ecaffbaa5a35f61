"""The shared parts of image tasks: data, inputs, pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin

from ...data.images.recipe import DRAWN, ImageRecipe
from ...data.images.resized import resized
from ...data.images.splits import ImageData
from ...data.images.transform import ImageTransform
from ...data.labels.classes import KnownClasses
from ...data.rows import collate, good_rows
from ...data.splits import Splits
from ...modules.backbones import families
from ...modules.backbones.vision import VisionModel, pair
from ...modules.checkpoints.foreign_config import settings_errors
from ...modules.tokens.trace import Trace
from ..build.heads import trained_classes
from ..build.image_size import scaled_side
from ..build.initial_weights import encoder_weights, start_of
from ..build.parts import RunParts
from ..metrics.kept_places import kept_cells
from ..recipe.schema import Recipe
from ..run_folder import RunFolder
from ..show.pictures import PICTURED, draw_arms, overlays, save_kept_tokens
from .base import PROBES, fit_classes, give_labels
from .base_logits import LogitsTask

# Largest side of an image, and number of channels.
LARGEST = 65_536


class ImageTask(LogitsTask):
    """A task whose model input is ``pixel_values``.

    Attributes:
        resizes: images of another size are the same task; pixels that are predicted or labelled would be others.
    """

    resizes: ClassVar[bool] = False

    unit: ClassVar[str] = "images"
    length_unit: ClassVar[str] = "pixels"
    item: ClassVar[str] = "images"
    controls: ClassVar[tuple[str, ...]] = ("random", "uniform_grid", "patch_energy")

    @classmethod
    def resolved(cls, recipe: Recipe) -> Recipe:
        # The embedded digits are not normalised.
        return recipe if recipe.data.name == DRAWN else with_normalisation(recipe)

    @classmethod
    def open_data(cls, recipe: Recipe, config: PretrainedConfig, known: KnownClasses | None = None) -> ImageData:
        return _open_data(cls, recipe, config, known)

    @classmethod
    def fit_config(cls, config: PretrainedConfig, data: Splits) -> None:
        fit_classes(config, data)

    @classmethod
    def step(cls, model: PreTrainedModel, batch: Mapping[str, Any], **options: Any) -> tuple[Tensor, Any]:
        give_labels(options, batch)
        out = model(**cls.step_inputs(batch, model.config), **options)
        return out.loss, out

    @classmethod
    def forward(cls, model: PreTrainedModel, batch: Mapping[str, Any], **options: Any) -> Any:
        return model(**cls.evaluation_inputs(batch, model.config), **options)

    @classmethod
    def step_inputs(cls, batch: Mapping[str, Tensor], config: PretrainedConfig) -> dict[str, Tensor]:
        """Inputs from a batch with which the model of a config computes its own loss."""
        return {"pixel_values": batch["pixel_values"], "labels": batch["labels"]}

    @classmethod
    def evaluation_inputs(cls, batch: Mapping[str, Any], config: PretrainedConfig) -> dict[str, Tensor]:
        """Inputs from a batch for a forward without labels."""
        return {"pixel_values": batch["pixel_values"]}

    @classmethod
    def probe(cls, config: PretrainedConfig, tokens: int | None = None) -> dict[str, Tensor]:
        size, channels = image_input(config)
        return {"pixel_values": torch.rand(PROBES, channels, size, size, generator=torch.Generator().manual_seed(0))}

    @classmethod
    def kept_cells(cls, model: PreTrainedModel, trace: Trace, batch: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        return kept_cells(trace, dict.fromkeys(trace.routings, ""))

    @classmethod
    def draw(cls, arms: Mapping[str, RunParts], folder: Path) -> None:
        draw_arms(arms, RunFolder(folder).kept_tokens)

    @classmethod
    def inspect(cls, target: str, recipe: Recipe, model: PreTrainedModel, given: str | None, to: Path) -> Mapping[str, float]:
        if given is not None:
            raise ValueError(
                "--input is for text; for images, the first held-out ones are shown: remove --input, or set data.data_dir to other images"
            )
        if to.suffix != ".png":
            raise ValueError(f"--to {to}: pictures of kept tokens need the suffix .png")
        data = cls.open_data(cls.resolved(recipe), model.config, trained_classes(model.config, target))
        batch = collate(good_rows(data.test, PICTURED))
        trace = Trace(seed=recipe.seed, sample_ids=batch["sample_ids"])
        with torch.no_grad():
            cls.forward(model, batch, trace=trace)
        save_kept_tokens(to, [("kept", overlays(trace, PICTURED))], cls.titles(batch, data))
        return {name: routing.achieved for name, routing in trace.routings.items()}

    @classmethod
    def pooled(cls, recipe: Recipe, keep: float) -> list[str]:
        restores = {} if recipe.compression is None else recipe.compression.restores
        # What is pooled has the state of its square.
        restore = "".join(f", restore: {{layer: {where.layer}, by: unmerge}}" for where in restores.values())
        merger = "{name: nearest, corners: true}"
        return [f"compression={{stages: [{{layer: 0, scorer: uniform_grid, merger: {merger}, keep: {keep}}}]{restore}}}"]

    @classmethod
    def at_length(cls, recipe: Recipe, config: PretrainedConfig, length: int) -> list[str]:
        (side, _), patch = image_input(config), size_of_patch(config)
        if length % patch:
            raise ValueError(f"the side of an image must be a multiple of the model's patches, which have {patch} pixels")
        if length == side:
            return []
        if recipe.model.config is not None:
            return [f"model.config.image_size={length}", "model.image_scale=1"]
        if not cls.resizes or recipe.model.name is None:
            raise ValueError(f"weights that are loaded for task = {recipe.task} have images of one size, {side} pixels: set model.config")
        return [f"model.image_scale={recipe.model.image_scale * length / side}"]

    @classmethod
    def noise(cls, config: PretrainedConfig, rows: int, length: int) -> dict[str, Any]:
        draws, (_, channels) = torch.Generator().manual_seed(0), image_input(config)
        return {
            "pixel_values": torch.rand(rows, channels, length, length, generator=draws),
            "labels": torch.randint(config.num_labels, cls.label_shape(rows, length), generator=draws),
            "sample_ids": torch.arange(rows),
        }

    @classmethod
    def label_shape(cls, rows: int, length: int) -> tuple[int, ...]:
        """Shape of the labels of images of a side in pixels."""
        return (rows,)

    @classmethod
    def embedded_data(cls, recipe: ImageRecipe, seed: int, channels: int) -> ImageData:
        """The splits of ``scattered_digits``, with 1 channel or 3."""
        raise NotImplementedError

    @classmethod
    def hub_data(cls, recipe: Any, transform: ImageTransform, seed: int, known: KnownClasses | None) -> ImageData:
        """The splits of any data set of Hugging Face ``datasets``.

        Args:
            recipe: ``data`` block of the task's kind of data.
            transform: converts a decoded image to pixels.
            seed: seed of the augmentation.
            known: classes of the trained model; None if it has none.
        """
        raise NotImplementedError

    @classmethod
    def titles(cls, batch: Mapping[str, Any], data: ImageData) -> list[str]:
        """Title of each image of a batch, for its picture."""
        return [""] * len(batch["pixel_values"])

    @classmethod
    def truth(cls, batch: Mapping[str, Any], data: ImageData) -> np.ndarray | None:
        """(B, height, width, 3) uint8 pictures of the labels; None if labels are not pictures."""
        return None

    @classmethod
    def answer(cls, out: Any, data: ImageData) -> np.ndarray | None:
        """(B, height, width, 3) uint8 pictures of the model's answers; None if answers are not pictures."""
        return None


def image_input(config: Any) -> tuple[int, int]:
    """(side in pixels, channels) of a model's images. Raises ValueError if its images are not square."""
    adapter = families()[config.model_type]
    assert issubclass(adapter, VisionModel)
    with settings_errors("model.config.image_size and num_channels"):
        height, width, channels = adapter.image_input(config)
    if not all(isinstance(value, int) and 0 < value <= LARGEST for value in (height, width, channels)):
        raise ValueError(f"model.config: an image of {height} × {width} pixels and {channels} channels; each must be from 1 to {LARGEST:,}")
    if height != width:
        raise ValueError(f"model.config.image_size = {(height, width)}: images are cropped to squares, set one number")
    if channels not in (1, 3):
        raise ValueError(f"model.config.num_channels = {channels}: images have 3 channels (RGB) or 1 (grey), set one of them")
    return height, channels


def size_of_patch(config: Any) -> int:
    """Side of a patch in pixels."""
    adapter = families()[config.model_type]
    assert issubclass(adapter, VisionModel)
    settings: Any = adapter.stack_config(config)
    with settings_errors("model.config.patch_size"):
        return pair(settings.patch_size)[0]


def with_normalisation(recipe: Recipe) -> Recipe:
    """The recipe with ``data.mean`` and ``data.std`` filled in: from the recipe itself, else from the run of ``model.name``, else from the
    model's image processor, else 0.5."""
    data, found = recipe.data, dict[str, Any]()
    assert isinstance(data, ImageRecipe)
    start = start_of(recipe.model)
    weights = start.weights if start is not None else None if recipe.model.encoder_of is None else encoder_weights(recipe.model)
    if start is not None and start.run is not None and start.run.recipe.is_file():
        before = start.run.read_recipe().data
        found = {f"image_{key}": getattr(before, key, None) for key in ("mean", "std")}
    elif weights is not None and (data.mean is None or data.std is None):
        try:
            found, _ = ImageProcessingMixin.get_image_processor_dict(weights, revision=recipe.model.revision)
        except OSError:
            # Weights without a processor, such as a model trained here from random weights.
            found = {}
        _check_numbers(found, weights)
    half = [0.5]
    mean = data.mean if data.mean is not None else found.get("image_mean") or half
    std = data.std if data.std is not None else found.get("image_std") or half
    return recipe.model_copy(update={"data": data.model_copy(update={"mean": list(mean), "std": list(std)})})


def _check_numbers(processor: Any, weights: str) -> None:
    """Raises ValueError unless the mean and deviation in an image processor's file are lists of numbers."""
    for key in ("image_mean", "image_std"):
        values = processor.get(key) or []
        if not isinstance(values, list) or not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            raise ValueError(f"{weights}: {key} = {values!r} of its image processor must be a list of numbers: set data.mean and data.std")


def _open_data(task: type[ImageTask], whole: Recipe, config: Any, known: KnownClasses | None) -> ImageData:
    """The splits of a recipe as inputs for the model of ``config``."""
    recipe, seed = with_normalisation(whole).data, whole.seed
    assert isinstance(recipe, ImageRecipe)
    assert recipe.mean is not None
    assert recipe.std is not None
    size, channels = image_input(config)
    if whole.model.image_scale != 1 and not task.resizes:
        raise ValueError(
            f"model.image_scale = {whole.model.image_scale} would change the pixels that task = {whole.task} is about: remove it"
        )
    if recipe.name == DRAWN:
        drawn, scale = recipe.canvas.size, whole.model.image_scale
        if size != scaled_side(drawn, size_of_patch(config), scale):
            raise ValueError(f"data.canvas.size = {drawn} does not fit model.config: image_size = {size}")
        data = task.embedded_data(recipe, seed, channels)
        return data if size == drawn else resized(data, size)
    mean, std = _per_channel(recipe.mean, channels), _per_channel(recipe.std, channels)
    return task.hub_data(recipe, ImageTransform(size, channels, mean, std, **recipe.augmentations), seed, known)


def _per_channel(values: list[float], channels: int) -> tuple[float, ...]:
    if len(values) not in (1, channels):
        raise ValueError(f"data.mean and data.std must have 1 or {channels} values, not {len(values)}")
    return tuple(values) * (channels if len(values) == 1 else 1)
