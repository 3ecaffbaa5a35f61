"""Base weights of an adapter: their files, and a hash that depends on neither the sharding nor the dtype at loading."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

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
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        found = [find(file) for file in files]
        missing = [file for file, path in zip(files, found, strict=True) if path is None]
        if missing:
            raise ValueError(f"base {str(name)!r} lacks {', '.join(missing)}, which its index names")
        return [path for path in found if path is not None]
    raise ValueError(
        f"base {str(name)!r} has no {SAFE_WEIGHTS_NAME}: give a folder or hub name with safetensors weights; pickles (.bin) are not read"
    )


def _tensors(path: Path) -> Iterator[tuple[str, str, Path, int, int]]:
    """Name, dtype and shape, file, first byte and last byte + 1 of each tensor of a safetensors file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length < path.stat().st_size:
            raise ValueError(f"{path} is no safetensors file, or truncated")
        header = json.loads(file.read(length))
    for key, entry in header.items():
        if key != "__metadata__":
            start, end = entry["data_offsets"]
            yield key, f"{entry['dtype']} {entry['shape']}", path, 8 + length + start, 8 + length + end
