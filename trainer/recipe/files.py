"""Recipe files: finding them, merging overlays and overrides, and reporting mistakes in one clear message."""

from __future__ import annotations

import difflib
import os
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
from .methods import merged, replaces_stages, with_method
from .plain_yaml import parsed, read_file
from .schema import Recipe
from .unread import holds, unread

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
    # Path.is_file raises for a name that is too long.
    if os.path.isfile(path):
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
    return LoadedRecipe(path.stem, _overridden(read(path), _parsed(path), overrides, path.name), name)


def check(data: dict[str, Any], where: str) -> Recipe:
    """A recipe from plain data. Raises RecipeError."""
    return _overridden(data, data, (), where)


def changed(recipe: Recipe, overrides: Sequence[str], where: str) -> Recipe:
    """A checked recipe with overrides; keys that lose their effect by them are left out.

    Args:
        recipe: the recipe.
        overrides: ``key.path=value``, the value in YAML.
        where: what the recipe is of, for messages.

    Raises:
        RecipeError: a key or value is wrong.
    """
    data = recipe.model_dump(mode="json")
    return _overridden(data, data, overrides, where)


def _overridden(data: dict[str, Any], own: dict[str, Any], overrides: Sequence[str], where: str) -> Recipe:
    """The recipe of plain data with overrides.

    A key that has no effect is refused if an override sets it, or the recipe itself although it has no effect there. A key of a base, or
    one that loses its effect by an override (the size of drawn images, with ``data.name=imagefolder``), is left out instead.

    Args:
        data: the data, changed in place.
        own: the part of the data that is not of a base.
        overrides: ``key.path=value``.
        where: name of the file, for messages.

    Raises:
        RecipeError: a key or value is wrong.
    """
    before = _lost_before(with_method(data)) if overrides else None
    # A method, or stages in place of it, come first: the other overrides are about them.
    first = [override for override in overrides if override.startswith(("compression.method=", "compression.stages="))]
    for override in first:
        if override.startswith("compression.method=") or replaces_stages(data.get("compression"), {"stages": []}):
            data["compression"] = {}
    for override in [*first, *(override for override in overrides if override not in first)]:
        apply_override(data, override)
    whole = with_method(data)
    data.clear()
    data.update(whole)
    recipe = _validated(data, where)
    lost, given = unread(recipe), [override.partition("=")[0] for override in overrides]
    for key, message in lost.items():
        if any(_meets(key, path) for path in given) or (holds(own, key) and (before is None or key in before)):
            raise RecipeError(f"{where}: {message}")
        *blocks, name = key.split(".")
        block = data
        for part in blocks:
            block = block[part]
        del block[name]
    return _validated(data, where) if lost else recipe


def _lost_before(data: Mapping[str, Any]) -> set[str]:
    """Keys without effect before overrides; empty if the recipe is not valid without them."""
    try:
        return set(unread(Recipe.model_validate(data)))
    except ValidationError:
        return set()


def _meets(key: str, path: str) -> bool:
    """True if an override of a path sets a key, or a part of it."""
    return key == path or key.startswith(f"{path}.") or path.startswith(f"{key}.")


def _validated(data: dict[str, Any], where: str) -> Recipe:
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
    return _overridden(data, data, overrides, str(path))


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
    path = path.resolve()
    if path in seen:
        raise RecipeError(f"{path.name}: its bases form a circle: {' → '.join(item.stem for item in (*seen, path))}")
    data = _parsed(path)
    base = data.pop("base", None)
    if base is None:
        return data
    if not isinstance(base, str) or not base:
        raise RecipeError(f"{path.name}: base = {base!r} must be the name of one recipe, or of a file beside this one without .yaml")
    under = read(path_of_base(base, path), (*seen, path))
    if replaces_stages(under.get("compression"), data.get("compression")):
        del under["compression"]
    return merged(under, data)


def path_of_base(base: str, overlay: Path) -> Path:
    """The file of a base: the one beside the overlay first. Raises RecipeError if there is none."""
    beside = overlay.parent / f"{base}.yaml"
    return beside if os.path.isfile(beside) else find(base)


def _parsed(path: Path) -> dict[str, Any]:
    data = read_file(path)
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise RecipeError(f"{path} must hold keys and values, and holds {type(data).__name__}")
    return data


def apply_override(data: dict[str, Any], override: str) -> None:
    """Sets one ``key.path=value`` in plain data, in place. Raises RecipeError if it does not have that form."""
    path, equals, text = override.partition("=")
    shown = f"override {_short(override)!r}"
    keys = path.split(".")
    if not equals or not all(keys):
        raise RecipeError(f"{shown} must be key.path=value, trainer.max_steps=100 for example")
    value = parsed(text, f"{shown}: the value is not YAML")
    here: Any = data
    for depth, key in enumerate(keys):
        above = ".".join(keys[:depth])
        if not isinstance(here, dict | list):
            raise RecipeError(f"{shown}: {above} is {_short(repr(here))}, which has no keys: set {above} as a whole")
        index = _index(here, key, f"{shown}: {above}") if isinstance(here, list) else key
        if depth == len(keys) - 1:
            here[index] = value
        else:
            if isinstance(here, dict) and here.get(key) is None:
                here[key] = {}
            here = here[index]


def _index(items: list[Any], key: str, where: str) -> int:
    if key.isascii() and key.isdigit() and len(key) < 10 and int(key) < len(items):
        return int(key)
    raise RecipeError(f"{where} is a list of {len(items)}, {_short(key)!r} is not an index of it")


def _short(text: str) -> str:
    """A text that a message repeats: its beginning, if it is long."""
    return text if len(text) <= 120 else f"{text[:120]} …"


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
