"""Locations of files in the folders that training and export write. ``modules`` itself knows only folders of weights and adapters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedModel

from ..modules.budget.start_routers import Fitted
from ..modules.checkpoints import loading
from ..modules.checkpoints.adapter_folder import is_adapter
from ..modules.checkpoints.base_weights import Base, check_weights
from ..modules.checkpoints.foreign_config import load_config, settings_errors
from ..modules.checkpoints.lora import merge_lora
from ..modules.checkpoints.whole_files import PARTIAL, DamagedFile, check_hashes, compare
from .errors import RecipeError, first_fault
from .recipe.files import read_recorded
from .recipe.schema import Recipe

MODEL, ADAPTER, RECIPE, ARMS, DATA = "model", "adapter", "recipe.yaml", "baselines", "data"
# Facts of an export, with the hashes of its files.
EXPORTED = "export.json"
# Files of exports that are graphs, by format.
GRAPHS = {"onnx": "model.onnx", "torch-export": "model.pt2"}
# Files of transformers beside the weights.
TOKENIZER, PROCESSOR, PROCESSOR_OF_CHATS = "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"


@dataclass(frozen=True)
class RunFolder:
    """A folder written by training: recipe, report, log, checkpoints, and, after the end of training, the weights.

    The weights are the whole model in ``model/``, or the parts trained on frozen weights in ``adapter/``. A checkpoint folder has one of
    the two as well. An export has the recipe too, and is itself the folder of its weights or adapter.

    Attributes:
        path: folder of the run or export. Its recipe, report, log and checkpoints need not exist yet.
        inside: folder in which weights are searched: a checkpoint of the run, or its ``model/`` or ``adapter/``; None is ``path``.
    """

    path: Path
    inside: Path | None = None

    @staticmethod
    def of(path: str | Path) -> RunFolder:
        """The run or export of a path: of itself, or of a checkpoint, ``model/`` or ``adapter/``; a path in no run is its own folder."""
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
        """A finished run, or an export, with the recipe of its training.

        Raises:
            RecipeError: the folder is neither.
        """
        if not Path(path).is_dir():
            raise RecipeError(f"{path} is not a folder: name a run folder, or the folder of an export")
        run = RunFolder.of(path)
        if not run.recipe.is_file():
            raise RecipeError(f"{path} has no {RECIPE}: name a run folder, or the folder of an export")
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
        """Results of the run, ``report.json``."""
        return self.path / "report.json"

    @property
    def page(self) -> Path:
        """The report as a page, with curves and pictures."""
        return self.path / "report.html"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def csv(self) -> Path:
        """Folder of the CSV logger, with a folder ``version_N`` for each time that the run was started."""
        return self.path / "csv"

    @property
    def trackers(self) -> Path:
        """What trackers of experiments know the run by."""
        return self.path / "trackers.json"

    @property
    def log(self) -> Path:
        """Output of the run, ``log.txt``."""
        return self.path / "log.txt"

    @property
    def kept_tokens(self) -> Path:
        """Picture of the tokens that the arms keep."""
        return self.path / "kept_tokens.png"

    @property
    def step_time(self) -> Path:
        """What a step takes on the device of the run, by macs_ratio, where the budget's measure is ``step_time``."""
        return self.path / "step_time.json"

    @property
    def fitted(self) -> Path:
        """How well the parts that were fitted before the first step predict."""
        return self.path / "fitted.json"

    @property
    def answers(self) -> Path:
        """The single answers on held-out data, one a line."""
        return self.path / "answers.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints, each a file or folder ``*.ckpt``."""
        return self.path / "checkpoints"

    def arm(self, name: str) -> RunFolder:
        """Run folder of a control arm."""
        return RunFolder(self.path / ARMS / name)

    @property
    def adapter(self) -> Path | None:
        """Folder of the parts trained on frozen weights; None if there is none."""
        here = self.inside or self.path
        return next((place for place in (here, here / ADAPTER) if is_adapter(place)), None)

    @property
    def model(self) -> Path | None:
        """Folder of the whole weights; None if there is none."""
        here = self.inside or self.path
        return next((place for place in (here, here / MODEL) if (place / "config.json").is_file()), None)

    def trained(self, whole: bool = False) -> Path:
        """Folder of the adapter, otherwise of the whole weights.

        Args:
            whole: require whole weights; an adapter is not enough.

        Raises:
            FileNotFoundError: the folder does not have them.
        """
        here, adapter, model = self.inside or self.path, self.adapter, self.model
        found = model if whole else adapter or model
        if found is not None:
            return found
        if adapter is not None:
            raise FileNotFoundError(f"{here} has an adapter, and whole weights are needed: laconic export {here} --to FOLDER merges it")
        if self.recipe.is_file():
            raise FileNotFoundError(
                f"{here} has no trained model yet (no {MODEL}/config.json): its run has not ended; use laconic train … --resume auto"
            )
        raise FileNotFoundError(f"{here} has no config.json: name a run folder, or the folder of weights, of an adapter or of an export")

    def with_file(self, file: str) -> Path | None:
        """The folder of the adapter or weights, or of what the run fitted to its data, that has TOKENIZER, PROCESSOR or another file; None
        if there is none."""
        places = (self.adapter, self.model, self.data)
        return next((place for place in places if place is not None and (place / file).is_file()), None)

    @property
    def data(self) -> Path:
        """What belongs to the run's data, written at its start: the tokenizer, and ``data.json``, the names of the classes and hashes."""
        return self.path / DATA

    @property
    def tower(self) -> Path:
        """Config of the vision tower that the run took from ``model.tower_of``, whose folder may be gone when the run goes on."""
        return self.data / "tower.json"

    def written(self, base: Base | None) -> Path:
        """Folder that weights are written to: ``adapter/`` on frozen weights, otherwise ``model/``."""
        return self.path / (MODEL if base is None else ADAPTER)

    @property
    def lock(self) -> Path:
        """File that the process holds which trains in this folder."""
        return self.path / ".lock"

    @property
    def started(self) -> bool:
        """Whether a run has saved something here: a checkpoint, weights, a report, or a control arm's."""
        saved = [self.path / MODEL, self.path / ADAPTER, self.report, *self.checkpoints.glob("*.ckpt")]
        return any(path.exists() for path in saved) or any(RunFolder(arm).started for arm in (self.path / ARMS).glob("*"))

    def clear(self, arms: bool = True) -> None:
        """Deletes what an earlier run wrote, results first, so that nothing old lies beside a new recipe. Other files stay, and so does
        everything in a folder that never had a run.

        Args:
            arms: delete the control arms too.
        """
        if not self.recipe.is_file() and not self.started:
            return
        self.report.unlink(missing_ok=True)
        folders = (self.checkpoints, self.tensorboard, self.csv, *(self.path / name for name in (MODEL, ADAPTER, DATA)))
        for path in (*folders, *([self.path / ARMS] if arms else [])):
            shutil.rmtree(path, ignore_errors=True)
        of_results = (self.page, self.kept_tokens, self.answers)
        for path in (self.recipe, self.log, self.trackers, self.step_time, self.fitted, *of_results):
            path.unlink(missing_ok=True)

    def remove_partial(self) -> None:
        """Deletes what a killed process was writing. Only the owner of the folder may call this."""
        for path in list(self.path.rglob(f"*{PARTIAL}")):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def read_recipe(self, overrides: Sequence[str] = ()) -> Recipe:
        """The recorded recipe, with overrides. Raises RecipeError if it does not fit this version, or an override is wrong."""
        return read_recorded(self.recipe, overrides)

    def read_report(self) -> dict[str, Any] | None:
        """Content of the report; None if there is none."""
        return _content(self.report)

    def read_fitted(self) -> Fitted:
        """Content of ``fitted``; empty if there is none. Raises DamagedFile."""
        return _checked(self.fitted, Fitted) or Fitted()

    def read_trackers(self) -> dict[str, str | list[str]]:
        """Content of ``trackers``; empty if there is none. Raises DamagedFile."""
        return _checked(self.trackers, dict[str, str | list[str]]) or {}

    def read_tower(self) -> dict[str, Any] | None:
        """Content of ``tower``; None if there is none. Raises DamagedFile."""
        return _content(self.tower)


def _checked(path: Path, kind: Any) -> Any:
    """The content of a JSON file as a type; None if there is no file. Raises DamagedFile if it holds something else."""
    content = _content(path)
    try:
        return None if content is None else TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        raise DamagedFile(f"{path} is damaged: {first_fault(error)}; delete it, or train again") from None


def _content(path: Path) -> dict[str, Any] | None:
    """The mapping of a JSON file; None if there is no file. Raises DamagedFile if it holds something else."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path} is damaged: {error}; delete it, or train again") from None
    if not isinstance(content, dict):
        raise DamagedFile(f"{path} is damaged: it holds {type(content).__name__}; delete it, or train again")
    return content


def check_files(weights: Path) -> None:
    """Compares the files of the weights or adapter with the hashes that were written with them.

    Raises:
        DamagedFile: a file is missing or differs.
        FileNotFoundError: the folder has a graph and no weights.
        ValueError: the index of the weights lists a file outside the folder.
    """
    graph = next((name for name in GRAPHS.values() if (weights / name).is_file()), None)
    if graph is not None and not any(any(weights.glob(kind)) for kind in ("*.safetensors", "*.bin")):
        raise FileNotFoundError(
            f"{weights} holds {graph}, a graph without weights that can be loaded: run it as its README.md shows, and name here the run that it "
            "is of, or an export of --format merged or standalone"
        )
    check_hashes(weights)
    if not is_adapter(weights):
        check_weights(weights)
    record = weights / EXPORTED
    if record.is_file():
        try:
            files = json.loads(record.read_text("utf-8"))["files"]
        except (ValueError, KeyError, TypeError):
            raise DamagedFile(f"{record} is damaged: export again") from None
        compare(weights, files, EXPORTED)


def located(name: str | Path, whole: bool = False) -> str:
    """Weights or adapter folder of a run, checkpoint, export or plain folder. A single-file checkpoint or hub name is returned as is.

    Args:
        name: folder, file or hub name.
        whole: require whole weights; an adapter is not enough.

    Raises:
        FileNotFoundError: the folder does not have them.
    """
    return str(RunFolder.of(name).trained(whole)) if Path(name).is_dir() else str(name)


def from_pretrained(
    folder: str | Path, base: str | Path | None = None, keep: float | Mapping[str, float] | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Loads a model that Laconic wrote, with its stages and its LoRA.

    Args:
        folder: an adapter; a compressed model (``save_pretrained``, ``laconic export``); a training run, or one of its checkpoints (file
            or folder); or a hub repository with one of the first two.
        base: for an adapter, folder or hub name of its base; None uses the location in the manifest.
        keep: another keep for all stages, or by stage name, as for ``laconic.set_keep``; None leaves them their own.
        kwargs: arguments of transformers' ``from_pretrained`` (``dtype``, ``attn_implementation``, ``revision`` …).

    Returns:
        The model in evaluation mode. LoRA is not merged: ``laconic.merge_lora(model)`` merges it.

    Raises:
        FileNotFoundError: the folder has no model.
        ValueError: the config has no compression, or its class is unknown; an adapter is damaged or belongs to another base.
        RuntimeError: weights are missing, unexpected or of another shape; nothing is initialised silently.
    """
    place = located(folder)
    if Path(place).is_dir():
        check_files(Path(place))
    return loading.from_pretrained(place, base, keep, **kwargs)


def load_model(folder: str | Path) -> PreTrainedModel:
    """Loads a trained model, compressed or dense, in evaluation mode; an adapter's LoRA is merged into its base.

    Args:
        folder: folder of a run, checkpoint, export, weights or adapter.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: as in ``from_pretrained``; also if a weight is not finite.
    """
    place = Path(located(folder))
    if place.is_dir():
        check_files(place)
    if is_adapter(place):
        model = loading.from_pretrained(place)
        model = merge_lora(model) if hasattr(model, "peft_config") else model
    elif getattr(load_config(place), "compression", None) is not None:
        model = loading.from_pretrained(place)
    else:
        with settings_errors(f"{place} cannot be loaded", DamagedFile):
            loaded: Any = loading.saved_class(place).from_pretrained(
                place, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
        model, report = loaded
        if missing := sorted(map(str, report["missing_keys"])):
            raise DamagedFile(
                f"{place} lacks {len(missing)} tensors of a {type(model).__name__}, {missing[0]} first, which would be random: train it, or get "
                "the model again"
            )
        model.eval()
    wrong = [name for name, value in model.named_parameters() if value.is_floating_point() and not bool(torch.isfinite(value).all())]
    if wrong:
        raise DamagedFile(f"{place}: {len(wrong)} tensors hold values that are not finite, {wrong[0]} first: train or get the model again")
    return model
