"""Run folders: where weights, recipe and tokenizer lie, whichever part of a run is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from laconic import from_pretrained
from laconic.modules.checkpoints import loading
from laconic.modules.checkpoints.whole_files import DamagedFile
from laconic.trainer.build.initial_weights import start_of
from laconic.trainer.build.tower import with_own_tower
from laconic.trainer.build.validate import validate
from laconic.trainer.errors import RecipeError
from laconic.trainer.export.formats import onnx, torch_export
from laconic.trainer.measure.tables import cost_of_model
from laconic.trainer.recipe.files import dump, load
from laconic.trainer.recipe.schema import ModelRecipe
from laconic.trainer.run_folder import TOKENIZER, RunFolder, check_files, load_model, located
from tests.matrix import METHODS, compressed, images
from tests.modules.adapted import adapter_folder, base_folder

RUN_PARTS = (".", "model", "checkpoints/4.ckpt", "checkpoints/4.ckpt/model")


def _run(folder: Path, model: PreTrainedModel) -> Path:
    """A run that has ended, with a checkpoint that is a folder."""
    for place in (folder, folder / "checkpoints" / "4.ckpt"):
        model.save_pretrained(place / "model")
        (place / "model" / TOKENIZER).write_text("{}")
    (folder / "recipe.yaml").write_text(dump(load("vit_digits").recipe))
    return folder


@pytest.mark.parametrize("part", RUN_PARTS)
def test_every_part_of_a_run_leads_to_its_weights_its_recipe_and_its_tokenizer(tmp_path: Path, part: str) -> None:
    model = compressed("vit", METHODS[0], 0.5, 0.6)
    run = RunFolder.open(_run(tmp_path / "run", model) / part)
    expected = tmp_path / "run" / part if part.endswith("model") else tmp_path / "run" / part / "model"
    assert (run.path, run.trained(), run.adapter) == (tmp_path / "run", expected, None)
    assert run.read_recipe(["seed=3"]).seed == 3
    assert run.with_file(TOKENIZER) == run.trained()
    assert run.with_file("chat_template.jinja") is None
    with torch.no_grad():
        for loaded in (from_pretrained(tmp_path / "run" / part), load_model(tmp_path / "run" / part)):
            assert torch.equal(loaded(images()).logits, model(images()).logits)
    start = start_of(ModelRecipe(name=str(tmp_path / "run" / part)))
    assert start is not None
    assert (start.run, start.weights, start.beside(TOKENIZER)) == (run, str(expected), (str(expected), None))


def test_an_export_is_its_own_weights_whatever_it_is_called(tmp_path: Path) -> None:
    compressed("vit", METHODS[0], 0.5, 0.6).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "recipe.yaml").write_text(dump(load("vit_digits", ["seed=5"]).recipe))
    (tmp_path / "recipe.yaml").write_text(dump(load("vit_digits").recipe))
    run = RunFolder.open(tmp_path / "model")
    assert (run.path, run.trained(), run.read_recipe().seed) == (tmp_path / "model", tmp_path / "model", 5)


def test_an_adapter_of_a_run_goes_before_weights_and_is_no_whole_model(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    _, model = adapter_folder(tmp_path / "run" / "adapter", base)
    (tmp_path / "run" / "recipe.yaml").write_text(dump(load("vit_digits").recipe))
    for name in ("run", "run/adapter"):
        assert located(tmp_path / name) == str(tmp_path / "run" / "adapter")
        assert torch.equal(from_pretrained(tmp_path / name)(images()).logits, model(images()).logits)
        with pytest.raises(FileNotFoundError, match="has an adapter, and whole weights are needed: laconic export .* merges it"):
            located(tmp_path / name, whole=True)
        for key in ("model.encoder_of", "distillation.teacher"):
            overrides = ["model.config=null"] if key == "model.encoder_of" else []
            with pytest.raises(ValueError, match=f"{key} = .* has an adapter, and whole weights are needed"):
                validate(load("vit_digits", [*overrides, f"{key}={tmp_path / name}"]).recipe)


def test_a_folder_without_weights_says_why_for_everybody(tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "recipe.yaml").write_text(dump(load("vit_digits").recipe))
    (tmp_path / "empty").mkdir()
    ended = "has no trained model yet .*its run has not ended; use laconic train"
    for name, message in (("begun", ended), ("empty", "has no config.json: name a run folder")):
        folder = str(tmp_path / name)
        with pytest.raises(FileNotFoundError, match=message):
            from_pretrained(folder)
        with pytest.raises(RecipeError, match=f"--model .*{message}"):
            cost_of_model(folder)
        for key, overrides in (
            ("model.name", ["model.config=null"]),
            ("distillation.teacher", []),
            ("model.encoder_of", ["model.config=null"]),
        ):
            with pytest.raises(ValueError, match=f"{key} = .*{message}"):
                validate(load("vit_digits", [*overrides, f"{key}={folder}"]).recipe)
    with pytest.raises(RecipeError, match=ended):
        RunFolder.open(tmp_path / "begun")
    with pytest.raises(RecipeError, match=r"has no recipe.yaml: name a run folder, or the folder of an export"):
        RunFolder.open(tmp_path / "empty")
    with pytest.raises(RecipeError, match="is not a folder: name a run folder"):
        RunFolder.open(tmp_path / "nowhere")


def test_modules_know_no_run_folder(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", compressed("vit", METHODS[0], 0.5, 0.6))
    with pytest.raises(FileNotFoundError, match=r"has no config.json: give the folder of an adapter or of weights"):
        loading.from_pretrained(run)
    assert loading.find_adapter(run) is None


def test_what_is_no_folder_here_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "4.ckpt").write_bytes(b"")
    assert located("google/vit-base-patch16-224") == "google/vit-base-patch16-224"
    assert located(tmp_path / "4.ckpt") == str(tmp_path / "4.ckpt")


@pytest.mark.parametrize("content", ["{", "[]", '{"scorers": 3}', '{"scorers": {"around_1": "x"}}'])
def test_damaged_records_of_a_run_are_named(content: str, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.fitted.write_text(content)
    with pytest.raises(DamagedFile, match=r"fitted\.json is damaged: .*; delete it, or train again"):
        run.read_fitted()
    run.tower.parent.mkdir()
    run.tower.write_text("[1]")
    tower = ModelRecipe(config={"model_type": "llava"}, tower_of="gone")
    with pytest.raises(DamagedFile, match=r"tower\.json is damaged"):
        with_own_tower(tower, run)
    (tmp_path / "hashes.json").write_text("[1]")
    with pytest.raises(DamagedFile, match=r"hashes\.json is damaged: it holds list"):
        check_files(tmp_path)


@pytest.mark.parametrize("graph", [onnx.FILE, torch_export.FILE])
def test_an_export_that_is_a_graph_is_not_loaded(graph: str, tmp_path: Path) -> None:
    for name in (graph, "config.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(FileNotFoundError, match=rf"holds {graph}, a graph .*: run it as its README\.md shows"):
        load_model(tmp_path)
    # A graph beside weights is not in the way.
    save_file({}, tmp_path / "model.safetensors")
    check_files(tmp_path)


def test_nothing_of_an_earlier_run_is_left(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for path in (run.recipe, run.report, run.page, run.log, run.trackers, run.kept_tokens, run.answers, run.step_time, run.fitted):
        path.write_text("{}")
    for folder in (run.checkpoints, run.tensorboard, run.csv, run.data, tmp_path / "model", tmp_path / "adapter", run.arm("dense").path):
        folder.mkdir(parents=True)
    (tmp_path / "mine.txt").write_text("kept")
    run.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
