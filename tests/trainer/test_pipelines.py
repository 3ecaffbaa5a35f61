"""Exports of image models in a pipeline of transformers: as evaluation here, and what the card says of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor, pipeline

from laconic.data.images.decoding import decode
from laconic.data.images.transform import ImageTransform
from laconic.trainer.export import card
from laconic.trainer.export.base import format_named
from laconic.trainer.export.card import facts, write_card
from laconic.trainer.export.preprocessing import save_preprocessing
from laconic.trainer.export.source import ExportSource, Settings
from tests.matrix import dense
from tests.trainer.export_runs import written_run


@pytest.mark.parametrize("channels", [1, 3])
def test_a_pipeline_answers_for_an_export_as_evaluation_does(tmp_path: Path, channels: int) -> None:
    model = dense("vit", num_channels=channels)
    settings = ["data.name=imagefolder", "data.data_dir=photos", "data.mean=[0.4]", "data.std=[0.3]"]
    source = ExportSource.open(str(written_run(tmp_path / "run", model, "vit_digits", *settings)))
    source.model.save_pretrained(tmp_path / "export")
    save_preprocessing(source, tmp_path / "export", with_code=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    files = {
        "turned.jpg": Image.fromarray(noise),
        "grey.png": Image.fromarray(noise).convert("L"),
        "palette.png": Image.fromarray(noise).convert("P"),
    }
    size = model.config.image_size
    transform = ImageTransform(size, channels, (0.4,) * channels, (0.3,) * channels)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "export", trust_remote_code=True)
    classify = pipeline("image-classification", model=str(tmp_path / "export"), image_processor=processor, device="cpu")
    for name, image in files.items():
        image.save(tmp_path / name, exif=exif)
        pixels = transform(decode({"path": str(tmp_path / name), "bytes": None}), None)
        expected = source.model(pixel_values=pixels[None]).logits.detach().softmax(-1)[0]
        theirs = {item["label"]: item["score"] for item in classify(str(tmp_path / name), top_k=len(expected))}
        for code, label in source.model.config.id2label.items():
            assert theirs[label] == pytest.approx(float(expected[code]), abs=1e-5), name


def test_the_card_claims_a_pipeline_only_where_one_runs(tmp_path: Path) -> None:
    grey, form = dense("vit", num_channels=1), format_named("merged")
    source = ExportSource.open(str(written_run(tmp_path / "grey", grey)))
    write_card(source, form, Settings(), facts(source), form.usage(source.model), tmp_path)
    assert "AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)" in (tmp_path / "README.md").read_text()
    for task in ("SemanticSegmentation", "PreTraining"):
        assert f"AutoModelFor{task}" not in card._PIPELINES
