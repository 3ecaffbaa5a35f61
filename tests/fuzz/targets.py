"""What takes input from outside, each with a function that gives it one wrong input."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pydantic
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, ViTConfig, ViTForImageClassification

import laconic
from laconic.modules.checkpoints.adapter_folder import MANIFEST, seal
from laconic.modules.checkpoints.base_weights import weights_hash
from laconic.modules.compress import compress, decompress
from laconic.modules.compressed_model import CompressedModel
from laconic.modules.config import CompressionConfig
from laconic.trainer.build.validate import validate
from laconic.trainer.recipe.files import load, read, shipped
from laconic.trainer.run_folder import load_model
from tests.fuzz.mutations import YAML_TRAPS, as_json, damaged, mutated, places

# One input: random numbers, and a value that hypothesis chose. It returns if the input is accepted.
Case = Callable[[random.Random, Any], None]
# An error that an input may raise; those of the second line name neither place nor cure.
ALLOWED = (ValueError, FileNotFoundError)
BARE = (json.JSONDecodeError, UnicodeError, pydantic.ValidationError, yaml.YAMLError)
STAGES = {
    "stages": [
        {"layer": 1, "keep": 0.5, "scorer": {"name": "learned", "width": 8}, "selector": {"name": "top_k", "bucket": 2}, "merger": "fuse"},
        {"layer": 2, "tokens": 3, "site": "before", "scorer": "bipartite", "merger": {"name": "bipartite", "proportional": True}},
    ],
    "restore": {"layer": 3, "by": "unmerge"},
}
AROUND = {
    "stages": [
        {"layer": [1, 2], "keep": 0.5, "site": "around", "scorer": {"name": "linear", "bias": 0.5}, "selector": "threshold",
         "estimator": {"name": "gate", "start": 1.0}, "scope": "all", "count": None, "name": None, "stack": ""},
    ],
    "restore": None,
}  # fmt: skip
# As plain_yaml's loader: libyaml's is faster, and not in every build.
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
SMALL = [
    "baselines=[]", "trainer.max_steps=2", "model.config.hidden_size=16", "model.config.num_hidden_layers=2", "data.batch_size=2",
    "model.config.intermediate_size=32",
]  # fmt: skip


def refused(case: Case, draws: random.Random, value: Any) -> bool:
    """True if a case raised an allowed error, with a message; False if the input was accepted. Other errors are raised."""
    try:
        case(draws, value)
    except BARE:
        raise
    except ALLOWED as error:
        if not str(error).strip():
            raise AssertionError(f"{type(error).__name__} without a message") from error
        return True
    return False


def targets(folder: Path) -> dict[str, Case]:
    """Every target by name.

    Args:
        folder: for files of the cases.
    """
    return {
        "recipe": _recipe(folder),
        "override": _override(),
        "compression": _compression(),
        "manifest": _manifest(folder),
        "config": _config(folder),
        "header": _header(folder),
        "validate": _validate(),
    }


def _recipe(folder: Path) -> Case:
    path, recipes = folder / "recipe.yaml", [read(file) for file in shipped().values()]
    own = [yaml.safe_load(file.read_text()) for file in shipped().values()]
    keys = sorted({str(part) for recipe in recipes for place in places(recipe) for part in place})

    def case(draws: random.Random, value: Any) -> None:
        recipe = mutated(draws.choice([*recipes, *own]), draws, value, keys)
        if draws.random() < 0.3:
            recipe = mutated(recipe, draws, value, keys)
        try:
            text = yaml.dump(recipe, Dumper=_DUMPER, allow_unicode=draws.random() < 0.5)
        except yaml.YAMLError:
            text = repr(recipe)
        lines = text.split("\n")
        if draws.random() < 0.3:
            lines.insert(draws.randrange(len(lines) + 1), draws.choice([draws.choice(YAML_TRAPS), draws.choice(lines)]))
        content = "\n".join(lines).encode("utf-8", "surrogatepass")
        path.write_bytes(damaged(content, draws) if draws.random() < 0.1 else content)
        load(str(path))

    return case


def _override() -> Case:
    names = list(shipped())
    paths = {name: [".".join(map(str, place)) for place in places(load(name).recipe.model_dump(mode="json"))] for name in names}

    def one(name: str, draws: random.Random, value: Any) -> str:
        path = draws.choice(paths[name])
        if draws.random() < 0.2:
            parts = path.split(".")
            parts.insert(draws.randrange(len(parts) + 1), draws.choice(["x", "0", "-1", "", "²", "9" * 30, "name", *parts]))
            path = ".".join(parts)
        text = draws.choice(YAML_TRAPS) if draws.random() < 0.25 else value if isinstance(value, str) else _flow(value)
        return f"{path}={text}" if draws.random() < 0.97 else text

    def case(draws: random.Random, value: Any) -> None:
        name = draws.choice(names)
        load(name, [one(name, draws, value) for _ in range(draws.choice([1, 1, 1, 2, 3]))])

    return case


def _flow(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        return repr(value)


def _tiny() -> dict[str, PreTrainedModel]:
    vit = ViTConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4)
    llama = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    return {"vit": ViTForImageClassification(vit).eval(), "llama": LlamaForCausalLM(llama).eval()}


def _compression() -> Case:
    models, keys = _tiny(), [*STAGES["stages"][0], "restore", "stages", "width", "capacity", "ratio", "by", "options"]  # type: ignore[index]

    def case(draws: random.Random, value: Any) -> None:
        name = draws.choice(list(models))
        changed = mutated(STAGES if name == "vit" else AROUND, draws, value, keys)
        if draws.random() < 0.3:
            changed = mutated(changed, draws, value, keys)
        model = models[name]
        try:
            compress(model, CompressionConfig.from_dict(changed))
        finally:
            # A refused config leaves the model unchanged.
            if isinstance(model, CompressedModel):
                decompress(model)

    return case


def _manifest(folder: Path) -> Case:
    base, good, bad = folder / "base", folder / "adapter", folder / "damaged"
    model: Any = _tiny()["vit"]
    model.save_pretrained(base)
    compress(model, CompressionConfig.from_dict({"stages": [{"layer": 1, "keep": 0.5}]}))
    from peft import LoraConfig

    laconic.add_lora(model, LoraConfig(r=2, target_modules=["q_proj"]))
    laconic.save_adapter(model, good, base)
    contents = {path.name: path.read_bytes() for path in good.iterdir()}
    jsons = [name for name in contents if name.endswith(".json")]
    keys = sorted({str(part) for name in jsons for place in places(json.loads(contents[name])) for part in place})

    def case(draws: random.Random, value: Any) -> None:
        shutil.rmtree(bad, ignore_errors=True)
        bad.mkdir()
        name = draws.choice([MANIFEST, MANIFEST, *contents])
        files = dict(contents)
        if name in jsons:
            data = mutated(json.loads(files[name]), draws, value, keys)
            files[name] = as_json(data, draws)
        else:
            files[name] = damaged(files[name], draws)
        if draws.random() < 0.7:
            files = _sealed(files, name)
        for file, content in files.items():
            (bad / file).write_bytes(content)
        laconic.from_pretrained(bad)

    return case


def _sealed(files: Mapping[str, bytes], changed: str) -> dict[str, bytes]:
    """The files with hashes that fit the changed one, as somebody would write them who wants it to be read."""
    import hashlib

    try:
        manifest = json.loads(files[MANIFEST])
        if changed != MANIFEST:
            content = files[changed]
            manifest["files"][changed] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest["sha256"] = seal(manifest)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return dict(files)
    return {**files, MANIFEST: json.dumps(manifest).encode("utf-8", "surrogatepass")}


def _saved(folder: Path) -> list[Path]:
    """Folders of tiny compressed and dense models."""
    found = []
    for name, model in _tiny().items():
        model.save_pretrained(folder / name)
        compress(model, CompressionConfig.from_dict({"stages": [{**AROUND["stages"][0], "layer": 1}]}))  # type: ignore[dict-item]
        model.save_pretrained(folder / f"compressed_{name}")
        found += [folder / name, folder / f"compressed_{name}"]
    return found


def _config(folder: Path) -> Case:
    folders = _saved(folder / "configs")
    contents = {path: json.loads((path / "config.json").read_text()) for path in folders}
    keys = sorted(
        {str(part) for data in contents.values() for place in places(data) for part in place} | {"auto_map", "quantization_config"}
    )

    def case(draws: random.Random, value: Any) -> None:
        path = draws.choice(folders)
        (path / "config.json").write_bytes(as_json(mutated(contents[path], draws, value, keys), draws))
        load_model(path)

    return case


def _header(folder: Path) -> Case:
    folders = _saved(folder / "headers")
    contents = {path: (path / "model.safetensors").read_bytes() for path in folders}

    def case(draws: random.Random, value: Any) -> None:
        path = draws.choice(folders)
        content = contents[path]
        (length,) = struct.unpack("<Q", content[:8])
        kind = draws.randrange(3)
        if kind == 0:
            header = as_json(mutated(json.loads(content[8 : 8 + length]), draws, value, ["__metadata__", "w"]), draws)
            content = struct.pack("<Q", len(header)) + header + content[8 + length :]
        elif kind == 1:
            content = damaged(content[: 8 + length], draws) + content[8 + length :]
        else:
            content = damaged(content, draws)
        (path / "model.safetensors").write_bytes(content)
        weights_hash(path)
        load_model(path)

    return case


def _validate() -> Case:
    recipes: dict[str, list[str]] = {
        "vit_digits": SMALL,
        "segment_digits": [*SMALL, "model.config.num_hidden_layers=6"],
        "mae_digits_dense": [*SMALL, "model.config.decoder_hidden_size=8"],
    }
    blocks = ("model", "compression", "budget", "optimizer", "trainer", "data")
    paths = {
        name: [
            ".".join(map(str, place))
            for place in places(load(name, overrides).recipe.model_dump(mode="json"))
            if place[0] in blocks and place != ("data", "data_dir")
        ]
        for name, overrides in recipes.items()
    }

    def case(draws: random.Random, value: Any) -> None:
        name = draws.choice(list(recipes))
        # Most wrong sizes are in model.config, which only building the model can check.
        of_model = [path for path in paths[name] if path.startswith(("model.config", "compression"))]
        path = draws.choice(of_model if draws.random() < 0.8 else paths[name])
        validate(load(name, [*recipes[name], f"{path}={_flow(value)}"]).recipe)

    return case
