"""Base weights of an adapter: their files, and a hash that depends on neither the sharding nor the dtype at loading."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from .whole_files import DamagedFile

_CHUNK = 1 << 24


@dataclass(frozen=True)
class Base:
    """The base weights of an adapter.

    Attributes:
        name: folder or hub name.
        revision: commit of a hub model; None for a folder.
        weights_sha256: hash of names, dtypes, shapes and values of all tensors in the safetensors files.
    """

    name: str
    revision: str | None
    weights_sha256: str


def base_of(name: str | Path, revision: str | None = None, **hub: Any) -> Base:
    """The Base of a model, for an adapter's manifest.

    Args:
        name: folder of a transformers model, or hub name.
        revision: revision of a hub model.
        hub: ``token``, ``cache_dir``, ``local_files_only``.

    Raises:
        ValueError: there is no model, or it has no safetensors files.
    """
    digest = weights_hash(name, revision, **hub)
    commit = None
    if not Path(name).is_dir():
        commit = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False, **hub)._commit_hash
    return Base(str(name), commit, digest)


def weights_hash(name: str | Path, revision: str | None = None, **hub: Any) -> str:
    """SHA-256 of a model's tensors: names, dtypes, shapes and values, independent of how they are split into files.

    Raises:
        ValueError: there is no model, it has no safetensors files, or a file is broken.
    """
    tensors = sorted(item for path in weight_files(name, revision, **hub) for item in _tensors(path))
    digest = hashlib.sha256()
    for key, about, path, start, end in tensors:
        digest.update(f"{key}\0{about}\0".encode())
        with path.open("rb") as file:
            file.seek(start)
            while start < end:
                part = file.read(min(_CHUNK, end - start))
                if not part:
                    raise ValueError(f"{path} is truncated: {key} ends behind the end of the file")
                digest.update(part)
                start += len(part)
    return digest.hexdigest()


def weight_files(name: str | Path, revision: str | None = None, **hub: Any) -> list[Path]:
    """The safetensors files of a model, downloaded if it is on the hub. Pickle files are never read.

    Raises:
        ValueError: there are no safetensors files.
    """

    def find(file: str) -> Path | None:
        quiet: Any = {"_raise_exceptions_for_missing_entries": False}
        try:
            found = cached_file(str(name), file, revision=revision, **quiet, **hub)
        except OSError as error:
            raise ValueError(
                f"base {str(name)!r} is no folder here and cannot be loaded from the hub: {str(error).splitlines()[0]}"
            ) from None
        return None if found is None else Path(found)

    if (single := find(SAFE_WEIGHTS_NAME)) is not None:
        return [single]
    if (index := find(SAFE_WEIGHTS_INDEX_NAME)) is not None:
        files = shards(index)
        found = [find(file) for file in files]
        missing = [file for file, path in zip(files, found, strict=True) if path is None]
        if missing:
            raise ValueError(f"base {str(name)!r} lacks {', '.join(missing)}, which its index names")
        return [path for path in found if path is not None]
    raise ValueError(
        f"base {str(name)!r} has no {SAFE_WEIGHTS_NAME}: give a folder or hub name with safetensors weights; pickles (.bin) are not read"
    )


def shards(index: Path) -> list[str]:
    """Names of the weight files that an index lists.

    Raises:
        ValueError: the file is no index, or lists a file that is not beside it: tensors would come from outside the folder.
    """
    try:
        files = json.loads(index.read_text("utf-8"))["weight_map"].values()
        names = sorted({str(file) for file in files})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f"{index} is damaged: it has no mapping 'weight_map' from tensors to files; get it again") from None
    for name in names:
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} lists {name!r}, which is no safetensors file beside it: it is not loaded")
    return names


def check_weights(name: str | Path, revision: str | None = None, **hub: Any) -> None:
    """Checks the weight files of a model, without reading their tensors.

    Raises:
        ValueError: the index lists a file outside its folder, which transformers would load; or a file of a folder is damaged.

    Args:
        name: folder or hub name.
        revision: revision of a hub model.
        hub: ``token``, ``cache_dir``, ``local_files_only``.
    """
    quiet: Any = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    with contextlib.suppress(OSError):
        # There is no such model: the caller, which loads it next, reports it.
        index = cached_file(str(name), SAFE_WEIGHTS_INDEX_NAME, revision=revision, **quiet, **hub)
        if index is not None:
            shards(Path(index))
    for path in sorted(Path(name).glob("*.safetensors")) if Path(name).is_dir() else ():
        check_header(path)


def check_header(path: Path) -> None:
    """Raises DamagedFile, which names the file, if it is no whole safetensors file."""
    try:
        with safe_open(path, "pt"):
            pass
    except Exception as error:
        # safetensors raises several types, none of which names the file.
        raise DamagedFile(f"{path} is no safetensors file, or truncated or damaged ({error}): get or write it again") from None


def _tensors(path: Path) -> Iterator[tuple[str, str, Path, int, int]]:
    """Name, dtype and shape, file, first byte and last byte + 1 of each tensor of a safetensors file."""
    check_header(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    for key, entry in header.items():
        if key != "__metadata__":
            start, end = entry["data_offsets"]
            yield key, f"{entry['dtype']} {entry['shape']}", path, 8 + length + start, 8 + length + end
