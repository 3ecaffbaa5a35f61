"""Methods by name: ``compression: {method: pyramiddrop, keep: 0.6}`` is the stages of recipes/methods/pyramiddrop.yaml."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ...modules.config import StageConfig
from ..errors import RecipeError
from .plain_yaml import read_file

_FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "methods"
# The method, and settings of all of its stages that a recipe may change.
SETTINGS = ("method", *(item.name for item in fields(StageConfig) if item.name != "name"))


def methods() -> dict[str, Path]:
    """Files of the methods that come with Laconic, by name."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"))}


def replaces_stages(under: Any, over: Any) -> bool:
    """True if an overlay's ``compression`` is to be read without that of its base, since one of them is a method and the other gives stages."""
    if not isinstance(under, dict) or not isinstance(over, dict):
        return False
    return "method" in over or ("stages" in over and "method" in under)


def with_method(data: Mapping[str, Any]) -> dict[str, Any]:
    """The data of a recipe with the stages of the method that it names, if it does.

    What the recipe itself says goes before the method's own settings.
    """
    if not (method := _method_of(data)):
        return dict(data)
    return merged(method, {key: value for key, value in data.items() if key != "compression"})


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested plain data updated with other data, block by block; a list is replaced as a whole."""
    whole = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(whole.get(key), dict)
        whole[key] = merged(whole[key], value) if both else value
    return whole


def _method_of(data: Mapping[str, Any]) -> dict[str, Any]:
    """The blocks of the method that the data of a recipe names in ``compression.method``, with its changes; empty if there is none.

    A change of a setting applies to all stages of the method; ``layer`` then is that of each, so that a method of several stages takes a list
    of as many.

    Args:
        data: unchecked data of a recipe.

    Raises:
        RecipeError: there is no such method, or a setting is unknown or does not fit it.
    """
    given = data.get("compression")
    if not isinstance(given, dict) or "method" not in given:
        return {}
    name, known = given["method"], methods()
    if name is None:
        raise RecipeError("compression.method = null: set compression=null for a dense model, or name a method")
    if not isinstance(name, str) or name not in known:
        near = difflib.get_close_matches(str(name), list(known), 1)
        raise RecipeError(
            f"compression.method = {name!r} is no method: the methods are {', '.join(known)}"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    if "stages" in given:
        raise RecipeError(f"compression.method = {name!r} has stages of its own: remove compression.stages, or the method")
    for key in given:
        if key not in (*SETTINGS, "restore"):
            raise RecipeError(f"compression.{key} is no setting of a method: there are {', '.join(SETTINGS[1:])} and restore")
    method: dict[str, Any] = read_file(known[name])
    settings = {key: value for key, value in given.items() if key in SETTINGS[1:]}
    if "compression" not in method:
        if settings:
            raise RecipeError(
                f"compression.method = {name!r} has no stages, and compression.{next(iter(settings))} is one of a stage: remove it"
            )
        return {**method, "compression": None}
    if "tokens" in settings:
        settings["keep"] = None
    # Stages that leave layers out have no other settings than their layers.
    stages = [stage if stage.get("keep") == 0 else {**stage, **settings} for stage in method["compression"]["stages"]]
    return {**method, "compression": {"stages": stages, **({"restore": given["restore"]} if "restore" in given else {})}}
