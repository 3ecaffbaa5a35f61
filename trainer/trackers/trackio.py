"""Lightning's logger for trackio, which Lightning does not have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only


class TrackioLogger(Logger):
    """Logs to a run of trackio, on rank 0.

    Args:
        project: the project.
        name: name of the run; an existing run of this name goes on.
    """

    def __init__(self, project: str, name: str) -> None:
        super().__init__()
        self._project, self._name = project, name
        self._config: dict[str, Any] = {}
        self._run: Any = None

    @property
    def name(self) -> str:
        return self._project

    @property
    def version(self) -> str:
        return self._name

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """trackio's run, which starts at the first use."""
        if self._run is None:
            import trackio

            self._run = trackio.init(project=self._project, name=self._name, config=self._config, resume="allow")
        return self._run

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Config of the run; trackio takes it at the start only, so that this comes before all metrics."""
        self._config |= params

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    def finish(self) -> None:
        """Sends what is left; the next use goes on with the run."""
        if self._run is not None:
            import trackio

            # Of the module, which would end it again at the next start otherwise.
            trackio.finish()
            self._run = None
