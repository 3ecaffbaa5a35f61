"""Semantic segmentation: its metric, its runs, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

import laconic
from laconic import Trace
from laconic.data.rows import collate
from laconic.trainer.build.build import build
from laconic.trainer.build.validate import validate
from laconic.trainer.evaluate import evaluate
from laconic.trainer.export.export import export
from laconic.trainer.metrics.mean_iou import MeanIoU
from laconic.trainer.metrics.quality import NothingCounted
from laconic.trainer.recipe.files import load
from laconic.trainer.run import train, train_arm
from laconic.trainer.run_folder import RunFolder
from laconic.trainer.show.pictures import kept_pixels
from laconic.trainer.tasks.base import task_named
from tests.trainer.conftest import QUICK
from tests.trainer.small_recipes import of_files

DEEP = "model.config.num_hidden_layers=6"


def _counted(answers: list[int], labels: list[int], classes: int = 3) -> MeanIoU:
    quality = MeanIoU()
    logits = functional.one_hot(torch.tensor([answers]), classes).permute(0, 2, 1)[..., None].float()
    quality.add(SimpleNamespace(logits=logits), {"labels": torch.tensor([labels])[..., None]})
    return quality


def test_mean_iou_is_that_of_a_confusion_matrix_made_by_hand_and_of_all_ranks_together() -> None:
    one, other = _counted([0, 0, 1, 1, 1], [0, 1, 1, 255, 0]), _counted([1, 1], [1, 0])
    assert one.confusion is not None
    assert one.confusion.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    # Class 2 is neither there nor answered.
    assert one.per_class == [1 / 3, 1 / 3, None]
    whole = MeanIoU()
    whole.merge(one)
    whole.merge(other)
    whole.merge(MeanIoU())
    assert whole.per_class == [1 / 4, 2 / 5, None]
    assert whole.value == pytest.approx((1 / 4 + 2 / 5) / 2)
    assert whole.value != pytest.approx((one.value + other.value) / 2)
    with pytest.raises(NothingCounted, match="no labelled pixel was counted"):
        assert MeanIoU().value


def test_pictures_show_what_was_kept_before_the_restore() -> None:
    parts = build(load("segment_digits", [*QUICK, DEEP]).recipe)
    batch, trace = collate([parts.data.test[index] for index in range(3)]), Trace()
    out = parts.model.eval()(pixel_values=batch["pixel_values"], trace=trace)
    assert kept_pixels(trace).float().mean() == pytest.approx(trace.routings["before_1"].achieved)
    answer, truth = task_named(parts.recipe.task).answer(out, parts.data), task_named(parts.recipe.task).truth(batch, parts.data)
    assert answer is not None
    assert truth is not None
    assert answer.shape == truth.shape == (3, 32, 32, 3)
    digits = [str(int(labels.min())) for labels in batch["labels"]]
    assert task_named(parts.recipe.task).titles(batch, parts.data) == digits


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("segmentation") / "run"
    overrides = [*QUICK, DEEP, f"output={folder}", "baselines=[segment_digits_bipartite]", "trainer.bench_rounds=2"]
    train(load("segment_digits", overrides), overrides, Console(stderr=True, width=160))
    return folder


def test_a_run_reports_mean_iou_with_that_of_each_class_and_draws_its_answers(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    assert report["task"] == "semantic_segmentation"
    quality = report["quality"]
    assert (quality["metric"], quality["higher_is_better"]) == ("mean_iou", True)
    assert list(quality["iou"]) == [*map(str, range(10)), "background"]
    known = [value for value in quality["iou"].values() if value is not None]
    assert quality["compressed"] == pytest.approx(sum(known) / len(known))
    assert report["baselines"]["bipartite"]["details"]["iou"].keys() == quality["iou"].keys()
    assert report["macs_ratio"] <= 0.5
    assert (run / "kept_tokens.png").is_file()
    assert "validation mean iou" in (run / "log.txt").read_text()


def test_evaluate_counts_what_the_run_did_and_runs_the_controls_with_their_restore(run: Path, console: Console) -> None:
    result = evaluate(str(run), RunFolder.open(run).read_recipe(), console)
    assert result["metric"] == "mean_iou"
    assert result["variants"].keys() == {"compressed", "random", "uniform_grid", "patch_energy", "dense"}
    assert result["variants"]["compressed"]["mean_iou"] == json.loads((run / "report.json").read_text())["quality"]["compressed"]
    merged = str(run / "baselines" / "segment_digits_bipartite")
    assert evaluate(merged, RunFolder.open(merged).read_recipe(), console)["variants"]["random"]["mean_iou"] >= 0


@pytest.mark.slow
@pytest.mark.usefixtures("quick_exports")
def test_an_export_answers_in_a_clean_process_as_the_run_does(run: Path, tmp_path: Path) -> None:
    record = export(str(run), str(tmp_path / "export"))
    assert record["max_abs_logit_diff"] <= 1e-5
    assert type(laconic.from_pretrained(tmp_path / "export")).__name__ == "CompressedViTForSemanticSegmentation"


def _masked(folder: Path, masks: list[Any]) -> Path:
    """A parquet file of grey ramps and the given masks."""
    images = [Image.linear_gradient("L").resize((40, 32)) for _ in masks]
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    path = folder / "rows.parquet"
    datasets.Dataset.from_dict({"image": images, "mask": masks}, features=features).to_parquet(path)
    return path


def test_a_dataset_with_masks_trains_from_a_classifier_s_weights(tmp_path: Path, quick: list[str], console: Console) -> None:
    config = ViTConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    masks = [Image.new("L", (40, 32), i % 3) for i in range(24)]
    overrides = [item for item in of_files(quick) if not item.startswith("model")] + [
        "baselines=[]",
        "model.config=null",
        f"model.name={tmp_path / 'vit'}",
        "data.name=parquet",
        f"data.data_files={_masked(tmp_path, masks)}",
        "data.num_labels=3",
        "data.augmentation=crop_flip",
        "compression.restore.layer=3",
        "compression.stages.0.scorer=random",
        "budget.target=0.6",
    ]
    arm = train_arm(load("segment_digits", overrides), "arm", tmp_path / "run", console)
    assert set(arm.module.quality.details(arm.parts.data)["iou"]) == {"0", "1", "2"}
    with pytest.raises(ValueError, match=r"data.num_labels = None must be the number of classes"):
        build(load("segment_digits", [*overrides, "data.num_labels=null"]).recipe)
    with pytest.raises(ValueError, match=r"data.mask_column = 'msk' is missing from the data.*did you mean 'mask'"):
        build(load("segment_digits", [*overrides, "data.mask_column=msk"]).recipe)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["compression.restore=null"], r"compression.restore is needed: .*stages before_1 .*\{layer: 6, by: unmerge\}"),
        (
            ["data.mixing={mixup: 0.8}"],
            r"data.mixing is for images with one label each .*, and task = semantic_segmentation has images with masks: remove it",
        ),
        (["data.label_smoothing=0.1"], r"data.label_smoothing is for .* remove it"),
        (["data.random_augment={}"], r"data.random_augment is for .* remove it"),
        (["data.erase=0.1"], r"data.erase is for .* remove it"),
        (["data.label_column=kind"], r"data.label_column is for .* remove it"),
        (["distillation={teacher: dense_self}"], "is for image classifiers, and task = semantic_segmentation"),
        (["model.config={model_type: beit}"], r"BeitForSemanticSegmentation cannot be compressed: its head reads the hidden states"),
        (["model.config={model_type: deit}"], r"deit has no head for semantic segmentation here: use model_type dinov2 or vit"),
        (
            ["task=image_classification", "data.mask_column=mask"],
            r"data.mask_column is for images with masks \(task = semantic_segmentation\)",
        ),
    ],
)
def test_what_segmentation_does_not_have_is_refused_with_the_cure(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate(load("segment_digits", overrides).recipe)


def test_a_stage_that_only_goes_around_layers_needs_no_restore() -> None:
    overrides = ["compression={stages: [{layer: 2, site: around, scorer: random}]}", "budget.target=0.95"]
    assert validate(load("segment_digits", overrides).recipe).macs_ratio <= 0.95
