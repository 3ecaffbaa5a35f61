"""The ``data`` block of recipes with images: without labels, with one label an image, or with one class a pixel."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from ..embedded.canvas import Canvas
from ..recipe import Block, DataRecipe, Fraction
from ..source import DataSource
from .random_augment import RandomAugment

DRAWN = "scattered_digits"


class ImageRecipe(DataRecipe):
    """Keys of every kind of images."""

    known: ClassVar[tuple[str, ...]] = (DRAWN, "imagefolder", "parquet", "json", "csv")

    name: str = Field(DRAWN, description="scattered_digits (comes with Laconic), imagefolder, parquet, json, csv, or a hub name")
    data_dir: str | None = Field(None, description="folder of an imagefolder or of other files")
    image_column: str | None = Field(None, description="column with the images; null finds it")
    mean: list[float] | None = Field(
        None, description="subtracted from pixels in [0, 1], one value or one a channel; null uses the values of the model's processor"
    )
    std: list[Annotated[float, Field(gt=0)]] | None = Field(
        None, description="divides pixels, one value or one a channel; null uses the values of the model's processor"
    )
    augmentation: Literal["none", "flip", "crop_flip", "resized_crop_flip"] = Field("none", description="augmentation of training images")
    canvas: Canvas = Field(default_factory=Canvas, description="images of scattered_digits: size, scrambled, pieces")

    @model_validator(mode="after")
    def _drawn(self) -> ImageRecipe:
        for key, value in self.augmentations.items() if self.name == DRAWN else ():
            if value not in ("none", None, 0):
                raise ValueError(
                    f"data.{key} applies to image files, and data.name = {DRAWN!r} generates its images: remove it; data.mixing and "
                    "data.label_smoothing work on any images with labels"
                )
        return self

    @property
    def augmentations(self) -> dict[str, Any]:
        """Augmentation of training images, by attribute of ``ImageTransform``."""
        return {"augmentation": self.augmentation}

    @property
    def source(self) -> DataSource:
        return replace(super().source, image_column=self.image_column)


class AugmentedImageRecipe(ImageRecipe):
    """Images whose augmentation does not change their labels."""

    random_augment: RandomAugment | None = Field(None, description="RandAugment of training images: operations (2) and magnitude (9 of 10)")
    erase: Fraction = Field(0.0, description="probability that a box of a training image is replaced by noise")

    @property
    def augmentations(self) -> dict[str, Any]:
        return {**super().augmentations, "random_augment": self.random_augment, "erase": self.erase}


class UnlabelledImageRecipe(AugmentedImageRecipe):
    """Images alone; a column of labels is ignored."""

    holds: ClassVar[str] = "images without labels"


class MixingRecipe(Block):
    """Mixup and cutmix of rows of one process's batch."""

    mixup: Annotated[float, Field(ge=0)] = Field(0.0, description="α of mixup's Beta(α, α); 0 turns mixup off; 0.8 is usual")
    cutmix: Annotated[float, Field(ge=0)] = Field(0.0, description="α of cutmix's Beta(α, α); 0 turns cutmix off; 1.0 is usual")
    probability: Fraction = Field(1.0, description="share of the images that are mixed")
    switch: Fraction = Field(0.5, description="if both are on, share of the mixed images that use cutmix")

    @model_validator(mode="after")
    def _something(self) -> MixingRecipe:
        if not self.mixup and not self.cutmix:
            raise ValueError("data.mixing mixes nothing: set data.mixing.mixup or data.mixing.cutmix above 0, or data.mixing=null")
        return self


class LabelledImageRecipe(AugmentedImageRecipe):
    """Images with one label each."""

    holds: ClassVar[str] = "images with one label each"

    label_column: str | None = Field(None, description="column with the labels; null looks for a usual name")
    num_labels: Annotated[int, Field(ge=2)] | None = Field(None, description="number of classes; null counts them")
    mixing: MixingRecipe | None = Field(None, description="mixup and cutmix of training images: mixup, cutmix, probability, switch")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of a training label that is spread over all classes"
    )

    @property
    def source(self) -> DataSource:
        return replace(super().source, label_column=self.label_column)


class MaskRecipe(ImageRecipe):
    """Images with one class a pixel. No mixing, label smoothing, RandAugment or erasing: they would not change the masks accordingly."""

    holds: ClassVar[str] = "images with masks"

    mask_column: str | None = Field(None, description="column with the masks, one number a pixel; null looks for a usual name")
    ignore_index: Annotated[int, Field(ge=0, le=65535)] = Field(
        255, description="mask value of pixels without a class; they are left out of the loss and the metric"
    )
    num_labels: Annotated[int, Field(ge=2)] | None = Field(None, description="number of classes; required for files and hub names")

    @property
    def source(self) -> DataSource:
        return replace(super().source, mask_column=self.mask_column)
