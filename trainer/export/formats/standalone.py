"""``standalone``: as ``merged``, with the source code that training used, for machines without Laconic."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from ....modules.compressed_model import CompressedModel
from ....modules.heads import own_models
from ....modules.layer import base_class
from ...errors import RecipeError
from ..base import ANSWER, Format, auto_class, base_name, compressed
from ..flatten import files_of
from ..source import ExportSource, Settings

ENTRY = "modeling_laconic"

_ENTRY = '''"""The compressed model of this folder, for transformers' trust_remote_code. Written by ``laconic export --format standalone``.

The other files here are Laconic's own (Apache-2.0), as used in training; only their import lines were changed, for one flat folder.
"""

from typing import TYPE_CHECKING

{imports}
from .compressed_model import compressed_class

if TYPE_CHECKING:
    # transformers copies only the files that such lines name. Parts are found by name when a model is built.
{carried}

{classes}
'''


class Standalone(Format):
    """Loads with ``AutoModel….from_pretrained(folder, trust_remote_code=True)``; with Laconic, also as ``merged`` does."""

    without = ("laconic",)
    program = f"""
import json, os, transformers
{ANSWER}
def load(folder):
    with open(os.path.join(folder, "config.json")) as file:
        kinds = json.load(file)["auto_map"]
    kind = getattr(transformers, next(name for name in kinds if name != "AutoModel" or len(kinds) == 1))
    model = whole(kind.from_pretrained(folder, trust_remote_code=True, output_loading_info=True, use_safetensors=True))
    return lambda batch: answer(model, batch)
"""

    @classmethod
    def check(cls, source: ExportSource) -> None:
        if not compressed(source.model):
            raise RecipeError("--format standalone: this model is dense, and transformers can load it by itself; use plain")

    @classmethod
    def write(cls, source: ExportSource, settings: Settings, folder: Path) -> None:
        model = source.model
        classes = _classes(model)
        model.config.auto_map = {auto: f"{ENTRY}.{type(part).__name__}" for auto, part in classes.items()}
        model.save_pretrained(folder, max_shard_size=settings.shard_size)
        files = files_of(model)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        (folder / f"{ENTRY}.py").write_text(_entry(list(classes.values()), list(files)), encoding="utf-8")

    @classmethod
    def usage(cls, model: PreTrainedModel) -> str:
        auto = auto_class(model)
        return f"from transformers import {auto}\n\nmodel = {auto}.from_pretrained(folder, trust_remote_code=True)"


def _classes(model: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """The model and its base, by the Auto class that loads each. Without an entry for the base, AutoModel would build it dense."""
    assert isinstance(model, CompressedModel)
    base = model.adapter.base(model)
    # The tower of an image-text model has its own config and cannot be an AutoModel of the whole config.
    whole = not isinstance(base, PreTrainedModel) or type(base.config) is not type(model.config)
    return {"AutoModel": model if whole else base, auto_class(model): model}


def _entry(models: list[PreTrainedModel], files: list[str]) -> str:
    """Text of the file that transformers imports first."""
    imports: dict[str, list[str]] = {}
    classes = []
    for model in {type(model): model for model in models}.values():
        original, name = base_class(type(model)), type(model).__name__
        where = "transformers"
        if base_name(model) in own_models():
            where = "." + original.__module__.partition(".modules.")[2].replace(".", "_")
        imports.setdefault(where, []).append(original.__name__)
        # transformers saves a model with the files of the module that defines its class.
        classes.append(f"{name} = compressed_class({original.__name__})\n{name}.__module__ = __name__")
    return _ENTRY.format(
        imports="\n".join(f"from {where} import {', '.join(names)}" for where, names in imports.items()),
        carried="\n".join(f"    from .{file.removesuffix('.py')} import __name__ as _" for file in files),
        classes="\n".join(classes),
    )
