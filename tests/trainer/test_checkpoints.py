"""Runs that are disturbed: damaged checkpoints, earlier runs, two runs at once, weights that are not finite, pictures that fail."""

from __future__ import annotations

import json
import math
import multiprocessing
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from laconic.modules.checkpoints.whole_files import DamagedFile, write_hashes
from laconic.trainer.callbacks import checkpoints
from laconic.trainer.callbacks.guards import NotANumber
from laconic.trainer.distributed.lock import locked
from laconic.trainer.distributed.resume import check_same_run, find_checkpoint
from laconic.trainer.distributed.signals import Stopped
from laconic.trainer.errors import NotSaved, RecipeError
from laconic.trainer.evaluate import evaluate
from laconic.trainer.recipe.files import load
from laconic.trainer.run import train, train_arm
from laconic.trainer.run_folder import RunFolder, load_model
from laconic.trainer.tasks.image_classification import ImageClassification
from tests.trainer.conftest import QUICK
from tests.trainer.stopping import StopAfter, train_until

ALONE = [*QUICK, "baselines=[]"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps, stopped once after the first; the tests copy it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    torch.set_num_threads(1)
    overrides = [*ALONE, f"output={folder}"]
    train(load("vit_digits", overrides), overrides, Console(quiet=True))
    return folder


def _copy(run: Path, to: Path) -> tuple[Path, list[str]]:
    shutil.copytree(run, to / "run")
    return to / "run", [*ALONE, f"output={to / 'run'}"]


def _damaged(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.8])
def test_a_damaged_checkpoint_is_passed_over_for_an_older_whole_one_and_named(run: Path, tmp_path: Path, share: float) -> None:
    folder, _ = _copy(run, tmp_path)
    older, newer = folder / "checkpoints" / "1.ckpt", folder / "checkpoints" / "2.ckpt"
    shutil.copy(newer, older)
    assert find_checkpoint(RunFolder(folder), "auto") == (newer, [])
    # In the values of the weights and the optimizer, which no parser looks at.
    place = newer.read_bytes().index(load_file(folder / "model" / "model.safetensors")["vit.layernorm.weight"].numpy().tobytes())
    _damaged(newer, place + int(share * 60))
    found, passed = find_checkpoint(RunFolder(folder), "auto")
    assert found == older
    assert len(passed) == 1
    assert passed[0].startswith(f"{newer} is damaged: the checksum of ")
    with pytest.raises(RecipeError, match=r"--resume .*2.ckpt: .*2.ckpt is damaged: the checksum .*use auto, or another"):
        find_checkpoint(RunFolder(folder), str(newer))


def test_a_truncated_checkpoint_is_named_and_without_a_whole_one_the_cure_is_too(run: Path, tmp_path: Path) -> None:
    folder, overrides = _copy(run, tmp_path)
    checkpoint = folder / "checkpoints" / "2.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    with pytest.raises(RecipeError, match=r"has no whole checkpoint: .*2.ckpt is no training checkpoint .*; start again with --overwrite"):
        train(load("vit_digits", overrides), overrides, Console(quiet=True), resume="auto")
    assert checkpoint.exists()


def test_a_run_that_ended_in_its_first_save_starts_anew_and_says_so(tmp_path: Path) -> None:
    # A checkpoint of DeepSpeed is a folder, whose marker is written last.
    first = tmp_path / "checkpoints" / "2.ckpt"
    first.mkdir(parents=True)
    (first / "half").write_bytes(b"half")
    found, passed = find_checkpoint(RunFolder(tmp_path), "auto")
    assert found is None
    assert [fault.startswith(f"{first} is not complete, it has no complete.json") for fault in passed] == [True]
    with pytest.raises(RecipeError, match=r"2.ckpt is not complete.*use auto"):
        find_checkpoint(RunFolder(tmp_path), str(first))
    # Two of them are no first save.
    shutil.copytree(first, first.with_name("4.ckpt"))
    with pytest.raises(RecipeError, match=r"has no whole checkpoint: .*4.ckpt is not complete.*2.ckpt is not complete.*--overwrite"):
        find_checkpoint(RunFolder(tmp_path), "auto")


def test_an_earlier_run_is_neither_overwritten_by_mistake_nor_mixed_with_a_new_one(
    run: Path, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, overrides = _copy(run, tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    (folder / "checkpoints" / ".3.ckpt.1.partial").write_bytes(b"half")
    (folder / "model.partial").mkdir()
    loaded = load("vit_digits", [*overrides, "seed=1"])
    with pytest.raises(RecipeError, match="has an earlier run: --resume auto continues it, --overwrite deletes it; or set another output"):
        train(loaded, overrides, console)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}

    def killed(*given: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("laconic.trainer.run.lightning_trainer", killed)
    with pytest.raises(KeyboardInterrupt):
        train(loaded, overrides, console, overwrite=True)
    # As after a kill before the first step: the new recipe, and nothing of the old run or of a save that was killed.
    assert "seed: 1" in (folder / "recipe.yaml").read_text()
    assert {path.name for path in folder.iterdir()} == {"recipe.yaml", "data", "log.txt", ".lock"}
    with pytest.raises(RecipeError, match="has no trained model yet"):
        RunFolder.open(folder)


def test_a_folder_that_never_had_a_run_loses_nothing(tmp_path: Path, console: Console) -> None:
    for name in ("cat.png", "log.txt", "tensorboard/mine", "data/rows.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    RunFolder(tmp_path).clear()
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == {
        "cat.png", "log.txt", "tensorboard/mine", "data/rows.csv"
    }  # fmt: skip


def test_a_run_that_has_ended_without_checkpoints_is_not_trained_again_by_resuming(run: Path, tmp_path: Path, console: Console) -> None:
    folder, overrides = _copy(run, tmp_path)
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(RecipeError, match="has a trained model and no checkpoint: its run has ended; --overwrite trains it anew"):
        train(load("vit_digits", overrides), overrides, console, resume="auto")
    assert (folder / "model").is_dir()


def _own(folder: Path, ready: Any) -> None:
    with locked(RunFolder(folder)):
        ready.set()
        time.sleep(60)


def test_two_runs_in_one_folder_at_once_are_refused_and_the_owner_is_named(tmp_path: Path) -> None:
    forked = multiprocessing.get_context("fork")
    ready = forked.Event()
    owner = forked.Process(target=_own, args=(tmp_path, ready))
    owner.start()
    assert ready.wait(30)
    with (
        pytest.raises(RecipeError, match=f"is in use by another run \\(process {owner.pid} on .* since .*take another output folder"),
        locked(RunFolder(tmp_path)),
    ):
        pass
    owner.kill()
    owner.join()
    with locked(RunFolder(tmp_path)):
        pass


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(RecipeError, match=f"{tmp_path}/file/run cannot be a run's folder: Not a directory; take another output folder"),
        locked(RunFolder(tmp_path / "file" / "run")),
    ):
        pass


@pytest.mark.parametrize("asked", [3, 4], ids=["in the validation", "in the test"])
def test_a_signal_in_the_last_validation_or_the_test_stops_the_run_and_nothing_is_lost(
    run: Path, tmp_path: Path, console: Console, asked: int
) -> None:
    loaded = load("vit_digits", ALONE)
    with pytest.raises(Stopped, match="the last checkpoint is .*2.ckpt"):
        train_arm(loaded, "arm", tmp_path, console, signals=StopAfter(asked))
    assert not (tmp_path / "model").exists()
    train_arm(loaded, "arm", tmp_path, console, resume="auto")
    resumed, unbroken = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path, run))
    assert all(torch.equal(value, resumed[name]) for name, value in unbroken.items())


def test_checkpoints_are_written_every_few_minutes_and_one_stays(tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    save = checkpoints.Checkpoints._save

    def noted(self: Any, trainer: Any, module: Any, step: int) -> None:
        save(self, trainer, module, step)
        written.append(" ".join(path.name for path in (tmp_path / "checkpoints").iterdir()))

    monkeypatch.setattr(checkpoints.Checkpoints, "_save", noted)
    monkeypatch.setattr(checkpoints, "EVERY_SECONDS", 0.0)
    train_until(3, load("vit_digits", [*ALONE, "trainer.max_steps=9"]), tmp_path, console)
    assert written == ["1.ckpt", "2.ckpt", "3.ckpt"]


def test_weights_that_are_not_finite_are_not_saved_and_the_checkpoint_before_stays(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = torch.optim.AdamW.step

    def broken(self: Any, closure: Any = None) -> Any:
        found = step(self, closure)
        broken.count += 1  # type: ignore[attr-defined]
        if broken.count == 3:  # type: ignore[attr-defined]
            self.param_groups[0]["params"][0].data.fill_(math.inf)
        return found

    broken.count = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    with pytest.raises(NotANumber, match=r"the weights are not finite after step 3, and are not saved; the checkpoint before it"):
        train_arm(load("vit_digits", [*ALONE, "trainer.max_steps=3", "trainer.checkpoint_every=2"]), "arm", tmp_path, console)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2.ckpt"]
    assert not (tmp_path / "model").exists()


def test_a_model_that_is_damaged_or_not_finite_is_neither_evaluated_nor_continued(run: Path, tmp_path: Path, console: Console) -> None:
    folder, overrides = _copy(run, tmp_path)
    weights = folder / "model" / "model.safetensors"
    recipe = load("vit_digits", overrides).recipe
    _damaged(weights, weights.stat().st_size - 100)
    with pytest.raises(DamagedFile, match="model.safetensors is damaged: its SHA-256"):
        evaluate(str(folder), recipe, console)
    with pytest.raises(ValueError, match=r"model.name = .* cannot be loaded: .*model.safetensors is damaged"):
        train_arm(load("vit_digits", [*ALONE, "model.config=null", f"model.name={folder}"]), "arm", tmp_path / "next", console)
    tensors = load_file(run / "model" / "model.safetensors")
    tensors["vit.layernorm.bias"][0] = math.nan
    save_file(tensors, weights, {"format": "pt"})
    write_hashes(folder / "model")
    with pytest.raises(DamagedFile, match=r"1 tensors hold values that are not finite, vit.layernorm.bias first"):
        load_model(folder)


def test_a_full_disk_is_told_with_what_is_kept(tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load("vit_digits", [*ALONE, "trainer.max_steps=3"])
    train_until(1, loaded, tmp_path, console)

    def full(*given: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos 64 vs 0")

    monkeypatch.setattr("laconic.trainer.distributed.checkpoint_files.torch.save", full)
    with pytest.raises(NotSaved, match=r"3.ckpt could not be written: .*checkpoints before it are kept: free space, then --resume auto"):
        train_arm(loaded, "arm", tmp_path, console, resume="auto")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1.ckpt"]


def test_a_picture_that_fails_costs_no_result(tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(cls: Any, arms: Any, folder: Path) -> None:
        assert json.loads((folder / "report.json").read_text())["quality"]["compressed"] is not None
        raise KeyError("pixel_values")

    monkeypatch.setattr(ImageClassification, "draw", classmethod(fails))
    overrides = [*ALONE, f"output={tmp_path / 'run'}"]
    assert train(load("vit_digits", overrides), overrides, console) is not None


@pytest.mark.parametrize("content", ["- 1", "seed: 0", "trainer: 3", "seed: [1"])
def test_a_damaged_recipe_of_the_run_to_resume_is_named(content: str, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.recipe.write_text(content)
    with pytest.raises(RecipeError, match=r"recipe\.yaml is (damaged; restore it, or start again with --overwrite|not YAML)"):
        check_same_run(run, load("vit_digits").recipe)
