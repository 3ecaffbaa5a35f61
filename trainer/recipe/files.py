"""Recipe files: finding them, merging overlays and overrides, and reporting mistakes in one clear message."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ..errors import RecipeError
from .data_kinds import KINDS, elsewhere
from .schema import Recipe

SHIPPED = Path(__file__).resolve().parents[2] / "recipes"


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe with the name of its file.

    Attributes:
        name: name of the file, without its suffix.
        recipe: the recipe, with overlays and overrides.
        source: argument that it was loaded with.
    """

    name: str
    recipe: Recipe
    source: str


def shipped() -> dict[str, Path]:
    """Paths of the recipes that come with Laconic, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def find(name: str) -> Path:
    """A shipped recipe by name, or a file by path. Raises RecipeError with the existing names."""
    known = shipped()
    if name in known:
        return known[name]
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or "/" in name:
        raise RecipeError(f"recipe file {name} does not exist")
    near = difflib.get_close_matches(name, list(known), 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise RecipeError(f"no recipe {name!r}: the recipes are {', '.join(known)}; or name the path of a YAML file{hint}")


def load(name: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Loads and checks a recipe.

    Args:
        name: name of a shipped recipe, or path of a file.
        overrides: ``key.path=value``, the value in YAML.

    Raises:
        RecipeError: a key or value is wrong; the message has its full path and the nearest valid key.
    """
    path = find(name)
    data = read(path)
    for override in overrides:
        apply_override(data, override)
    return LoadedRecipe(path.stem, check(data, str(path.name)), name)


def check(data: dict[str, Any], where: str) -> Recipe:
    """A recipe from plain data. Raises RecipeError."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{where}: " + "; ".join(_explain(item, data) for item in error.errors()[:5])) from None


def read_recorded(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that a run recorded, with overrides.

    Raises:
        RecipeError: this version of Laconic does not have its keys or values, or an override is wrong.
    """
    data = _parsed(path)
    try:
        Recipe.model_validate(data)
    except ValidationError as error:
        unknown = [".".join(map(str, _location(item))) for item in error.errors() if item["type"] in _UNKNOWN]
        others = [_explain(item, data) for item in error.errors() if item["type"] not in _UNKNOWN]
        problems = ([f"it has the keys {', '.join(unknown)}, which do not exist in this version"] if unknown else []) + others[:3]
        raise RecipeError(
            f"{path} was written by another version of Laconic, or edited: {'; '.join(problems)}. Correct the file, or train again"
        ) from None
    for override in overrides:
        apply_override(data, override)
    return check(data, str(path))


def dump(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults included."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Unchecked data of a recipe file, merged over its bases.

    Args:
        path: the file.
        seen: overlays that lead to the file, to find circles.

    Raises:
        RecipeError: a file does not exist or is not YAML, or the bases form a circle.
    """
    if path in seen:
        raise RecipeError(f"{path.name}: its bases form a circle: {' → '.join(item.stem for item in (*seen, path))}")
    data = _parsed(path)
    base = data.pop("base", None)
    if base is None:
        return data
    beside = path.parent / f"{base}.yaml"
    return merged(read(beside if beside.is_file() else find(str(base)), (*seen, path)), data)


def _parsed(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path} must hold keys and values, and holds {type(data).__name__}")
    return data


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested plain data updated with other data, block by block; a list is replaced as a whole."""
    whole = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(whole.get(key), dict)
        whole[key] = merged(whole[key], value) if both else value
    return whole


def apply_override(data: dict[str, Any], override: str) -> None:
    """Sets one ``key.path=value`` in plain data, in place. Raises RecipeError if it does not have that form."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"override {override!r} must be key.path=value, trainer.max_steps=100 for example")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(f"override {override!r}: the value is not YAML") from None
    here: Any = data
    keys = path.split(".")
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(here, list):
            if not key.isdigit() or int(key) >= len(here):
                raise RecipeError(
                    f"override {override!r}: {'.'.join(keys[:depth])} is a list of {len(here)}, {key!r} is not an index of it"
                )
            index: Any = int(key)
        else:
            index = key
        if last:
            here[index] = value
        else:
            if not isinstance(here, list) and not isinstance(here.get(index), dict | list):
                here[index] = {}
            here = here[index]


# Parts of pydantic's error paths that name a type instead of a key.
_OF_TYPES = ("function-", "dict[", "list[", "PartConfig", "Mapping", "literal[", "constrained-")
# pydantic's error types for an unknown key.
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


def _location(error: Any) -> list[Any]:
    """Keys and indices from the top of the recipe to a mistake."""
    return [part for part in error["loc"] if str(part) not in ("str", "int") and not str(part).startswith(_OF_TYPES)]


def _explain(error: Any, data: Mapping[str, Any]) -> str:
    """Message for one mistake.

    Args:
        error: pydantic's error.
        data: the checked data.
    """
    location = _location(error)
    path = ".".join(map(str, location))
    message = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if error["type"] in _UNKNOWN:
        task = data.get("task", Recipe.model_fields["task"].default)
        if location[:-1] == ["data"] and (refusal := elsewhere(task, str(location[-1]))) is not None:
            return refusal
        allowed = _keys_at(KINDS[task], location[1:-1]) if location[0] == "data" and len(location) > 1 else _keys_at(Recipe, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), allowed, 1, cutoff=0.5)
        parent = ".".join(map(str, location[:-1]))
        prefix = f"{parent}." if parent else ""
        hint = f"did you mean {prefix}{near[0]}?" if near else f"keys here: {', '.join(allowed)}"
        return f"{path} is not a key; {hint}"
    if error["type"] == "missing":
        return f"{path} is missing"
    if error["type"] == "value_error" or not path:
        return message if not path or path in message or "." in message.split(" ")[0] else f"{path}: {message}"
    return f"{path} = {error['input']!r}: {message[0].lower()}{message[1:]}"


def _keys_at(model: Any, location: Sequence[Any]) -> list[str]:
    """Names of the keys at a location of the recipe, for a hint."""
    for part in location:
        annotation = model.model_fields[part].annotation if isinstance(model, type) and issubclass(model, BaseModel) else None
        options = (
            typing.get_args(annotation)
            if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
            else (annotation,)
        )
        model = next((item for item in options if isinstance(item, type) and (is_dataclass(item) or issubclass(item, BaseModel))), None)
        if model is None:
            return []
    return list(model.model_fields) if issubclass(model, BaseModel) else [item.name for item in fields(model)]
