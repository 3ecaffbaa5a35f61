"""Lightning's loggers of a run, by ``trainer.loggers``."""

from __future__ import annotations

import importlib.util
import os
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
        The loggers; on other ranks than the first they log nothing. A tracker that fails later is a warning.

    Raises:
        RecipeError: a tracker cannot start a run.
        DamagedFile: what trackers know the run by is damaged.
    """
    names = recipe.trainer.loggers
    known = run.read_trackers()
    before = known.pop("sent", [])
    ids = {"id": uuid.uuid4().hex[:8], **{name: str(value) for name, value in known.items()}}
    above = [run.path.parent.parent.name] if run.path.parent.name == ARMS else []
    started = Started(run, "/".join([*above, run.path.resolve().name]), ids)
    loggers = [_begun(name, lambda name=name: _MADE[name](started)) for name in names]  # type: ignore[misc]
    if collective.rank() == 0 and any(name in TRACKERS for name in names):
        new = [name for name in names if name in TRACKERS and name not in before]
        for name, logger in zip(names, loggers, strict=True):
            if name in new:
                _begun(name, lambda logger=logger: logger.log_hyperparams(recipe.model_dump(mode="json")))  # type: ignore[misc]
            if isinstance(logger, MLFlowLogger):
                ids["mlflow"] = _begun(name, lambda logger=logger: str(logger.run_id))  # type: ignore[misc]
        write_json(run.trackers, {**ids, "sent": [*before, *new]})
    for name, logger in zip(names, loggers, strict=True):
        if name in TRACKERS:
            # Training is worth more than a server that is gone.
            for call in ("log_metrics", "save", "finalize"):
                setattr(logger, call, _forgiven(name, getattr(logger, call)))
    return loggers


def _begun(name: str, start: Callable[[], Any]) -> Any:
    """Result of a function that starts a run of a tracker. Raises RecipeError if it fails."""
    if name not in TRACKERS:
        return start()
    try:
        return start()
    except Exception as error:
        raise RecipeError(
            f"trainer.loggers has {name}, which cannot start a run: {type(error).__name__}: {error}; set it up, or remove it from "
            "trainer.loggers"
        ) from error


def _forgiven(name: str, call: Callable[..., Any]) -> Callable[..., None]:
    """A call of a tracker whose errors are warnings."""

    def forgiven(*args: Any, **kwargs: Any) -> None:
        try:
            call(*args, **kwargs)
        except Exception as error:
            warnings.warn(f"{name} of trainer.loggers failed, and training goes on: {type(error).__name__}: {error}", stacklevel=2)

    return forgiven


def finish_loggers(loggers: Sequence[Logger]) -> None:
    """Ends the runs of trackers that have one run a process, so that the next control arm begins its own."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            _forgiven("wandb", lambda logger=logger: logger.experiment.finish())()
        elif isinstance(logger, TrackioLogger):
            _forgiven("trackio", logger.finish)()
