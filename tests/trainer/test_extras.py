"""Training extras together: off they change nothing, on they resume exactly."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from safetensors.torch import load_file

from laconic.trainer.build.build import build
from laconic.trainer.build.lightning_trainer import lightning_trainer
from laconic.trainer.build.validate import validate
from laconic.trainer.callbacks.checkpoints import Checkpoints
from laconic.trainer.callbacks.ema import WeightEma
from laconic.trainer.distributed.signals import StopSignals
from laconic.trainer.recipe.files import load
from laconic.trainer.run import train_arm
from laconic.trainer.run_folder import RunFolder
from laconic.trainer.tasks.base import task_named
from tests.matrix import dense
from tests.trainer.small_recipes import of_files
from tests.trainer.stopping import StopAfter, train_until

EXTRAS = [
    "data.mixing.mixup=0.8",
    "data.mixing.cutmix=1.0",
    "data.label_smoothing=0.1",
    "optimizer.layer_decay=0.7",
    "trainer.ema=0.6",
    "model.settings.hidden_dropout_prob=0.1",
]


class _Weights(Callback):
    """The weights after every step, and what validation and the checkpoint saw of them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []
        self.validated: dict[str, torch.Tensor] = {}

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append({name: value.clone() for name, value in module.model.state_dict().items()})

    def on_validation_batch_end(self, trainer: Any, module: Any, *rest: Any) -> None:
        self.validated = {name: value.clone() for name, value in module.model.state_dict().items()}


def _fit(tmp_path: Path, quick: list[str], *overrides: str, callbacks: list[Callback], steps: int = 4) -> tuple[Any, lightning.Trainer]:
    recipe = load("vit_digits", [*quick, "baselines=[]", f"trainer.max_steps={steps}", *overrides]).recipe
    parts = build(recipe)
    task = task_named(parts.recipe.task).module(parts)
    parts.model.train()
    trainer = lightning_trainer(recipe, RunFolder(tmp_path / "run"), parts.total_steps, callbacks)
    trainer.fit(task, datamodule=parts.data_module())
    return task, trainer


def test_the_average_is_that_of_the_steps_and_is_what_validates_and_stays(tmp_path: Path, quick: list[str]) -> None:
    seen = _Weights()
    task, _ = _fit(tmp_path, quick, "trainer.ema=0.6", "optimizer.lr=0.01", callbacks=[seen])
    expected = seen.steps[0]
    for weights in seen.steps[1:]:
        expected = {name: 0.6 * value + 0.4 * weights[name] for name, value in expected.items()}
    assert any(".stages." in name for name in expected)
    for name, value in task.model.state_dict().items():
        torch.testing.assert_close(value, expected[name])
        assert torch.equal(value, seen.validated[name])
        assert name.endswith("key.bias") or not torch.equal(value, seen.steps[-1][name]), name


def test_a_checkpoint_of_a_stopped_run_holds_the_average_with_its_last_step(tmp_path: Path, quick: list[str]) -> None:
    seen = _Weights()
    _fit(tmp_path, quick, "trainer.ema=0.6", callbacks=[Checkpoints(RunFolder(tmp_path), 2, None, StopAfter(1)), seen])
    saved = torch.load(tmp_path / "checkpoints" / "1.ckpt", weights_only=True)
    assert int(saved["averaging_state"]["n_averaged"]) == saved["global_step"] == 1
    assert all(torch.equal(value, saved["current_model_state"][f"model.{name}"]) for name, value in seen.steps[0].items())


def test_an_average_comes_before_every_callback_that_saves(tmp_path: Path, quick: list[str]) -> None:
    recipe = load("vit_digits", [*quick, "trainer.ema=0.6"]).recipe
    trainer = lightning_trainer(recipe, RunFolder(tmp_path), 2, [Checkpoints(RunFolder(tmp_path), 2, None, StopSignals())])
    assert isinstance(trainer.callbacks[0], WeightEma)  # type: ignore[attr-defined]


def test_an_average_does_not_go_with_deepspeed() -> None:
    from lightning.pytorch.strategies import DeepSpeedStrategy

    trainer = SimpleNamespace(strategy=object.__new__(DeepSpeedStrategy))
    with pytest.raises(ValueError, match=r"trainer.ema = 0.9 is not supported with DeepSpeed.*trainer.ema=null"):
        WeightEma(0.9).setup(trainer, None, "fit")  # type: ignore[arg-type]


def test_a_run_with_every_extra_resumes_bit_for_bit(tmp_path: Path, quick: list[str], console: Console) -> None:
    shared = [item for item in quick if not item.startswith("output")]
    shared += ["baselines=[]", "trainer.max_steps=5", "trainer.accumulate=2", *EXTRAS]

    def weights(folder: Path, resume: str | None = None) -> dict[str, torch.Tensor]:
        train_arm(load("vit_digits", [*shared, f"output={folder}"]), "arm", folder, console, resume=resume)
        return load_file(folder / "model" / "model.safetensors")

    unbroken = weights(tmp_path / "whole")
    train_until(3, load("vit_digits", [*shared, f"output={tmp_path / 'broken'}"]), tmp_path / "broken", console)
    resumed = weights(tmp_path / "broken", resume="auto")
    assert all(torch.equal(value, resumed[name]) for name, value in unbroken.items())


# Losses of the first steps before there were any extras.
GOLDEN = {"vit_digits": [2.306273, 2.310948], "vit_digits_dense": [2.290925, 2.304303]}


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_without_extras_the_losses_are_what_they_were(name: str, quick: list[str]) -> None:
    recipe = load(name, [*quick, "baselines=[]"]).recipe
    parts = build(recipe)
    task, batches = task_named(parts.recipe.task).module(parts), iter(parts.data_module().train_dataloader())
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        out = task.training_step(next(batches), 0)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        losses.append(float(out["task_loss"]))
    assert losses == pytest.approx(GOLDEN[name], abs=1e-5)


def test_soft_labels_that_are_hard_give_the_loss_of_hard_ones_and_reach_the_estimators(quick: list[str]) -> None:
    def step(*extras: str) -> dict[str, Any]:
        parts = build(load("vit_digits", [*quick, "baselines=[]", *extras]).recipe)
        parts.model.train()
        return task_named(parts.recipe.task).module(parts).training_step(next(iter(parts.data_module().train_dataloader())), 0)

    hard, soft, smooth = step(), step("data.mixing={mixup: 1, probability: 0}"), step("data.label_smoothing=0.2")
    torch.testing.assert_close(hard["loss"], soft["loss"])
    assert soft["trace"].labels.shape == (8, 10)
    torch.testing.assert_close(smooth["trace"].labels.amax(1), torch.full((8,), 0.82))
    assert float(smooth["budget"].auxiliary) != float(hard["budget"].auxiliary)


def test_random_augmentation_and_erasing_reach_the_images(tmp_path: Path, quick: list[str]) -> None:
    from tests.data.folders import encoded, parquet

    path = parquet(tmp_path / "rows.parquet", [encoded(i) for i in range(32)], [i % 3 for i in range(32)])
    shared = [
        *of_files(quick),
        "baselines=[]",
        "data.name=parquet",
        f"data.data_files={path}",
        "model.config.num_channels=3",
        "budget.target=0.7",
    ]

    def rows(*extras: str) -> torch.Tensor:
        data = build(load("vit_digits", [*shared, *extras]).recipe).data
        return torch.stack([data.train[index]["pixel_values"] for index in range(8)])

    plain = rows()
    for extra in ("data.random_augment={operations: 3}", "data.erase=0.9"):
        assert torch.equal(rows(extra), rows(extra))
        assert not torch.equal(rows(extra), plain)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.settings.hidden_dropout_prb=0.1"], r"model.settings.hidden_dropout_prb is not a setting of vit; did you mean model.settings.hidden_dropout_prob"),
        (["model.settings.drop_path_rate=0.1"], r"model.settings.drop_path_rate: vit of transformers has no stochastic depth"),
        (["model.config.drop_path_rate=0.1"], r"model.config.drop_path_rate: vit of transformers has no stochastic depth"),
        (["data.erase=0.1"], r"data.erase applies to image files, and data.name = 'scattered_digits' generates its images"),
        (["data.mixing.probability=0.5"], r"data.mixing mixes nothing"),
        (["data.random_augment.magnitude=11"], r"data.random_augment.magnitude = 11.* must be from 0 to 10"),
        (["data.random_augment.magnitud=5"], r"did you mean data.random_augment.magnitude\?"),
        (["data.mixing.mixap=0.5"], r"did you mean data.mixing.mixup\?"),
        (["distillation.teacher=dense_self"], r"train the dense recipe first"),
        (["distillation.wieght=0.1"], r"did you mean distillation.weight\?"),
        (["trainer.ema=1.0"], r"trainer.ema = 1.0: input should be less than 1"),
    ],
)  # fmt: skip
def test_a_mistake_names_the_key_and_the_cure(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate(load("vit_digits", overrides).recipe)


def test_settings_are_laid_over_a_loaded_model_but_never_change_its_weights(tmp_path: Path, quick: list[str]) -> None:
    dense("vit").save_pretrained(tmp_path)
    shared = [item for item in of_files(quick) if not item.startswith("model")]
    shared += ["baselines=[]", "model.config=null", f"model.name={tmp_path}", "data.name=parquet", "budget.target=0.6"]
    from tests.data.folders import encoded, parquet

    shared.append(f"data.data_files={parquet(tmp_path / 'rows.parquet', [encoded(i) for i in range(32)], [i % 3 for i in range(32)])}")
    model = build(load("vit_digits", [*shared, "model.settings.hidden_dropout_prob=0.25"]).recipe).model
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} >= {0.25}
    with pytest.raises(ValueError, match=r"model.settings intermediate_size: would change the weights that model.name loads"):
        validate(load("vit_digits", [*shared, "model.settings.intermediate_size=64"]).recipe)
