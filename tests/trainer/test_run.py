"""Runs: what they write, that they resume exactly, and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from safetensors.torch import load_file

import laconic
from laconic.data.rows import BadRows
from laconic.modules.checkpoints.whole_files import DamagedFile
from laconic.trainer.build.build import build
from laconic.trainer.callbacks.guards import NanGuard, NotANumber
from laconic.trainer.distributed.resume import find_checkpoint
from laconic.trainer.errors import RecipeError
from laconic.trainer.evaluate import evaluate
from laconic.trainer.export.export import export
from laconic.trainer.recipe.baselines import load_baselines
from laconic.trainer.recipe.files import load
from laconic.trainer.run import rehearse, train, train_arm
from laconic.trainer.run_folder import RunFolder
from laconic.trainer.tasks.base_image import with_normalisation
from tests.data.folders import encoded, parquet
from tests.trainer.small_recipes import of_files
from tests.trainer.stopping import train_until

REPORT = {
    "recipe", "task", "quality", "keep", "macs_ratio", "mean_token_fraction", "step_time", "peak_memory", "baselines", "export", "versions", "seed",
}  # fmt: skip


def test_the_main_job_writes_its_folder_and_a_report_with_its_control_arms(tmp_path: Path, quick: list[str], console: Console) -> None:
    overrides = [*quick, "trainer.bench_rounds=2"]
    train(load("vit_digits", overrides), overrides, console)
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} >= {
        "recipe.yaml",
        "report.json",
        "report.html",
        "tensorboard",
        "checkpoints",
        "log.txt",
        "kept_tokens.png",
    }
    report = json.loads((run / "report.json").read_text())
    assert report.keys() >= REPORT
    assert set(report["baselines"]) == {"dense", "random"}
    assert report["quality"]["dense"] == report["baselines"]["dense"]["quality"]
    assert report["step_time"].keys() >= {"dense", "compressed", "oracle", "speedup", "of_oracle"}
    assert report["peak_memory"]["compressed"] < report["peak_memory"]["dense"]
    assert report["baselines"]["random"]["step_seconds"] > 0
    assert report["export"]["format"] is None
    recipes = [(folder / "recipe.yaml").read_text() for folder in (run, run / "baselines" / "vit_digits_random")]
    assert "seed: 0" in recipes[0]
    assert "seed: 0" in recipes[1]


def test_tensorboard_has_scalars_histograms_and_pictures(tmp_path: Path, quick: list[str], console: Console) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    overrides = [*quick, "baselines=[]", "compression.stages.0.scorer=learned", "budget.regularizer=ratio_mse", "budget.target=0.5"]
    train(load("vit_digits", overrides), overrides, console)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    wanted = {
        "train/loss",
        "train/images_per_second",
        "before_0/keep_requested",
        "before_0/keep_achieved",
        "before_0/keep_soft",
        "budget/regularizer",
        "train/grad_norm_routers",
        "train/grad_norm_rest",
        "before_0/grad_norm",
    }
    assert wanted <= set(tags["scalars"])
    assert json.loads((tmp_path / "run" / "report.json").read_text())["gradients"]["routers"]["mean"] > 0
    assert tags["histograms"] == ["before_0/scores"]
    assert any(tag.startswith("kept_tokens") for tag in tags["images"])


def test_arms_see_the_same_samples_and_the_same_first_weights(tmp_path: Path, quick: list[str], console: Console) -> None:
    parts = [build(load(name, [*quick, "baselines=[]"]).recipe) for name in ("vit_digits", "vit_digits_dense")]
    dense = dict(parts[1].model.named_parameters())
    assert all(torch.equal(value, dense[name]) for name, value in parts[0].model.named_parameters() if name in dense)
    batches = [next(iter(item.data_module().train_dataloader())) for item in parts]
    assert torch.equal(batches[0]["pixel_values"], batches[1]["pixel_values"])


CONTROLLED = ["compression.stages.0.scorer=learned", "compression.stages.0.selector=gumbel", "budget.noise=1", "budget.target=0.5"]


# The target, the ramp and the exploration noise move on every step.
SCHEDULED = [*CONTROLLED, "budget.controller=nupi", "budget.schedule=linear", "budget.schedule_until=1", "budget.noise_until=1"]
DRAWN = ["budget=null", "compression.stages.0.keep=0.5", "training_keep={lowest: 0.2, draw: reciprocal, start: 0.8}"]
RESUMED = {"plain": (1, []), "accumulated_and_controlled": (2, CONTROLLED), "scheduled": (1, SCHEDULED), "drawn": (1, DRAWN)}


@pytest.mark.parametrize(("accumulate", "own"), RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_ends_bit_for_bit_like_an_unbroken_one(
    tmp_path: Path, quick: list[str], console: Console, accumulate: int, own: list[str]
) -> None:
    quick = [*quick, *own]
    shared = [*quick, "baselines=[]", "trainer.max_steps=6", f"trainer.accumulate={accumulate}", "model.config.hidden_dropout_prob=0.1"]
    shared = [item for item in shared if not item.startswith("output")]

    def weights(folder: Path, resume: str | None = None) -> dict[str, torch.Tensor]:
        train_arm(load("vit_digits", [*shared, f"output={folder}"]), "arm", folder, console, resume=resume)
        return load_file(folder / "model" / "model.safetensors")

    unbroken = weights(tmp_path / "whole")
    loaded = load("vit_digits", [*shared, f"output={tmp_path / 'broken'}"])
    checkpoints = tmp_path / "broken" / "checkpoints"
    for step in (2, 4):
        train_until(2, loaded, tmp_path / "broken", console, resume="auto")
        assert [path.name for path in checkpoints.iterdir()] == [f"{step}.ckpt"]
    resumed = weights(tmp_path / "broken", resume="auto")
    assert [path.name for path in checkpoints.iterdir()] == ["6.ckpt"]
    assert all(torch.equal(value, resumed[name]) for name, value in unbroken.items())


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert find_checkpoint(RunFolder(tmp_path), "auto") == (None, [])
    with pytest.raises(RecipeError, match="there is no such checkpoint"):
        find_checkpoint(RunFolder(tmp_path), str(tmp_path / "none.ckpt"))


@pytest.mark.slow
def test_sigterm_saves_and_ends_with_143(tmp_path: Path, quick: list[str]) -> None:
    overrides = [*quick, "baselines=[]", "trainer.max_steps=100000"]
    command = [sys.executable, "-m", "laconic", "train", "vit_digits", *overrides]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "step 3/" in line:
            break
    process.send_signal(signal.SIGTERM)
    deadline = time.time() + 60
    rest = process.stdout.read()
    assert process.wait(timeout=max(1, deadline - time.time())) == 143
    assert len(list((tmp_path / "run" / "checkpoints").glob("*.ckpt"))) == 1
    assert "--resume auto" in rest


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([1.0, float("nan")])
    guard: Callback = NanGuard()

    class Trainer:
        global_step = 7

    with pytest.raises(NotANumber, match="not finite at step 7: lower optimizer.lr"):
        guard.on_before_optimizer_step(Trainer(), None, torch.optim.SGD([weight], lr=0.1))  # type: ignore[arg-type]


def test_bad_rows_stop_a_run_or_are_counted_in_its_report(tmp_path: Path, quick: list[str], console: Console) -> None:
    images = [encoded(i) if i % 8 else b"broken" for i in range(64)]
    path = parquet(tmp_path / "rows.parquet", images, [i % 3 for i in range(64)])
    overrides = [
        *of_files(quick),
        "baselines=[]",
        "data.name=parquet",
        f"data.data_files={path}",
        "model.config.num_channels=3",
        "budget.target=0.7",
        "trainer.max_steps=6",
    ]
    with pytest.raises(BadRows, match="undecodable image"):
        train(load("vit_digits", overrides), overrides, console)
    lenient = [*overrides, "data.max_bad_fraction=0.5"]
    report = train(load("vit_digits", lenient), lenient, console)
    assert report.bad_rows is not None
    assert "undecodable image (UnidentifiedImageError)" in report.bad_rows


@pytest.mark.parametrize(
    "setting",
    [
        "trainer.precision=bf16",
        "trainer.gradient_checkpointing=true",
        "trainer.validate_every=1",
        "data.workers=1",
        "model.config.model_type=deit",
    ],
)
def test_settings_that_change_how_a_step_is_computed_run(setting: str, tmp_path: Path, quick: list[str], console: Console) -> None:
    overrides = [*quick, "baselines=[]", setting]
    assert train(load("vit_digits", overrides), overrides, console).macs_ratio is not None


def test_a_control_arm_stays_what_it_is_and_comparable(tmp_path: Path, quick: list[str]) -> None:
    overrides = [*quick, "compression.stages.0.scorer=learned", "compression.stages.0.layer=1", "budget.target=0.8"]
    loaded = load("vit_digits", overrides)
    dense_arm, random_arm = load_baselines(loaded, overrides).arms
    assert dense_arm.recipe.compression is None
    assert random_arm.recipe.compression is not None
    stage = random_arm.recipe.compression.stages[0]
    assert (stage.part("scorer").name, stage.layer) == ("random", 1)
    assert loaded.recipe.compression is not None
    assert loaded.recipe.compression.stages[0].part("scorer").name == "learned"
    others = [*quick, "compression.stages=[{layer: 0}]"]
    assert [arm.name for arm in load_baselines(load("vit_digits", others), others).arms] == ["vit_digits_dense"]
    (tmp_path / "mine.yaml").write_text("base: vit_digits\ntrainer: {max_steps: 900}")
    with pytest.raises(RecipeError, match="arm vit_digits_dense: its trainer.max_steps differs from that of mine"):
        load_baselines(load(str(tmp_path / "mine.yaml")), [])


def test_resuming_another_recipe_is_refused_and_a_new_run_leaves_no_old_checkpoint(
    tmp_path: Path, quick: list[str], console: Console
) -> None:
    def run(*more: str, resume: str | None = None) -> None:
        loaded = load("vit_digits", [*quick, "baselines=[]", *more])
        train_arm(loaded, "arm", tmp_path / "run", console, resume=resume)

    run()
    with pytest.raises(RecipeError, match=r"cannot resume .*: optimizer.lr was 0.0015 and is now 1e-05;"):
        run("optimizer.lr=1e-5", resume="auto")
    with pytest.raises(RecipeError, match=r"cannot resume .*: trainer.max_steps was 2 and is now 3"):
        run("trainer.max_steps=3", resume="auto")
    run("trainer.max_steps=3", "trainer.log_every=2")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("*.ckpt")] == ["3.ckpt"]


def test_a_checkpoint_in_half_precision_with_another_head_trains_in_full(tmp_path: Path, quick: list[str], console: Console) -> None:
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    config = DeiTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=4, num_channels=1
    )
    DeiTForImageClassificationWithTeacher(config).half().save_pretrained(tmp_path / "deit")
    overrides = [item for item in quick if not item.startswith("model")]
    overrides += ["baselines=[]", "model.config=null", f"model.name={tmp_path / 'deit'}", "budget.target=0.5"]
    arm = train_arm(load("vit_digits", overrides), "arm", tmp_path / "run", console)
    assert type(arm.parts.model).__name__ == "CompressedDeiTForImageClassification"
    assert {parameter.dtype for parameter in arm.parts.model.parameters()} == {torch.float32}


def test_pixels_are_normalised_as_the_models_processor_says(tmp_path: Path, quick: list[str], console: Console) -> None:
    from tests.matrix import dense

    dense("vit").save_pretrained(tmp_path / "vit")
    processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "image_processor_type": "ViTImageProcessor"}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(processor))
    images = parquet(tmp_path / "rows.parquet", [encoded(i) for i in range(32)], [i % 3 for i in range(32)])
    overrides = [item for item in of_files(quick) if not item.startswith("model")]
    overrides += ["baselines=[]", "model.config=null", f"model.name={tmp_path / 'vit'}", "data.name=parquet", f"data.data_files={images}"]
    recipe = load("vit_digits", overrides).recipe
    filled = with_normalisation(recipe)
    assert (filled.data.mean, filled.data.std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert with_normalisation(load("vit_digits", [*overrides, "data.mean=[0.7]"]).recipe).data.mean == [0.7]
    pixels = build(load("vit_digits", [*overrides, "budget.target=0.6"]).recipe).data.validation[0]["pixel_values"]
    plain = build(load("vit_digits", [*overrides, "budget.target=0.6", "data.mean=[0]", "data.std=[1]"]).recipe).data.validation[0][
        "pixel_values"
    ]
    expected = (plain - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    torch.testing.assert_close(pixels, expected)


def test_a_loaded_model_trains_its_router(tmp_path: Path, quick: list[str], console: Console) -> None:
    from tests.matrix import dense

    dense("vit").save_pretrained(tmp_path / "vit")
    images = parquet(tmp_path / "rows.parquet", [encoded(i) for i in range(32)], [i % 3 for i in range(32)])
    overrides = [item for item in of_files(quick) if not item.startswith("model")]
    overrides += ["baselines=[]", "model.config=null", f"model.name={tmp_path / 'vit'}", "data.name=parquet", f"data.data_files={images}"]
    overrides += ["budget.target=0.6", "optimizer.warmup=0"]
    arm = train_arm(load("vit_digits", overrides), "arm", tmp_path / "run", console)
    before = build(load("vit_digits", overrides).recipe).model.state_dict()
    after = arm.parts.model.state_dict()
    moved = {name for name, value in after.items() if ".stages." in name and not torch.equal(value, before[name])}
    assert moved == {name for name in after if ".stages." in name}


def test_a_dry_run_keeps_nothing(tmp_path: Path, quick: list[str], console: Console) -> None:
    result = rehearse(load("vit_digits", quick), quick, console)
    assert set(result) == {"vit_digits", "vit_digits_dense", "vit_digits_random"}
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("quick_exports")
def test_export_answers_like_the_run_and_evaluate_reads_both(tmp_path: Path, quick: list[str], console: Console) -> None:
    overrides = [*quick, "baselines=[]"]
    train(load("vit_digits", overrides), overrides, console)
    run, to = str(tmp_path / "run"), str(tmp_path / "export")
    record = export(run, to)
    assert record["max_abs_logit_diff"] <= 1e-5
    assert json.loads((tmp_path / "run" / "report.json").read_text())["export"]["format"] == "merged"
    assert {"config.json", "model.safetensors", "recipe.yaml", "export.json"} <= {path.name for path in Path(to).iterdir()}
    assert not [path for path in Path(to).iterdir() if path.suffix in (".bin", ".pt", ".ckpt", ".pkl", ".partial")]
    of_run, of_export = (evaluate(target, RunFolder.open(target).read_recipe(), console)["variants"] for target in (run, to))
    assert {name: item["accuracy"] for name, item in of_run.items()} == {name: item["accuracy"] for name, item in of_export.items()}
    assert set(of_run) == {"compressed", "dense", "random", "uniform_grid", "patch_energy"}
    with pytest.raises(RecipeError, match="not empty"):
        export(run, to)


def test_damaged_exports_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from tests.matrix import METHODS, compressed, dense

    compressed("vit", METHODS[0], 0.5, 0.6).save_pretrained(tmp_path / "good")
    dense("vit").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="is a dense vit model: config.json has no 'compression'"):
        laconic.from_pretrained(tmp_path / "dense")
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        laconic.from_pretrained(tmp_path)
    weights = load_file(tmp_path / "good" / "model.safetensors")
    lost = {name: value for name, value in weights.items() if "score.weight" not in name}
    save_file(lost, tmp_path / "good" / "model.safetensors", {"format": "pt"})
    with pytest.raises(DamagedFile, match="the weights do not fit the config: .*missing_keys.*score.weight"):
        laconic.from_pretrained(tmp_path / "good")
