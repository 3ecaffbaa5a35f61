"""Small image data sets on disk, for tests."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, size: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8))


def encoded(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def image_folder(root: Path, classes: int = 3, each: int = 8) -> Path:
    for label in range(classes):
        (root / f"class_{label}").mkdir(parents=True)
        for index in range(each):
            picture(label * 100 + index, 40).save(root / f"class_{label}" / f"{index}.png")
    return root


def parquet(path: Path, images: list[bytes | None], labels: list[object], image: str = "img", label: str = "label") -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = pa.array([{"bytes": item, "path": None} for item in images], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({image: column, label: labels}), path)
    return path
