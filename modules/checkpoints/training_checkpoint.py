"""What a training checkpoint that is one file says of its model, read without running anything it might hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..compressed_model import CompressedModel
from ..layer import base_class
from .adapter_folder import Adapter, lora_config_of
from .adapter_saving import adapter_of, trained_modules
from .adapters import config_of, meta_model
from .base_weights import Base

# Key of Lightning's dictionary, and what stands before a model's names in its tensors.
KEY, STATE_PREFIX = "laconic", "model."


@dataclass(frozen=True)
class TrainingCheckpoint:
    """A model in the middle of its training.

    Attributes:
        config: of the model, with its stages.
        adapter: what was trained on frozen weights; None where everything trains.
        state: everything, by the model's names, where everything trains.
    """

    config: PretrainedConfig
    adapter: Adapter | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)


def about(model: PreTrainedModel, base: Base | None) -> str:
    """What a checkpoint must say for ``read_checkpoint``, as JSON.

    Args:
        model: that is trained.
        base: its frozen weights; None where everything trains.
    """
    cls = base_class(type(model)) if isinstance(model, CompressedModel) else type(model)
    told: dict[str, Any] = {"config": {**model.config.to_dict(), "architectures": [cls.__name__]}}
    if base is not None:
        lora: Any = getattr(model, "peft_config", {}).get("default")
        settings = (
            None if lora is None else {key: sorted(value) if isinstance(value, set) else value for key, value in lora.to_dict().items()}
        )
        told["adapter"] = {"base": asdict(base), "full": trained_modules(model), "lora": settings}
    return json.dumps(told, sort_keys=True)


def of_same_model(told: str, model: PreTrainedModel, base: Base | None) -> bool:
    """Whether a checkpoint is of the same class, stages, LoRA and frozen weights.

    Args:
        told: what ``about`` said of it.
        model: that would go on from it.
        base: its frozen weights.
    """
    before, now = json.loads(told), json.loads(about(model, base))
    # Other settings of the config change while it trains, and with versions of transformers.
    return before.get("adapter") == now.get("adapter") and all(
        before["config"].get(key) == now["config"].get(key) for key in ("architectures", "compression")
    )


def read_checkpoint(path: Path) -> TrainingCheckpoint:
    """What a checkpoint file holds; its tensors are mapped from the file.

    Raises:
        ValueError: it is no checkpoint of Laconic, or holds more than data.
    """
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        told = json.loads(data[KEY])
        state = {name.removeprefix(STATE_PREFIX): value for name, value in data["state_dict"].items() if name.startswith(STATE_PREFIX)}
    except Exception as error:
        # Torch, zip and pickle have errors of many kinds; whatever it is, nothing was run.
        raise ValueError(f"{path} is no training checkpoint of Laconic: {str(error).splitlines()[0]}") from None
    found, compression = told.get("adapter"), told["config"].get("compression")
    bare = Adapter(Base("", None, ""), told["config"]["architectures"][0], told["config"], compression=compression)
    config = config_of(bare)
    if compression is not None:
        config.compression = compression
    if found is None:
        return TrainingCheckpoint(config, None, state)
    lora = None if found["lora"] is None else lora_config_of(path, json.dumps(found["lora"]).encode())
    bare = replace(bare, base=Base(**found["base"]), lora_config=lora, full=tuple(found["full"]))
    return TrainingCheckpoint(config, adapter_of(meta_model(bare, str(path), values=False), bare.base, state=state))
