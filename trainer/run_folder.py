"""Where things lie in the folders that training and exporting write. The trainer asks here; ``modules`` knows weights and adapters alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..modules.checkpoints import loading
from ..modules.checkpoints.adapter_folder import is_adapter
from ..modules.checkpoints.base_weights import Base
from ..modules.checkpoints.lora import merge_lora
from .errors import RecipeError
from .recipe.files import read_recorded
from .recipe.schema import Recipe

MODEL, ADAPTER, RECIPE = "model", "adapter", "recipe.yaml"
# Files of transformers that lie beside weights.
TOKENIZER, PROCESSOR = "tokenizer_config.json", "preprocessor_config.json"


@dataclass(frozen=True)
class RunFolder:
    """A folder that training writes: recipe, report, log, checkpoints, and the weights once training has ended.

    The weights are whole in ``model/``, or what was trained on frozen ones in ``adapter/``. A checkpoint that is a folder has one of the
    two as well. An export has the recipe too, and is the folder of its weights or adapter itself.

    Attributes:
        path: of the run or export. Recipe, report, log and checkpoints are places, which need not be there yet.
        inside: folder that weights are looked for in; None is ``path``, else a checkpoint of the run, or its ``model/`` or ``adapter/``.
    """

    path: Path
    inside: Path | None = None

    @staticmethod
    def of(path: str | Path) -> RunFolder:
        """The run or export that a folder is, or that a checkpoint, ``model/`` or ``adapter/`` is of; the folder itself where it is of none."""
        given = Path(path)
        if given.is_file():
            return RunFolder(given.parent.parent)
        above = given.parent if given.name in (MODEL, ADAPTER) else given
        run = above.parent.parent if above.suffix == ".ckpt" else above
        if (given / RECIPE).is_file() or not (run / RECIPE).is_file():
            return RunFolder(given)
        return RunFolder(run, given)

    @staticmethod
    def open(path: str | Path) -> RunFolder:
        """A run that has ended, or an export, with the recipe that it was trained with.

        Raises:
            RecipeError: the folder is none of these.
        """
        if not Path(path).is_dir():
            raise RecipeError(f"{path} is no folder: give a run folder, or the folder of an export")
        run = RunFolder.of(path)
        if not run.recipe.is_file():
            raise RecipeError(f"{path} has no {RECIPE}: give a run folder, or the folder of an export")
        try:
            run.trained()
        except FileNotFoundError as error:
            raise RecipeError(str(error)) from None
        return run

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / RECIPE

    @property
    def report(self) -> Path:
        """Figures of the run."""
        return self.path / "report.json"

    @property
    def log(self) -> Path:
        """What the run printed."""
        return self.path / "log.txt"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints, each a file or folder ``*.ckpt``."""
        return self.path / "checkpoints"

    def arm(self, name: str) -> RunFolder:
        """The run of a control arm."""
        return RunFolder(self.path / "baselines" / name)

    @property
    def adapter(self) -> Path | None:
        """Folder of what was trained on frozen weights; None where there is none."""
        here = self.inside or self.path
        return next((place for place in (here, here / ADAPTER) if is_adapter(place)), None)

    @property
    def model(self) -> Path | None:
        """Folder of whole weights; None where there is none."""
        here = self.inside or self.path
        return next((place for place in (here, here / MODEL) if (place / "config.json").is_file()), None)

    def trained(self, whole: bool = False) -> Path:
        """Folder of the adapter, or else of whole weights.

        Args:
            whole: an adapter does not do.

        Raises:
            FileNotFoundError: there is none.
        """
        here, adapter, model = self.inside or self.path, self.adapter, self.model
        found = model if whole else adapter or model
        if found is not None:
            return found
        if adapter is not None:
            raise FileNotFoundError(f"{here} holds an adapter, and whole weights are needed: laconic export {here} --to FOLDER merges it")
        if self.recipe.is_file():
            raise FileNotFoundError(
                f"{here} holds no trained model yet (no {MODEL}/config.json): its run has not ended; laconic train … --resume auto"
            )
        raise FileNotFoundError(f"{here} has no config.json: give a run folder, or the folder of weights, of an adapter or of an export")

    def with_file(self, file: str) -> Path | None:
        """The folder of the adapter or weights, if TOKENIZER, PROCESSOR or another file lies there; else None."""
        return next((place for place in (self.adapter, self.model) if place is not None and (place / file).is_file()), None)

    def written(self, base: Base | None) -> Path:
        """Where weights are written: ``adapter/`` over frozen ones, else ``model/``."""
        return self.path / (MODEL if base is None else ADAPTER)

    def remove_weights(self) -> None:
        """Deletes what an earlier run left in ``model/`` and ``adapter/``."""
        for name in (MODEL, ADAPTER):
            shutil.rmtree(self.path / name, ignore_errors=True)

    def read_recipe(self, overrides: Sequence[str] = ()) -> Recipe:
        """The recipe that was trained, with overrides laid over it. Raises RecipeError."""
        return read_recorded(self.recipe, overrides)

    def read_report(self) -> dict[str, Any] | None:
        """The run's figures; None where there is no report."""
        if not self.report.is_file():
            return None
        report: dict[str, Any] = json.loads(self.report.read_text())
        return report


def located(name: str | Path, whole: bool = False) -> str:
    """Folder of the weights or adapter that a run, checkpoint, export or plain folder holds; a checkpoint that is a file, or a hub name, as it is.

    Args:
        name: folder, file or hub name.
        whole: an adapter does not do.

    Raises:
        FileNotFoundError: the folder holds none.
    """
    return str(RunFolder.of(name).trained(whole)) if Path(name).is_dir() else str(name)


def from_pretrained(folder: str | Path, base: str | Path | None = None, **kwargs: Any) -> PreTrainedModel:
    """A model from what Laconic wrote, with its stages and its LoRA.

    Args:
        folder: an adapter; a compressed model (``save_pretrained``, ``laconic export``); a training run, or one of its checkpoints, a file or
            a folder, whatever of these it holds; or a repository on the hub with one of the first two.
        base: for an adapter: folder or hub name of its base, where it is elsewhere than the manifest says.
        kwargs: passed to transformers' ``from_pretrained`` (``dtype``, ``attn_implementation``, ``revision`` …).

    Returns:
        The model in evaluation mode. LoRA is in place and not merged: ``laconic.merge_lora(model)`` merges it.

    Raises:
        FileNotFoundError: the folder holds no model.
        ValueError: the config holds no compression, or its class is unknown; an adapter is damaged or of another base.
        RuntimeError: weights are missing, left over, or of another shape; nothing is initialised silently.
    """
    return loading.from_pretrained(located(folder), base, **kwargs)


def load_model(folder: str | Path) -> PreTrainedModel:
    """A trained model, compressed or dense, in evaluation mode; an adapter's LoRA is merged into the weights of its base.

    Args:
        folder: of a run, checkpoint, export, weights or adapter.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: as ``from_pretrained``.
    """
    place = Path(located(folder))
    if is_adapter(place):
        model = loading.from_pretrained(place)
        return merge_lora(model) if hasattr(model, "peft_config") else model
    if "compression" in json.loads((place / "config.json").read_text()):
        return loading.from_pretrained(place)
    return loading.saved_class(place).from_pretrained(place, use_safetensors=True).eval()
