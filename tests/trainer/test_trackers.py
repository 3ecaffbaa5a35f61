"""Where the scalars of a run go. Trackers are stand-ins: what counts is what they are told."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import mlflow as lightning_mlflow
from lightning.pytorch.loggers import wandb as lightning_wandb
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from laconic.modules.checkpoints.whole_files import DamagedFile
from laconic.trainer.errors import RecipeError
from laconic.trainer.recipe.files import load
from laconic.trainer.report_page.curves import curves_of
from laconic.trainer.run import train_arm
from laconic.trainer.run_folder import RunFolder
from laconic.trainer.trackers import loggers as loggers_module
from laconic.trainer.trackers.loggers import TRACKERS, check_loggers, finish_loggers, start_loggers

Told = list[tuple[Any, ...]]


def _module(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(content)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def _trackio(monkeypatch: pytest.MonkeyPatch, told: Told) -> None:
    def init(project: str, name: str, config: dict[str, Any], resume: str) -> Any:
        told.append(("run", name, resume == "allow"))
        told.extend([("recipe", config["seed"])] if config else [])
        return SimpleNamespace(log=lambda metrics, step: told.append(("log", metrics["a"], step)))

    _module(monkeypatch, "trackio", init=init, finish=lambda: told.append(("finish",)))


def _wandb(monkeypatch: pytest.MonkeyPatch, told: Told) -> None:
    class Run:
        config = SimpleNamespace(update=lambda params, allow_val_change: told.append(("recipe", params["seed"])))

        def define_metric(self, *args: Any, **kwargs: Any) -> None: ...

        def log(self, metrics: dict[str, Any]) -> None:
            told.append(("log", metrics["a"], metrics["trainer/global_step"]))

        def finish(self) -> None:
            told.append(("finish",))
            wandb.run = None

    def init(id: str, resume: str, **kwargs: Any) -> Run:
        told.append(("run", id, resume == "allow"))
        wandb.run = Run()
        return wandb.run

    wandb: Any = _module(monkeypatch, "wandb", run=None, init=init)
    _module(monkeypatch, "wandb.sdk")
    _module(monkeypatch, "wandb.sdk.lib", RunDisabled=type("RunDisabled", (), {}))
    _module(monkeypatch, "wandb.wandb_run", Run=Run)
    monkeypatch.setattr(lightning_wandb, "_WANDB_AVAILABLE", True)


def _mlflow(monkeypatch: pytest.MonkeyPatch, told: Told) -> None:
    class Client:
        def __init__(self, uri: str) -> None: ...

        def get_experiment_by_name(self, name: str) -> Any:
            return SimpleNamespace(lifecycle_stage="active", experiment_id=name)

        def get_run(self, run: str) -> Any:
            told.append(("run", run, True))
            return SimpleNamespace(info=SimpleNamespace(experiment_id="1"))

        def create_run(self, experiment_id: str, tags: Any) -> Any:
            told.append(("run", "of mlflow", True))
            return SimpleNamespace(info=SimpleNamespace(run_id="of mlflow"))

        def log_batch(self, run_id: str, params: Any = (), metrics: Any = ()) -> None:
            told.extend(("recipe", int(item.value)) for item in params if item.key == "seed")
            told.extend(("log", item.value, item.step) for item in metrics)

    _module(monkeypatch, "mlflow", get_tracking_uri=lambda: "x", set_tracking_uri=lambda uri: None)
    _module(monkeypatch, "mlflow.tracking", MlflowClient=Client)
    _module(monkeypatch, "mlflow.entities", Param=SimpleNamespace, Metric=SimpleNamespace)
    _module(monkeypatch, "mlflow.utils")
    _module(monkeypatch, "mlflow.utils.mlflow_tags", MLFLOW_RUN_NAME="name")
    monkeypatch.setattr(lightning_mlflow, "_MLFLOW_AVAILABLE", True)
    monkeypatch.setattr(lightning_mlflow, "_get_resolve_tags", lambda: lambda tags: tags)


STAND_INS = {"trackio": _trackio, "wandb": _wandb, "mlflow": _mlflow}


def _session(recipe: Any, run: RunFolder, value: float) -> None:
    loggers = start_loggers(recipe, run)
    for logger in loggers:
        logger.log_metrics({"a": value}, 5)
    finish_loggers(loggers)


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_gets_the_recipe_once_and_goes_on_with_the_run_that_is_resumed(
    name: str, tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: Told = []
    STAND_INS[name](monkeypatch, told)
    recipe = load("vit_digits", [*quick, f"trainer.loggers=[{name}]", "seed=7"]).recipe
    run, other = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run" / "baselines" / "dense")
    _session(recipe, run, 1.0)
    _session(recipe, run, 2.0)
    assert [event for event in told if event[0] == "recipe"] == [("recipe", 7)]
    assert [event for event in told if event[0] == "log"] == [("log", 1.0, 5), ("log", 2.0, 5)]
    runs = [event for event in told if event[0] == "run"]
    assert runs[0] == runs[-1]
    assert runs[0][2]
    assert name == "mlflow" or [event[0] for event in told].count("finish") == 2
    before = json.loads(run.trackers.read_text())["id"]
    _session(recipe, other, 3.0)
    # A control arm is a run of its own.
    assert json.loads(other.trackers.read_text())["id"] != before
    assert [event for event in told if event[0] == "recipe"] == [("recipe", 7)] * 2


@pytest.mark.parametrize("name", TRACKERS)
def test_other_ranks_than_the_first_tell_trackers_nothing(
    name: str, tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: Told = []
    STAND_INS[name](monkeypatch, told)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    monkeypatch.setattr("laconic.trainer.distributed.collective.rank", lambda: 1)
    run = RunFolder(tmp_path / "run")
    _session(load("vit_digits", [*quick, f"trainer.loggers=[{name}]"]).recipe, run, 1.0)
    assert told == []
    assert not run.trackers.exists()


def test_a_tracker_that_fails_in_training_is_a_warning_and_one_that_cannot_start_is_refused(
    tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("no server")

    recipe, run = load("vit_digits", [*quick, "trainer.loggers=[trackio]"]).recipe, RunFolder(tmp_path / "run")
    started = SimpleNamespace(log=fails)
    _module(monkeypatch, "trackio", init=lambda **settings: started, finish=fails)
    loggers = start_loggers(recipe, run)
    with pytest.warns(UserWarning, match="trackio of trainer.loggers failed, and training goes on: ConnectionError: no server"):
        loggers[0].log_metrics({"a": 1.0}, 5)
    with pytest.warns(UserWarning, match="trackio of trainer.loggers failed"):
        finish_loggers(loggers)
    run.trackers.write_text('{"id": 3}')
    with pytest.raises(DamagedFile, match=r"trackers\.json is damaged: id\..*; delete it, or train again"):
        start_loggers(recipe, run)
    monkeypatch.setitem(loggers_module._MADE, "trackio", fails)
    with pytest.raises(RecipeError, match="trainer.loggers has trackio, which cannot start a run: ConnectionError: no server; set it up"):
        start_loggers(recipe, RunFolder(tmp_path / "other"))


def test_a_run_writes_scalars_to_every_logger_and_pictures_to_tensorboard(tmp_path: Path, quick: list[str], console: Console) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_arm(load("vit_digits", [*quick, "trainer.loggers=[csv, tensorboard]"]), "arm", tmp_path / "run", console)
    run = RunFolder(tmp_path / "run")
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    assert events.Tags()["histograms"] == ["before_0/scores"]
    with (run.csv / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"train/loss", "before_0/keep_achieved", "val/accuracy", "test/accuracy"} <= rows[0].keys()
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert losses == pytest.approx([event.value for event in events.Scalars("train/loss")])


def test_a_resumed_run_adds_a_csv_file_and_its_curve_has_both(tmp_path: Path, quick: list[str]) -> None:
    recipe, run = load("vit_digits", [*quick, "trainer.loggers=[csv]"]).recipe, RunFolder(tmp_path)
    for steps, value in (((1, 2, 3), 1.0), ((2, 3, 4), 2.0)):
        (logger,) = start_loggers(recipe, run)
        for step in steps:
            logger.log_metrics({"train/loss": value}, step)
        # Not ended: the file is written at once.
    curve = curves_of(run)["train/loss"]
    assert (curve.steps, curve.values) == ([1, 2, 3, 4], [1, 2, 2, 2])
    assert not run.tensorboard.exists()


@pytest.mark.parametrize("found", [None, ModuleSpec("wandb", None)], ids=["missing", "a_folder_of_that_name"])
def test_a_logger_without_its_package_is_refused_with_the_command(found: ModuleSpec | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(RecipeError, match=r"trainer.loggers has wandb, whose package is not installed: pip install wandb, or remove it"):
        check_loggers(["tensorboard", "csv", "wandb"])
    check_loggers(["tensorboard", "csv"])


@pytest.mark.parametrize(
    ("names", "message"),
    [("[csv, csv]", "has a name twice"), ("[excel]", "trainer.loggers.0 = 'excel': input should be 'tensorboard', 'csv'")],
)
def test_wrong_loggers_are_refused(names: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load("vit_digits", [f"trainer.loggers={names}"])
