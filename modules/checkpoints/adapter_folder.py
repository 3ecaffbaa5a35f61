"""The adapter folder: PEFT's two files, the routers, and a manifest with the size and hash of every file.

All files are JSON or safetensors. A folder is checked completely before a model is made for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from ..config import CompressionConfig
from .base_weights import Base
from .whole_files import DamagedFile, whole_folder

if TYPE_CHECKING:
    from peft import LoraConfig

MANIFEST = "manifest.json"
FORMAT = "laconic-adapter-1"
LORA_CONFIG, LORA = "adapter_config.json", "adapter_model.safetensors"
STAGES_CONFIG, STAGES = "compression_config.json", "compression.safetensors"
# Modules trained in full besides routers. With LoRA they are in PEFT's file, as its modules_to_save.
FULL = "modules.safetensors"
# Suffixes of files that other programs might unpickle or import.
_CODE = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".py")
# Settings of PEFT's config that do not affect computation. Settings that are in neither list must have PEFT's default.
_NOTES = ("base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version", "init_lora_weights", "modules_to_save")
_READ = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
)  # fmt: skip


class AdapterError(DamagedFile):
    """An adapter folder is damaged or does not fit. Nothing was loaded from it."""


@dataclass(frozen=True)
class Adapter:
    """Contents of an adapter folder.

    Attributes:
        base: base weights of the adapter.
        model_class: class name of the dense model.
        model_config: config of the dense model, as ``config.to_dict()``.
        lora_config: PEFT's config; None without LoRA.
        lora: LoRA tensors by PEFT's names; empty without LoRA.
        compression: compression config of the model; None for a dense model.
        stages: tensors of routers and mergers by the model's names.
        full: names of modules that were trained in full besides routers, for example a new head.
        full_tensors: tensors of these modules by the model's names.
        ratio: ``macs_ratio`` and ``keep``, each ``requested`` and ``achieved``; empty if unknown.
        versions: versions of the packages that wrote the folder.
    """

    base: Base
    model_class: str
    model_config: Mapping[str, Any]
    lora_config: LoraConfig | None = None
    lora: Mapping[str, Tensor] = field(default_factory=dict)
    compression: Mapping[str, Any] | None = None
    stages: Mapping[str, Tensor] = field(default_factory=dict)
    full: tuple[str, ...] = ()
    full_tensors: Mapping[str, Tensor] = field(default_factory=dict)
    ratio: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """Writes a folder atomically: it exists completely or not at all.

    Raises:
        ValueError: the folder exists and is not empty, or a tensor is empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: give a new folder")
    contents = _files(adapter)
    manifest = {
        "format": FORMAT,
        "base": asdict(adapter.base),
        "model": {"class": adapter.model_class, "config": dict(adapter.model_config)},
        "lora": adapter.lora_config is not None,
        "stages": None if adapter.compression is None else [stage.key for stage in CompressionConfig.from_dict(adapter.compression).stages],
        "modules_to_save": list(adapter.full),
        "ratio": dict(adapter.ratio),
        "versions": dict(adapter.versions) or _versions(),
        "files": {name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in contents.items()},
    }
    with whole_folder(folder) as partial:
        for name, content in {**contents, MANIFEST: json_bytes({**manifest, "sha256": seal(manifest)})}.items():
            (partial / name).write_bytes(content)


def read_adapter(folder: str | Path) -> Adapter:
    """Reads a folder and checks every file against the manifest.

    Raises:
        AdapterError: a file is missing, truncated, altered, unknown or could run code; the message names the file and the cure.
    """
    path = Path(folder)
    manifest = _manifest(path)
    contents = _contents(path, manifest)
    tensors = {name: _parsed(path / name, content) for name, content in contents.items() if name.endswith(".safetensors")}
    full = tuple(manifest["modules_to_save"])
    lora_config = None
    lora: dict[str, Tensor] = {}
    if manifest["lora"]:
        lora_config = lora_config_of(path / LORA_CONFIG, contents[LORA_CONFIG])
        in_full = {name: value for name, value in tensors[LORA].items() if _of_full(name.removeprefix("base_model.model."), full)}
        lora = {name: value for name, value in tensors[LORA].items() if name not in in_full}
        full_tensors = {name.removeprefix("base_model.model."): value for name, value in in_full.items()}
    else:
        full_tensors = tensors.get(FULL, {})
    return Adapter(
        base=Base(**manifest["base"]),
        model_class=manifest["model"]["class"],
        model_config=manifest["model"]["config"],
        lora_config=lora_config,
        lora=lora,
        compression=_json(path / STAGES_CONFIG, contents[STAGES_CONFIG]) if manifest["stages"] is not None else None,
        stages=tensors.get(STAGES, {}),
        full=full,
        full_tensors=full_tensors,
        ratio=manifest["ratio"],
        versions=manifest["versions"],
    )


def is_adapter(folder: Path) -> bool:
    """True if a folder holds an adapter, also if its manifest is missing, which ``read_adapter`` reports."""
    return (folder / MANIFEST).is_file() or ((folder / LORA_CONFIG).is_file() and not (folder / "config.json").is_file())


def adapter_files(manifest: Mapping[str, Any]) -> list[str]:
    """Names of the files that an adapter needs besides its manifest."""
    needed = [LORA_CONFIG, LORA] if manifest["lora"] else [FULL] if manifest["modules_to_save"] else []
    return needed + ([STAGES_CONFIG, STAGES] if manifest["stages"] is not None else [])


def seal(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest, its own ``sha256`` excluded."""
    return hashlib.sha256(json_bytes({key: value for key, value in manifest.items() if key != "sha256"})).hexdigest()


def json_bytes(data: Any) -> bytes:
    """Readable JSON, identical for identical data."""
    return (json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def _files(adapter: Adapter) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    if adapter.lora_config is not None:
        peft: Any = adapter.lora_config
        config = peft.to_dict()
        config |= {"base_model_name_or_path": adapter.base.name, "revision": adapter.base.revision, "inference_mode": True}
        config |= {"modules_to_save": list(adapter.full) or None}
        files[LORA_CONFIG] = json_bytes({key: sorted(value) if isinstance(value, set) else value for key, value in config.items()})
        files[LORA] = _packed({**adapter.lora, **{f"base_model.model.{name}": value for name, value in adapter.full_tensors.items()}})
    elif adapter.full:
        files[FULL] = _packed(adapter.full_tensors)
    if adapter.compression is not None:
        files[STAGES_CONFIG] = json_bytes(dict(adapter.compression))
        files[STAGES] = _packed(adapter.stages)
    return files


def _packed(tensors: Mapping[str, Tensor]) -> bytes:
    empty = [name for name, value in tensors.items() if not value.numel()]
    if empty:
        raise ValueError(f"tensors without values cannot be written; gather sharded parameters first: {', '.join(empty[:3])}")
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        whole = value.detach().cpu().contiguous()
        # Tied tensors are written under each of their names: PEFT does not tie the modules that it replaces.
        found[name] = whole.clone() if any(whole.data_ptr() == other.data_ptr() for other in found.values()) else whole
    return save(found, {"format": "pt"})


def _manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise AdapterError(f"{path} is no folder")
    if not (path / MANIFEST).is_file():
        if (path / LORA_CONFIG).is_file():
            raise AdapterError(
                f"{path} has no {MANIFEST}: it is an adapter of plain PEFT, without routers; load it with PEFT, or get the whole folder again"
            )
        raise AdapterError(f"{path} has no {MANIFEST}: it is no adapter folder, or writing it was interrupted")
    manifest = _json(path / MANIFEST, (path / MANIFEST).read_bytes())
    if manifest.get("format") != FORMAT:
        raise AdapterError(f"{path / MANIFEST}: its format is {manifest.get('format')!r}, this version of Laconic reads {FORMAT!r}")
    required = ("base", "model", "lora", "stages", "modules_to_save", "ratio", "versions", "files", "sha256")
    for key in required:
        if key not in manifest:
            raise AdapterError(f"{path / MANIFEST} lacks {key!r}")
    _check_manifest(path / MANIFEST, manifest)
    if manifest["sha256"] != seal(manifest):
        raise AdapterError(f"{path / MANIFEST} was altered after it was written: get the folder again")
    if "auto_map" in manifest["model"]["config"]:
        raise AdapterError(f"{path / MANIFEST}: the model's config names code to run (auto_map), which Laconic never does")
    return manifest


def _check_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raises AdapterError if a value of a manifest has another type than Laconic writes."""
    base, model, files, stages = (manifest[key] for key in ("base", "model", "files", "stages"))
    right = {
        "base": isinstance(base, dict)
        and base.keys() == {"name", "revision", "weights_sha256"}
        and isinstance(base["revision"], str | None)
        and all(isinstance(base[key], str) for key in ("name", "weights_sha256")),
        "model": isinstance(model, dict) and isinstance(model.get("class"), str) and isinstance(model.get("config"), dict),
        "lora": isinstance(manifest["lora"], bool),
        "stages": stages is None or _texts(stages),
        "modules_to_save": _texts(manifest["modules_to_save"]),
        "ratio": isinstance(manifest["ratio"], dict),
        "versions": isinstance(manifest["versions"], dict),
        "files": isinstance(files, dict),
    }
    for key, fits in right.items():
        if not fits:
            raise AdapterError(f"{path}: {key} = {str(manifest[key])[:200]!r} has another form than Laconic writes: get the folder again")


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _contents(path: Path, manifest: Mapping[str, Any]) -> dict[str, bytes]:
    """Contents of every file in the manifest, with size and hash checked."""
    listed = manifest["files"]
    for name in adapter_files(manifest):
        if name in listed:
            continue
        if name in (STAGES, STAGES_CONFIG):
            raise AdapterError(
                f"{path}: the adapter was trained with stages {', '.join(manifest['stages'])} and holds no routers: {name} is not in its "
                f"{MANIFEST}"
            )
        raise AdapterError(f"{path / MANIFEST} does not list {name}, which the adapter needs")
    for name in listed:
        if name not in adapter_files(manifest):
            raise AdapterError(f"{path / MANIFEST} names {name!r}, which is no file of an adapter")
    for found in sorted(path.iterdir()):
        if found.suffix in _CODE:
            raise AdapterError(f"{found} is no part of the adapter and could run code in other programs: delete it")
    contents: dict[str, bytes] = {}
    for name, about in listed.items():
        file = path / name
        if not isinstance(about, dict) or type(about.get("bytes")) is not int or not isinstance(about.get("sha256"), str):
            raise AdapterError(f"{path / MANIFEST}: files.{name} = {str(about)[:200]!r} must have bytes and sha256: get the folder again")
        if not file.is_file():
            raise AdapterError(f"{file} is missing: get the folder again")
        content = file.read_bytes()
        if len(content) != about["bytes"]:
            what = "truncated" if len(content) < about["bytes"] else "longer than it was written"
            raise AdapterError(f"{file} is {what}: {len(content)} bytes of {about['bytes']}; get it again")
        if hashlib.sha256(content).hexdigest() != about["sha256"]:
            raise AdapterError(f"{file} was altered: its SHA-256 is not that of {MANIFEST}; get it again")
        contents[name] = content
    return contents


def _json(path: Path, content: bytes) -> dict[str, Any]:
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not JSON, or truncated: {error}") from None
    if not isinstance(data, dict):
        raise AdapterError(f"{path} must hold an object, it holds {type(data).__name__}")
    return data


def _parsed(path: Path, content: bytes) -> dict[str, Tensor]:
    try:
        tensors = load(content)
    except Exception as error:
        # safetensors raises errors of several types.
        raise AdapterError(f"{path} is no safetensors file: {error}") from None
    for name, value in tensors.items():
        if not value.numel():
            raise AdapterError(f"{path}: {name} is empty, like a sharded parameter that was not gathered: write it again")
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise AdapterError(f"{path}: {name} holds values that are not finite")
    return tensors


def lora_config_of(path: Path, content: bytes) -> LoraConfig:
    """PEFT's config, restricted to settings that only affect computation: others may name code to import. Raises AdapterError.

    Args:
        path: path of the file, for messages.
        content: content of the file.
    """
    from peft import LoraConfig

    given = _json(path, content)
    if given.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type is {given.get('peft_type')!r}, Laconic reads 'LORA'")
    plain: Any = LoraConfig()
    default = plain.to_dict()
    for key, value in given.items():
        if key in _READ or key in _NOTES or value == default.get(key) or value is None:
            continue
        why = "names classes to import" if key in ("auto_mapping", "megatron_core") else "is not supported here"
        raise AdapterError(f"{path}: {key} = {value!r} {why}: Laconic reads {', '.join(_READ)}")
    targets = given.get("target_modules")
    if not isinstance(targets, list) or not targets:
        raise AdapterError(f"{path}: target_modules = {targets!r} must be a list of names")
    try:
        return LoraConfig(**{key: given[key] for key in _READ if key in given})
    except Exception as error:
        # PEFT checks some settings, with errors of several types.
        raise AdapterError(f"{path} cannot be used: {' '.join(str(error).split())}") from None


def _of_full(name: str, full: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in full)


def _versions() -> dict[str, str]:
    found = {}
    for name in ("laconic", "torch", "transformers", "peft"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
