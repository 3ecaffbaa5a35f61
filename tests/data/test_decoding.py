"""Decoding of every mode, orientation and depth: as ``datasets`` and transformers' pipelines decode, or refused."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor
from transformers.image_utils import load_image

from laconic.data.images.decoding import Unusable, class_of_pixels, decode, in_colours
from laconic.data.images.masks import MaskRows
from laconic.data.images.transform import ImageRows, ImageTransform
from tests.data.folders import picture

ORIENTATIONS = (None, 1, 2, 3, 4, 5, 6, 7, 8)
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F")


def _image(mode: str, clear: bool = False, high: int = 255) -> Image.Image:
    """An image of 12 × 9 pixels, with transparent pixels or with deep values if requested."""
    colours = picture(0, 12).crop((0, 0, 12, 9))
    if mode in ("I;16", "I", "F"):
        numbers = np.linspace(0, high, 108).reshape(9, 12)
        return Image.fromarray(numbers.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    image = colours.convert("L") if mode in ("1", "L", "LA") else colours
    if mode in ("LA", "PA", "RGBA"):
        image = image.convert("P" if mode == "PA" else mode)
        alpha = Image.new("L", image.size, 255)
        if clear:
            alpha.putpixel((3, 3), 0)
        image.putalpha(alpha)
        return image
    if mode == "LAB":
        return Image.merge("LAB", colours.split())
    return image.convert(mode)


def _files() -> Iterator[tuple[str, bytes]]:
    """Every mode that each format can hold, in every orientation."""
    for mode in MODES:
        for clear in (False, True) if "A" in mode and mode != "LAB" else (False,):
            for high in (255, 4095, 65535) if mode in ("I;16", "I", "F") else (255,):
                for file in FORMATS:
                    for orientation in ORIENTATIONS:
                        exif = Image.Exif()
                        if orientation is not None:
                            exif[0x0112] = orientation
                        buffer = io.BytesIO()
                        try:
                            _image(mode, clear, high).save(buffer, file, exif=exif)
                        except (OSError, ValueError, KeyError):
                            continue
                        yield f"{mode} {file} {orientation} clear={clear} high={high}", buffer.getvalue()


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(_files())


def test_every_file_decodes_as_datasets_decodes_it(files: dict[str, bytes]) -> None:
    assert len(files) > 300
    feature = datasets.Image()
    for name, content in files.items():
        value = {"bytes": content, "path": None}
        ours, theirs = decode(value), feature.decode_example(value)
        assert (ours.mode, ours.size) == (theirs.mode, theirs.size), name
        assert np.array_equal(np.asarray(ours), np.asarray(theirs)), name


@pytest.mark.parametrize("channels", [3, 1])
def test_every_file_has_the_pixels_of_a_pipeline_or_is_refused(files: dict[str, bytes], channels: int) -> None:
    """A pipeline calls load_image and the processor; the processor may also be given the decoded image itself."""
    size, processor = 8, ViTImageProcessor(**_settings(8, 3))
    transform = ImageTransform(size, 3, (0.5,) * 3, (0.5,) * 3)
    refused = set()
    for name, content in files.items():
        row = {"image": {"bytes": content, "path": None}}
        item = ImageRows([row], "image", None, {}, transform if channels == 3 else ImageTransform(size, 1), None)[0]
        if "bad" in item:
            refused.add((name.split(" ")[0], *name.split(" ")[3:], item["bad"].reason.split(",")[0].split(" with")[-1]))
            continue
        seen = load_image(Image.open(io.BytesIO(content)))
        if channels == 1:
            assert torch.equal(item["pixel_values"], ImageTransform(size, 1)(seen, None)), name
            continue
        # The orientation is gone when an image is decoded: once is enough for the processor by itself.
        for given in (seen, decode(row["image"])) if " None " in name else (seen,):
            if given.mode in ("I", "I;16"):
                # An image processor by itself does not read these; a pipeline converts them before.
                continue
            expected = processor(given, return_tensors="pt")["pixel_values"][0]
            torch.testing.assert_close(item["pixel_values"], expected, rtol=0, atol=1e-6, msg=name)
    assert {mode for mode, *_ in refused} == {"LA", "PA", "RGBA", "I;16", "I", "F"}
    assert {(mode, high) for mode, clear, high, _ in refused if mode in ("I;16", "I")} == {
        (mode, f"high={high}") for mode in ("I;16", "I") for high in (4095, 65535)
    }
    assert all(clear == "clear=True" for mode, clear, *_ in refused if mode in ("LA", "PA", "RGBA"))


def _settings(size: int, channels: int) -> dict[str, object]:
    return {
        "do_convert_rgb": True,
        "size": {"shortest_edge": size},
        "resample": int(Image.Resampling.BICUBIC),
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "image_mean": [0.5] * channels,
        "image_std": [0.5] * channels,
    }


def test_sides_are_rounded_as_an_image_processor_rounds_them() -> None:
    processor, transform = ViTImageProcessor(**_settings(16, 3)), ImageTransform(16, 3, (0.5,) * 3, (0.5,) * 3)
    for width in (1, 2, 7, 16, 17, 25, 29, 50):
        for height in (1, 3, 15, 16, 26, 30):
            image = Image.fromarray(np.random.default_rng(width).integers(0, 255, (height, width, 3), np.uint8))
            expected = processor(image, return_tensors="pt")["pixel_values"][0]
            torch.testing.assert_close(transform(image, None), expected, rtol=0, atol=1e-6, msg=f"{width} × {height}")


def test_an_image_turned_by_its_orientation_is_trained_as_it_is_seen() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48)).save(buffer, "JPEG", exif=exif)
    assert decode({"bytes": buffer.getvalue(), "path": None}).size == (48, 64)


def test_the_mode_of_a_column_is_kept() -> None:
    buffer = io.BytesIO()
    _image("RGBA", clear=True).save(buffer, "PNG")
    rows = [{"image": {"bytes": buffer.getvalue(), "path": None}}]
    assert "bad" in ImageRows(rows, "image", None, {}, ImageTransform(8), None)[0]
    assert "bad" not in ImageRows(rows, "image", None, {}, ImageTransform(8), None, mode="RGB")[0]


@pytest.mark.parametrize("value", [None, {"bytes": None, "path": None}, 3, "text"])
def test_a_value_without_an_image_is_a_bad_row(value: object) -> None:
    item = ImageRows([{"image": value}], "image", None, {}, ImageTransform(8), None)[0]
    assert item["bad"].reason == "undecodable image (ValueError)"


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_masks_keep_their_numbers_and_turn_with_their_image(orientation: int | None) -> None:
    numbers = np.arange(108).reshape(9, 12) % 4
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    palette = Image.fromarray(numbers.astype(np.uint8), "P")
    palette.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    kinds = {
        "L": Image.fromarray(numbers.astype(np.uint8)),
        "I;16": Image.fromarray(numbers.astype(np.uint16)),
        "P": palette,
        "1": Image.fromarray(numbers > 1),
    }
    transform = ImageTransform(9, 1, (0.0,), (1 / 255,))
    for kind, mask in kinds.items():
        row = {}
        for column, image in (("image", Image.fromarray(numbers.astype(np.uint8))), ("mask", mask)):
            buffer = io.BytesIO()
            image.save(buffer, "PNG", exif=exif)
            row[column] = {"bytes": buffer.getvalue(), "path": None}
        theirs = datasets.Image().decode_example(row["mask"])
        assert np.array_equal(class_of_pixels(decode(row["mask"])), np.asarray(theirs).astype(int)), kind
        item = MaskRows([row], ("image", "mask"), 4, 255, transform, None)[0]
        expected = item["pixel_values"][0].round().long()
        assert torch.equal(item["labels"], (expected > 1).long() if kind == "1" else expected), kind


def test_deep_masks_keep_large_numbers() -> None:
    numbers = np.asarray([[0, 300], [65535, 7]], np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(numbers).save(buffer, "PNG")
    assert class_of_pixels(decode({"bytes": buffer.getvalue(), "path": None})).tolist() == numbers.tolist()


def test_masks_that_hold_no_certain_class_are_refused() -> None:
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "JPEG")
    cases = {
        "mask stored as JPEG": decode({"bytes": buffer.getvalue(), "path": None}),
        "mask of mode F, which holds fractions": Image.new("F", (4, 4)),
        "mask of mode RGB, which has more than one number": Image.new("RGB", (4, 4)),
    }
    for message, mask in cases.items():
        with pytest.raises(Unusable, match=message):
            class_of_pixels(mask)
    negative = Image.fromarray(np.asarray([[0, -1]], np.int32))
    item = MaskRows([{"image": Image.new("L", (2, 1)), "mask": negative}], ("image", "mask"), 3, 255, ImageTransform(8, 1), None)[0]
    assert "mask value" in item["bad"].reason


def test_16_bit_images_are_refused_with_the_cure() -> None:
    with pytest.raises(Unusable, match=r"image of mode I;16 with values outside 0 … 255, which are cut off in use: convert it to 8 bits"):
        in_colours(_image("I;16", high=4095), 3)
