"""Image processor, tokenizer or processor of an export, in the files that transformers reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoTokenizer

from ...data.chats.processor import load_processor
from ...data.images.recipe import DRAWN, ImageRecipe
from ...modules.checkpoints.whole_files import write_file, write_json
from ..recipe.schema import Recipe
from ..run_folder import PROCESSOR, PROCESSOR_OF_CHATS, TOKENIZER
from ..tasks.base import task_named
from ..tasks.base_image import ImageTask, image_input, with_normalisation
from . import image_processing_grey
from .source import ExportSource


def save_preprocessing(source: ExportSource, folder: Path, with_code: bool) -> None:
    """Writes the image processor of an image task, and the processor or tokenizer that is beside the weights.

    Args:
        source: the model.
        folder: folder of the export.
        with_code: the folder may have Python code, which the processor of a grey model needs.
    """
    config: Any = source.model.config
    if issubclass(task_named(source.recipe.task), ImageTask):
        settings = image_processor(source.recipe, config)
        if not with_code:
            settings.pop("auto_map", None)
        write_json(folder / PROCESSOR, settings)
        if "auto_map" in settings:
            write_file(folder / Path(image_processing_grey.__file__).name, Path(image_processing_grey.__file__).read_text("utf-8"))
    if (place := source.run.with_file(PROCESSOR_OF_CHATS)) is not None:
        load_processor(str(place)).save_pretrained(folder)
    elif (place := source.run.with_file(TOKENIZER)) is not None:
        AutoTokenizer.from_pretrained(place, trust_remote_code=False).save_pretrained(folder)


def image_processor(recipe: Recipe, config: Any) -> dict[str, Any]:
    """Settings of a transformers image processor equal to evaluation: resize the shorter side, crop the centre, normalise."""
    size, channels = image_input(config)
    data = with_normalisation(recipe).data
    assert isinstance(data, ImageRecipe)
    assert data.mean is not None
    assert data.std is not None
    # The embedded digits are numbers in [0, 1] already and are not normalised.
    normalised = data.name != DRAWN
    # transformers cannot convert to grey: the export of a grey model carries a processor that does.
    name = f"{image_processing_grey.__name__.rpartition('.')[2]}.{image_processing_grey.GreyImageProcessor.__name__}"
    return {
        **({"auto_map": {"AutoImageProcessor": name}} if channels == 1 else {}),
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": int(Image.Resampling.BICUBIC),
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": normalised,
        "image_mean": data.mean * (channels if len(data.mean) == 1 else 1),
        "image_std": data.std * (channels if len(data.std) == 1 else 1),
    }
