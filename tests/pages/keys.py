"""Which keys recipes have."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from laconic.modules.config import CompressionConfig, StageConfig
from laconic.trainer.recipe.data_kinds import KINDS
from laconic.trainer.recipe.schema import Recipe

BLOCKS = frozenset(Recipe.model_fields)
# Settings of stages too may be given to all stages of a method.
COMPRESSION = {"method", "restore", *(item.name for kind in (CompressionConfig, StageConfig) for item in dataclasses.fields(kind))}


def exists(path: str) -> bool:
    """True if a recipe of some task has this key, with dots; below mappings with free keys, such as ``model.config``, all do."""
    block, _, rest = path.partition(".")
    if block == "compression":
        return not rest or rest.split(".")[0] in COMPRESSION
    if block == "data" and rest:
        return _below(list(KINDS.values()), rest.split("."))
    return _below([Recipe], path.split("."))


def default(path: str) -> Any:
    """Default of a key of a recipe, with dots."""
    block, *names = path.split(".")
    places = list(KINDS.values()) if block == "data" else _blocks(Recipe.model_fields[block].annotation)
    for name in names[:-1]:
        places = [inner for place in places if name in _fields(place) for inner in _blocks(_fields(place)[name])]
    place = next(place for place in places if names[-1] in _fields(place))
    if issubclass(place, BaseModel):
        return place.model_fields[names[-1]].get_default(call_default_factory=True)
    return next(field.default for field in dataclasses.fields(place) if field.name == names[-1])


def _below(blocks: Sequence[type[Any]], names: Sequence[str]) -> bool:
    types = [kinds[names[0]] for kinds in map(_fields, blocks) if names[0] in kinds]
    if not types or len(names) == 1:
        return bool(types)
    inner = [block for kind in types for block in _blocks(kind)]
    return _below(inner, names[1:]) if inner else any("dict" in str(kind) or "Mapping" in str(kind) for kind in types)


def _fields(block: type[Any]) -> dict[str, Any]:
    if issubclass(block, BaseModel):
        return {name: field.annotation for name, field in block.model_fields.items()}
    return {field.name: typing.get_type_hints(block)[field.name] for field in dataclasses.fields(block)}


def _blocks(kind: Any) -> list[type[Any]]:
    """Blocks with keys in a type such as ``Block | None``."""
    if isinstance(kind, type) and (issubclass(kind, BaseModel) or dataclasses.is_dataclass(kind)):
        return [kind]
    return [block for inner in typing.get_args(kind) for block in _blocks(inner)]
