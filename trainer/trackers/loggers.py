"""Lightning's loggers of a run, by ``trainer.loggers``."""

from __future__ import annotations

import importlib.util
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from ...modules.checkpoints.whole_files import write_json
from ..distributed import collective
from ..errors import RecipeError
from ..recipe.schema import Recipe
from ..run_folder import ARMS, RunFolder
from .trackio import TrackioLogger

# Project of the trackers, where no variable of theirs names another one.
PROJECT = "laconic"


@dataclass(frozen=True)
class Started:
    """What a logger is made for.

    Attributes:
        run: folder of the run.
        name: name of the run in a tracker.
        ids: what trackers know the run by; ``id`` is drawn here, others are the tracker's own.
    """

    run: RunFolder
    name: str
    ids: Mapping[str, str]


def _tensorboard(started: Started) -> Logger:
    return TensorBoardLogger(started.run.path, name=started.run.tensorboard.name, version="")


def _csv(started: Started) -> Logger:
    # A new version for each start: Lightning deletes the file of an existing one. Written at once, since a run may be killed.
    return CSVLogger(started.run.path, name=started.run.csv.name, flush_logs_every_n_steps=1)


def _trackio(started: Started) -> Logger:
    return TrackioLogger(os.environ.get("TRACKIO_PROJECT", PROJECT), f"{started.name}-{started.ids['id']}")


def _wandb(started: Started) -> Logger:
    # Lightning lets wandb go on with the run of this id, if there is one.
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    return WandbLogger(name=started.name, save_dir=started.run.path, project=project, id=started.ids["id"])


def _mlflow(started: Started) -> Logger:
    from mlflow import get_tracking_uri

    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    return MLFlowLogger(experiment, started.name, get_tracking_uri(), run_id=started.ids.get("mlflow"))


_MADE: Mapping[str, Callable[[Started], Logger]] = {
    "tensorboard": _tensorboard,
    "csv": _csv,
    "trackio": _trackio,
    "wandb": _wandb,
    "mlflow": _mlflow,
}
# Loggers that are packages of their own, named alike, and keep the recipe.
TRACKERS = ("trackio", "wandb", "mlflow")


def check_loggers(names: Sequence[str]) -> None:
    """Raises RecipeError for a logger whose package is not installed."""
    for name in names:
        found = importlib.util.find_spec(name) if name in TRACKERS else None
        # A folder of the same name, such as wandb's own beside the runs, is found too, and has no file.
        if name in TRACKERS and (found is None or found.origin is None):
            raise RecipeError(
                f"trainer.loggers has {name}, whose package is not installed: pip install {name}, or remove it from trainer.loggers"
            )


def start_loggers(recipe: Recipe, run: RunFolder) -> list[Logger]:
    """The loggers of a run, in the recipe's order; trackers get the recipe.

    Args:
        recipe: resolved recipe.
        run: folder of the run, which keeps what trackers know it by. A new run has an empty one; one that is resumed goes on there too.

    Returns:
        The loggers; on other ranks than the first they log nothing.
    """
    names = recipe.trainer.loggers
    known = json.loads(run.trackers.read_text()) if run.trackers.is_file() else {}
    ids = {"id": uuid.uuid4().hex[:8], **known}
    above = [run.path.parent.parent.name] if run.path.parent.name == ARMS else []
    started = Started(run, "/".join([*above, run.path.resolve().name]), ids)
    loggers = [_MADE[name](started) for name in names]
    if collective.rank() == 0 and any(name in TRACKERS for name in names):
        new = [name for name in names if name in TRACKERS and name not in known.get("sent", [])]
        for name, logger in zip(names, loggers, strict=True):
            if name in new:
                logger.log_hyperparams(recipe.model_dump(mode="json"))
            if isinstance(logger, MLFlowLogger):
                ids["mlflow"] = str(logger.run_id)
        write_json(run.trackers, {**ids, "sent": [*known.get("sent", []), *new]})
    return loggers


def finish_loggers(loggers: Sequence[Logger]) -> None:
    """Ends the runs of trackers that have one run a process, so that the next control arm begins its own."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()
        elif isinstance(logger, TrackioLogger):
            logger.finish()
