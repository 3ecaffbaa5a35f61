"""Pretraining with masks from recipe to run, and fine-tuning what it learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from laconic import stages_of
from laconic.trainer.build.build import build
from laconic.trainer.build.validate import validate
from laconic.trainer.errors import RecipeError
from laconic.trainer.evaluate import evaluate
from laconic.trainer.export.export import export
from laconic.trainer.recipe.files import load
from laconic.trainer.run import train, train_arm
from laconic.trainer.run_folder import load_model
from laconic.trainer.tasks.base import task_named
from tests.trainer.small_recipes import of_files
from tests.trainer.stopping import train_until

TINY = ["model.config.decoder_hidden_size=8", "model.config.decoder_num_hidden_layers=1", "model.config.decoder_intermediate_size=16"]
SHORT = [*TINY, "baselines=[]"]
STAGES = ["compression.restore.layer=2"]


def pretrained(tmp_path: Path, quick: list[str], console: Console, *overrides: str, name: str = "mae_digits") -> Path:
    """The folder of a short run."""
    folder = tmp_path / "pretrained"
    mine = [item for item in quick if not item.startswith("output")] + [f"output={folder}"]
    train(load(name, [*mine, *SHORT, *(STAGES if name == "mae_digits" else []), *overrides]), [], console)
    return folder


def finetuning(quick: list[str], folder: Path) -> list[str]:
    return [*(item for item in quick if not item.startswith("model.config")), f"model.encoder_of={folder}", "baselines=[]"]


def test_every_step_and_arm_masks_by_seed_step_and_sample(quick: list[str]) -> None:
    seen = {}
    for name in ("mae_digits", "mae_digits_dense"):
        parts = build(load(name, [*quick, *SHORT, *(STAGES if name == "mae_digits" else [])]).recipe)
        module, batches = task_named(parts.recipe.task).module(parts), iter(parts.data_module().train_dataloader())
        given: list[Any] = []
        forward = module.model.forward
        module.model.forward = lambda *, forward=forward, given=given, **kwargs: (given.append(kwargs["noise"]), forward(**kwargs))[1]
        batch = next(batches)
        whole = module.losses(batch)["loss"]
        halves = [
            {key: value[half] if torch.is_tensor(value) else value for key, value in batch.items()} for half in (slice(3), slice(3, 8))
        ]
        parted = [module.losses(half)["loss"] for half in halves]
        assert torch.equal(given[0], torch.cat(given[1:]))
        torch.testing.assert_close(whole, (3 * parted[0] + 5 * parted[1]) / 8)
        seen[name] = given[0]
    assert torch.equal(*seen.values())


def test_positions_are_filled_and_arms_start_alike(quick: list[str]) -> None:
    compressed, dense = (
        build(load(name, [*quick, *SHORT, *extra]).recipe).model for name, extra in (("mae_digits", STAGES), ("mae_digits_dense", []))
    )
    ours = dict(compressed.named_parameters())
    assert all(torch.equal(value, ours[name]) for name, value in dense.named_parameters())
    assert dense.decoder.decoder_pos_embed.any()
    assert dense.vit.embeddings.position_embeddings.any()


@pytest.mark.usefixtures("quick_exports")
def test_a_run_reports_its_loss_evaluates_and_exports(tmp_path: Path, quick: list[str], console: Console) -> None:
    folder = pretrained(tmp_path, quick, console)
    report = json.loads((folder / "report.json").read_text())
    assert (report["task"], report["quality"]["metric"]) == ("masked_image_pretraining", "reconstruction_loss")
    assert report["quality"]["compressed"] > 0
    assert (folder / "kept_tokens.png").is_file()
    recipe = load(str(folder / "recipe.yaml")).recipe
    variants = evaluate(str(folder), recipe, console)["variants"]
    assert variants["compressed"]["reconstruction_loss"] == pytest.approx(report["quality"]["compressed"], rel=1e-4)
    assert set(variants) == {"compressed", "dense", "random", "uniform_grid", "patch_energy"}
    assert export(str(folder), str(tmp_path / "export"))["max_abs_logit_diff"] <= 1e-5


def test_a_resumed_pretraining_ends_bit_for_bit_like_an_unbroken_one(tmp_path: Path, quick: list[str], console: Console) -> None:
    shared = [*(item for item in quick if not item.startswith("output")), *SHORT, *STAGES, "trainer.max_steps=4"]

    def weights(folder: Path, resume: str | None = None) -> dict[str, torch.Tensor]:
        train_arm(load("mae_digits", [*shared, f"output={folder}"]), "arm", folder, console, resume=resume)
        return load_file(folder / "model" / "model.safetensors")

    unbroken = weights(tmp_path / "whole")
    train_until(3, load("mae_digits", [*shared, f"output={tmp_path / 'broken'}"]), tmp_path / "broken", console)
    resumed = weights(tmp_path / "broken", resume="auto")
    assert all(torch.equal(value, resumed[name]) for name, value in unbroken.items())


def test_fine_tuning_starts_from_the_encoder_and_may_take_its_routers(tmp_path: Path, quick: list[str], console: Console) -> None:
    folder = pretrained(tmp_path, quick, console, "compression.stages.0.scorer=learned")
    encoder = dict(load_model(folder / "model").vit.named_parameters())
    tuned = finetuning(quick, folder)
    dense = build(load("mae_digits_finetune", tuned).recipe).model
    assert type(dense).__name__ == "ViTForImageClassification"
    assert dense.config.num_labels == 10
    assert all(torch.equal(value, encoder[name]) for name, value in dense.vit.named_parameters())
    stage = "compression={stages: [{layer: 1, keep: 0.25, scorer: learned}]}"
    fresh, kept = (
        build(load("mae_digits_finetune", [*tuned, stage, f"model.encoder_routers={taken}"]).recipe).model for taken in ("false", "true")
    )

    def same(model: Any) -> list[bool]:
        named = model.vit.layers[1].stages.before.named_parameters()
        return [torch.equal(value, encoder[f"layers.1.stages.before.{name}"]) for name, value in named if name.endswith("weight")]

    assert stages_of(kept)
    assert all(same(kept))
    assert not any(same(fresh))
    with pytest.raises(RecipeError, match="model.encoder_routers"):
        load("mae_digits_finetune", [*tuned, "model.encoder_routers=true"])


def test_images_need_no_label_column_and_labels_that_there_are_are_not_read(tmp_path: Path, quick: list[str], console: Console) -> None:
    import datasets

    rows = [Image.new("RGB", (32, 32), (7 * row, 0, 100)) for row in range(24)]
    of_rows = datasets.Features({"img": datasets.Image(), "caption": datasets.Value("string")})
    made = datasets.Dataset.from_dict({"img": rows, "caption": [str(row) for row in range(24)]}, features=of_rows)
    made.to_parquet(tmp_path / "rows.parquet")
    overrides = [
        *of_files(quick),
        *TINY,
        "data.name=parquet",
        f"data.data_files={tmp_path / 'rows.parquet'}",
        "model.config.num_channels=3",
    ]
    report = train(load("mae_digits_dense", overrides), [], console)
    assert report.quality["dense"] > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["compression.restore=null"], r"compression.restore is needed: .* give compression.restore = \{layer: 2, by: unmerge\}"),
        (["compression.stages.0.scorer=evidence"], "stage 'before_1': scorer 'evidence' learns from labels, .* use learned"),
        (["model.config={model_type: vit}"], "trains vit_mae, .*not vit"),
        (["model.config.mask_ratio=0.99"], "mask_ratio = 0.99 leaves 0 of 64 patches"),
        (
            ["model.config.decoder_hidden_size=6", "model.config.decoder_num_attention_heads=2"],
            "decoder_hidden_size = 6 must be a multiple",
        ),
        (["data.label_smoothing=0.1"], r"data.label_smoothing is for images with one label each .*has images without labels: remove it"),
        (["data.mixing={mixup: 1}"], r"data.mixing is for images with one label each"),
        (["distillation={teacher: dense_self}"], "distillation is for tasks with labels"),
    ],
)
def test_what_pretraining_cannot_have_is_named_with_its_cure(quick: list[str], overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate(load("mae_digits", [*quick, *TINY, *STAGES, *overrides]).recipe)


def test_an_encoder_that_is_none_is_refused_by_validate(tmp_path: Path, quick: list[str]) -> None:
    build(load("vit_digits_dense", quick).recipe).model.save_pretrained(tmp_path / "vit")
    for folder, message in (
        (tmp_path / "vit", "is a vit model, and only a vit_mae"),
        (tmp_path / "none", "is no folder of weights here and cannot be loaded .*; pretrain first"),
    ):
        with pytest.raises(ValueError, match=message):
            validate(load("mae_digits_finetune", finetuning(quick, folder)).recipe)
    with pytest.raises(RecipeError, match="set one of model.name .*, model.gguf_file .*, model.config .* or model.encoder_of"):
        load("mae_digits_finetune", ["model.name=x"])
