"""Loading a compressed model from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from .compress import PREFIX, compressed_class
from .models import own_models


def from_pretrained(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """A compressed model from what its ``save_pretrained`` or ``laconic export --format merged`` wrote.

    Args:
        folder: local folder, or name of a repository on the hub.
        kwargs: passed to transformers' ``from_pretrained`` (``dtype``, ``attn_implementation``, ``revision`` …).

    Returns:
        The model in evaluation mode, with its stages.

    Raises:
        FileNotFoundError: the folder has no ``config.json``.
        ValueError: the config holds no compression, or its class is unknown.
        RuntimeError: weights are missing, left over, or of another shape; nothing is initialised silently.
    """
    path = Path(folder)
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} has no config.json: give the folder of an export, or export the run first (laconic export)")
    config = AutoConfig.from_pretrained(
        folder,
        **{key: value for key, value in kwargs.items() if key in ("revision", "token", "cache_dir", "subfolder", "local_files_only")},
    )
    if getattr(config, "compression", None) is None:
        raise ValueError(
            f"{folder} is a dense {config.model_type} model: config.json has no 'compression'. Load it with transformers and call laconic.compress"
        )
    base: Any = _class_of(config, str(folder))
    # Other files of weights are pickles, which run what they hold.
    kwargs["use_safetensors"] = True
    model, report = compressed_class(base).from_pretrained(folder, config=config, output_loading_info=True, **kwargs)
    wrong = {key: sorted(map(str, report[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if report.get(key)}
    if wrong:
        raise RuntimeError(f"{folder}: the weights do not fit the config: {wrong}")
    assert isinstance(model, PreTrainedModel)
    for parameter in model.parameters():
        # A mapped file lies at any address, and matrix products round by address: fresh memory answers bit for bit.
        parameter.data = parameter.data.clone()
    return model


def saved_class(folder: str | Path) -> type[PreTrainedModel]:
    """The class that a folder's weights were saved from, of transformers or our own; of a compressed model its original.

    Raises:
        ValueError: its class is unknown.
    """
    return _class_of(AutoConfig.from_pretrained(folder), str(folder))


def _class_of(config: PretrainedConfig, folder: str) -> type[PreTrainedModel]:
    names = config.architectures or []
    name = names[0].removeprefix(PREFIX) if names else ""
    found: type[PreTrainedModel] | None = own_models().get(name) or getattr(transformers, name, None)
    if found is None:
        raise ValueError(
            f"{folder}: config.json names the architecture {names}, which neither transformers {transformers.__version__} nor Laconic has"
        )
    return found
