"""from_pretrained: loads a model from an adapter folder, a folder of weights, a single-file training checkpoint, or the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from ..compressed_model import compressed_class
from .adapter_folder import MANIFEST, is_adapter
from .adapters import Adapters
from .base_weights import check_weights
from .foreign_config import architecture, load_config, settings_errors
from .keeps import set_keep
from .model_class import class_named
from .tensors import copy_all, own_memory
from .training_checkpoint import read_checkpoint
from .whole_files import DamagedFile

_HUB = ("token", "cache_dir", "local_files_only")
# Files fetched from a repository with an adapter; none of them can run code.
_FETCHED = ("*.json", "*.safetensors")


def from_pretrained(
    folder: str | Path, base: str | Path | None = None, keep: float | Mapping[str, float] | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Loads a model that Laconic wrote, with its stages and its LoRA.

    Args:
        folder: an adapter folder; a compressed model (``save_pretrained``, ``laconic export``); a hub repository with either; or a
            single-file training checkpoint.
        base: for an adapter, folder or hub name of its base, if it is not where the manifest says.
        keep: another keep for all stages, or by stage name, as for ``set_keep``; None leaves them their own.
        kwargs: arguments of transformers' ``from_pretrained`` (``dtype``, ``attn_implementation``, ``revision`` …).

    Returns:
        The model in evaluation mode. LoRA is not merged: ``laconic.merge_lora(model)`` merges it.

    Raises:
        FileNotFoundError: the folder holds no model.
        ValueError: the config has no compression, or its class is unknown; an adapter is damaged or has another base.
        DamagedFile: a ValueError; weights are missing, left over, or of another shape; nothing is silently initialised.
    """
    model = _load(folder, base, **kwargs)
    if keep is not None:
        set_keep(model, keep)
    return model


def _load(folder: str | Path, base: str | Path | None, **kwargs: Any) -> PreTrainedModel:
    if kwargs.pop("trust_remote_code", False):
        raise ValueError("trust_remote_code = True: laconic runs no code of a folder or repository; leave it out")
    if Path(folder).is_file():
        return _from_checkpoint(Path(folder), base, **kwargs)
    if (adapter := find_adapter(folder, **{key: kwargs[key] for key in ("revision", *_HUB) if key in kwargs})) is not None:
        return Adapters({"default": adapter}, base, **{key: value for key, value in kwargs.items() if key != "revision"}).model
    if base is not None:
        raise ValueError(f"{folder} is no adapter: leave base = {str(base)!r} out")
    place = str(folder)
    if Path(place).is_dir() and not (Path(place) / "config.json").is_file():
        raise FileNotFoundError(f"{place} has no config.json: give the folder of an adapter or of weights")
    config: Any = load_config(place, **{key: value for key, value in kwargs.items() if key in ("revision", "subfolder", *_HUB)})
    if getattr(config, "compression", None) is None:
        raise ValueError(
            f"{folder} is a dense {config.model_type} model: config.json has no 'compression'. Load it with transformers and call "
            "laconic.compress"
        )
    own: Any = class_named(architecture(config, place), str(folder))
    check_weights(place, **{key: kwargs[key] for key in ("revision", *_HUB) if key in kwargs})
    with settings_errors(f"{folder} cannot be loaded", DamagedFile):
        model, report = compressed_class(own).from_pretrained(
            place, config=config, output_loading_info=True, use_safetensors=True, trust_remote_code=False, **kwargs
        )
    wrong = {key: sorted(map(str, report[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if report.get(key)}
    if wrong:
        raise DamagedFile(f"{folder}: the weights do not fit the config: {wrong}")
    assert isinstance(model, PreTrainedModel)
    own_memory(model)
    return model


def find_adapter(folder: str | Path, revision: str | None = None, **hub: Any) -> Path | None:
    """The folder itself if it holds an adapter; a local copy of a hub repository with one; otherwise None."""
    path = Path(folder)
    if path.is_dir():
        return path if is_adapter(path) else None
    if path.exists() or str(folder).count("/") != 1:
        return None
    quiet: Any = dict.fromkeys((f"_raise_exceptions_for_{what}" for what in ("missing_entries", "connection_errors")), False)
    try:
        found = cached_file(str(folder), MANIFEST, revision=revision, **quiet, **hub)
    except OSError:
        # There is no such repository. The caller, which loads the model next, reports it.
        return None
    if found is None:
        return None
    return Path(snapshot_download(str(folder), revision=revision, allow_patterns=list(_FETCHED), **hub))


def saved_class(folder: str | Path) -> type[PreTrainedModel]:
    """The class of a folder's saved weights, from transformers or Laconic; for a compressed model its original class.

    Raises:
        ValueError: the class is unknown.
    """
    return class_named(architecture(load_config(folder), str(folder)), str(folder))


def _from_checkpoint(path: Path, base: str | Path | None, **kwargs: Any) -> PreTrainedModel:
    checkpoint = read_checkpoint(path)
    if checkpoint.adapter is not None:
        return Adapters({"default": checkpoint.adapter}, base, **kwargs).model
    config: Any = checkpoint.config
    if not hasattr(config, "compression"):
        raise ValueError(f"{path} is of a dense {config.model_type} model: give it to model.name of a recipe")
    own: Any = class_named(architecture(config, str(path)), str(path))
    model = compressed_class(own)._from_config(config, **kwargs)
    copy_all(model.state_dict(), checkpoint.state, str(path))
    model.eval()
    assert isinstance(model, PreTrainedModel)
    return model
