"""Finds a run's initial weights: ``model.name`` is a model, a run, an adapter or a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ...modules import registry
from ...modules.checkpoints.adapter_folder import Adapter, read_adapter
from ...modules.checkpoints.adapter_saving import stage_state
from ...modules.checkpoints.adapters import config_of
from ...modules.checkpoints.base_weights import check_weights, weight_files
from ...modules.checkpoints.foreign_config import load_config
from ...modules.checkpoints.loading import find_adapter
from ...modules.checkpoints.tensors import copy_all
from ...modules.checkpoints.training_checkpoint import read_checkpoint
from ...modules.checkpoints.whole_files import DamagedFile
from ...modules.config import CompressionConfig, StageConfig
from ..errors import RecipeError
from ..recipe.files import shipped
from ..recipe.schema import ModelRecipe, Recipe
from ..run_folder import RunFolder, check_files, located
from .gguf import ordinary_folder

PRETRAIN = "pretrain first, with laconic train mae_digits for example, or name another run folder, a folder of weights or a hub model"


@dataclass(frozen=True)
class Start:
    """The initial weights that ``model.name`` refers to.

    Attributes:
        name: ``model.name`` of the recipe.
        config: configuration of the dense model, without stages.
        weights: folder or hub name of the dense weights; None if ``state`` has them.
        revision: revision of a hub model.
        compression: stages trained with these weights; None for a dense model.
        adapter: adapter on these weights; None if there is none.
        state: tensors of a single-file checkpoint, by the model's parameter names.
        run: run folder of the weights; None for a hub name.
    """

    name: str
    config: PretrainedConfig
    weights: str | None
    revision: str | None = None
    compression: CompressionConfig | None = None
    adapter: Adapter | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)
    run: RunFolder | None = None

    def beside(self, file: str, key: str = "data.tokenizer") -> tuple[str, str | None]:
        """The nearest folder, or hub name and revision, with a tokenizer's or processor's file; by default that of the dense weights.

        Args:
            file: name of the file.
            key: recipe key that names another source, for the message.

        Raises:
            ValueError: the start is a single-file checkpoint, and its unfinished run has no such file.
        """
        here = None if self.run is None else self.run.with_file(file)
        if here is None and self.weights is None:
            raise ValueError(f"model.name = {self.name!r} is a checkpoint without {file}: set {key}")
        return (str(here), None) if here is not None else (str(self.weights), self.revision)


def start_of(model: ModelRecipe) -> Start | None:
    """The start that a recipe's ``model.name`` or ``model.gguf_file`` refers to; None if the recipe has neither.

    Raises:
        ValueError: the weights cannot be loaded or are damaged.
    """
    if model.gguf_file is not None:
        model = model.model_copy(update={"name": ordinary_folder(model.gguf_file)})
    if model.name is None:
        return None
    path = Path(model.name)
    if path.is_file():
        return _of_file(path)
    run = RunFolder.of(path) if path.is_dir() else None
    try:
        weights = located(model.name)
        if run is not None:
            check_files(Path(weights))
    except (FileNotFoundError, DamagedFile) as error:
        raise ValueError(f"model.name = {model.name!r} cannot be loaded: {error}") from None
    if path.exists() and model.revision is not None:
        raise ValueError(
            f"model.revision = {model.revision!r} is of a hub model, and model.name = {model.name!r} is a folder here: remove it"
        )
    check_weights(weights, model.revision)
    if (adapter := find_adapter(weights, model.revision)) is not None:
        return _of_adapter(model.name, read_adapter(adapter), run or RunFolder(adapter))
    try:
        config = load_config(weights, model.revision)
    except ValueError as error:
        if not path.exists() and path.parts[:-1] == ("runs",) and path.name in shipped():
            raise ValueError(
                f"model.name = {model.name!r} is no run here: laconic train {path.name} first, or name another start"
            ) from None
        hint = "" if path.exists() else "; a run can be a start only after it has ended"
        raise ValueError(f"model.name = {model.name!r} cannot be loaded: {str(error).splitlines()[0]}{hint}") from None
    return Start(model.name, config, weights, model.revision, _without_stages(config), run=run)


def encoder_weights(model: ModelRecipe) -> str:
    """Folder or hub name of the weights that ``model.encoder_of`` refers to. Raises ValueError if the folder has no weights."""
    assert model.encoder_of is not None
    return weights_of("model.encoder_of", model.encoder_of, PRETRAIN)


def weights_of(key: str, name: str, cure: str) -> str:
    """Folder or hub name of the whole weights that a key of a recipe refers to.

    Args:
        key: the key.
        name: its value: a run folder, a folder of weights or a hub name.
        cure: end of the message if the folder has no weights.

    Raises:
        ValueError: the folder has no weights.
    """
    try:
        weights = located(name, whole=True)
        if Path(weights).is_dir():
            check_files(Path(weights))
        return weights
    except (FileNotFoundError, DamagedFile) as error:
        raise ValueError(f"{key} = {name!r}: {error}; {cure}") from None


def check_start(recipe: Recipe, start: Start | None) -> None:
    """Raises RecipeError if the recipe's stages or LoRA do not fit the start."""
    if start is None:
        return
    name = f"model.name = {start.name!r}"
    if start.compression is not None:
        was = {stage.key: stage for stage in start.compression.stages}
        if recipe.compression is None:
            raise RecipeError(
                f"{name} was trained with stages {', '.join(was)}, and the recipe has no compression: copy the stages of its recipe.yaml, "
                "or start from a dense model"
            )
        now = {stage.key: stage for stage in recipe.compression.stages}
        if now.keys() != was.keys():
            raise RecipeError(f"{name} was trained with stages {', '.join(was)}, and the recipe has {', '.join(now)}: use the same stages")
        for key, stage in now.items():
            differing = [kind for kind in ("scorer", "selector", "merger") if stage.part(kind) != was[key].part(kind)]
            # Estimators that only shape the gradient may differ; one that weighs tokens in evaluation is a part of the model.
            if _weighing(stage) != _weighing(was[key]):
                differing.append("estimator")
            if differing:
                raise RecipeError(
                    f"stage {key!r}: its {' and '.join(differing)} differ from those that {name} was trained with: use the same"
                )
    lora = recipe.lora
    if lora is not None and lora.mode == "routers" and start.adapter is not None and start.adapter.lora_config is not None:
        raise RecipeError(
            f"{name} is an adapter with LoRA, and lora.mode = 'routers' would ignore it: set lora.mode=lora, or name its merged export"
        )
    if lora is not None and lora.freezes and start.weights is None:
        raise RecipeError(
            f"{name} is a checkpoint of all weights, which an adapter cannot name as its base: name a folder, or set lora.mode=full"
        )


def _weighing(stage: StageConfig) -> str | None:
    """Name of a stage's estimator if it weighs tokens in evaluation; None otherwise."""
    if stage.estimator is None:
        return None
    part = stage.part("estimator")
    return part.name if registry.part_class("estimator", part).in_evaluation else None


def load_stages(model: PreTrainedModel, start: Start) -> None:
    """Copies the start's stage weights into a compressed model, in place; the stages of a dense start keep their random weights."""
    if start.compression is None:
        return
    if start.adapter is not None:
        tensors: Mapping[str, Tensor] = start.adapter.stages
    else:
        # Only the stages' own parameters: not those of the head, not tied ones.
        tensors = _stage_tensors(start, set(stage_state(model)))
    copy_all(stage_state(model), tensors, f"the routers of model.name = {start.name!r}")


def load_state(model: PreTrainedModel, start: Start) -> list[str]:
    """Copies a single-file checkpoint into a dense model; returns names of parameters that it lacks or that differ in shape."""
    state = model.state_dict()
    fitting = {name: start.state[name] for name, value in state.items() if name in start.state and start.state[name].shape == value.shape}
    copy_all({name: state[name] for name in fitting}, fitting, f"model.name = {start.name!r}")
    return sorted(state.keys() - fitting.keys())


def _of_file(path: Path) -> Start:
    checkpoint, run = read_checkpoint(path), RunFolder.of(path)
    if checkpoint.adapter is not None:
        return _of_adapter(str(path), checkpoint.adapter, run)
    config = checkpoint.config
    config.name_or_path = str(path)
    return Start(str(path), config, None, None, _without_stages(config), state=checkpoint.state, run=run)


def _of_adapter(name: str, adapter: Adapter, run: RunFolder) -> Start:
    compression = None if adapter.compression is None else CompressionConfig.from_dict(adapter.compression)
    config = config_of(adapter)
    config.name_or_path = adapter.base.name
    return Start(name, config, adapter.base.name, adapter.base.revision, compression, adapter, run=run)


def _without_stages(config: Any) -> CompressionConfig | None:
    """Removes the stages from a config, in place, and returns them."""
    compression = config.__dict__.pop("compression", None)
    return None if compression is None else CompressionConfig.from_dict(compression)


def _stage_tensors(start: Start, names: set[str]) -> dict[str, Tensor]:
    if start.weights is None:
        return {name: value for name, value in start.state.items() if name in names}
    found: dict[str, Tensor] = {}
    for path in weight_files(start.weights, start.revision):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name).to(torch.float32) for name in file.keys() if name in names}  # noqa: SIM118 - no mapping
    return found
