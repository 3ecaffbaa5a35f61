"""Reads and writes the model description in single-file training checkpoints; reading runs no code from the file."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..compressed_model import CompressedModel
from ..layer import base_class
from .adapter_folder import Adapter, AdapterError, lora_config_of
from .adapter_saving import adapter_of, trained_modules
from .adapters import config_of, meta_model
from .base_weights import Base

# Key in Lightning's dictionary, and prefix of a model's names in its tensors.
KEY, STATE_PREFIX = "laconic", "model."


@dataclass(frozen=True)
class TrainingCheckpoint:
    """A model during its training.

    Attributes:
        config: config of the model, with its stages.
        adapter: the trained weights, if the base weights are frozen; None if all parameters are trained.
        state: all tensors by the model's names, if all parameters are trained; empty otherwise.
    """

    config: PretrainedConfig
    adapter: Adapter | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)


def about(model: PreTrainedModel, base: Base | None) -> str:
    """The model description that ``read_checkpoint`` needs, as JSON.

    Args:
        model: model in training.
        base: its frozen base weights; None if all parameters are trained.
    """
    cls = base_class(type(model)) if isinstance(model, CompressedModel) else type(model)
    description: dict[str, Any] = {"config": {**model.config.to_dict(), "architectures": [cls.__name__]}}
    if base is not None:
        lora: Any = getattr(model, "peft_config", {}).get("default")
        settings = (
            None if lora is None else {key: sorted(value) if isinstance(value, set) else value for key, value in lora.to_dict().items()}
        )
        description["adapter"] = {"base": asdict(base), "full": trained_modules(model), "lora": settings}
    return json.dumps(description, sort_keys=True)


def of_same_model(description: str, model: PreTrainedModel, base: Base | None) -> bool:
    """True if a checkpoint has the same class, stages, labels, LoRA and frozen weights as a model.

    Args:
        description: result of ``about`` for the checkpoint.
        model: model that would continue from it.
        base: frozen base weights of the model.
    """
    before, now = json.loads(description), json.loads(about(model, base))
    # Other settings of the config may change during training and between versions of transformers.
    return before.get("adapter") == now.get("adapter") and all(
        before["config"].get(key) == now["config"].get(key) for key in ("architectures", "compression", "id2label")
    )


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file; None if it is whole. A checkpoint is a zip archive with a checksum of every tensor, which
    ``torch.load`` does not compare."""
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except Exception as error:
        # zipfile raises errors of many types for damaged archives.
        return f"{path} is no training checkpoint of Laconic, or truncated or damaged ({str(error) or type(error).__name__})"
    return None if wrong is None else f"{path} is damaged: the checksum of {wrong} is wrong"


def read_checkpoint(path: Path) -> TrainingCheckpoint:
    """The contents of a checkpoint file; tensors are memory-mapped.

    Raises:
        ValueError: the file is not a checkpoint of Laconic, or holds more than data.
    """
    if (fault := damage(path)) is not None:
        raise ValueError(f"{fault}: name another checkpoint of the run, or train again")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        description = json.loads(data[KEY])
        state = {name.removeprefix(STATE_PREFIX): value for name, value in data["state_dict"].items() if name.startswith(STATE_PREFIX)}
        return _described(path, description, state)
    except AdapterError:
        raise
    except Exception as error:
        # torch, zip and pickle raise errors of many types; in each case no code was run.
        raise ValueError(f"{path} is no training checkpoint of Laconic: {' '.join(str(error).split())[:500]}") from None


def _described(path: Path, description: Mapping[str, Any], state: Mapping[str, Tensor]) -> TrainingCheckpoint:
    found, compression = description.get("adapter"), description["config"].get("compression")
    bare = Adapter(Base("", None, ""), description["config"]["architectures"][0], description["config"], compression=compression)
    config = config_of(bare)
    if compression is not None:
        config.compression = compression
    if found is None:
        return TrainingCheckpoint(config, None, state)
    lora = None if found["lora"] is None else lora_config_of(path, json.dumps(found["lora"]).encode())
    bare = replace(bare, base=Base(**found["base"]), lora_config=lora, full=tuple(found["full"]))
    return TrainingCheckpoint(config, adapter_of(meta_model(bare, str(path), values=False), bare.base, state=state))
