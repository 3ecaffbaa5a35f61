"""Finds a part by name: a file in the part's folder of this package, or an entry point of another package.

This file does not import torch, and a part's file is imported only when the part is built, so recipes are checked quickly.
"""

from __future__ import annotations

import copy
import difflib
import functools
import importlib
import inspect
import math
import pkgutil
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from types import NoneType
from typing import Any, Protocol

_ROOT = __name__.rpartition(".")[0]


@dataclass(frozen=True)
class Kind:
    """A kind of part.

    Attributes:
        folder: folder of its files, relative to this package.
        base: class that every part of the kind derives from, defined in the folder's ``base.py``.
        given: constructor arguments that the stage passes; a config cannot set them.
    """

    folder: str
    base: str
    given: tuple[str, ...] = ()

    @property
    def package(self) -> str:
        """Full name of the folder's package."""
        return f"{_ROOT}.{self.folder}"

    @property
    def group(self) -> str:
        """Entry point group in which other packages declare parts of this kind."""
        return f"laconic.{self.folder.rpartition('.')[2]}"


KINDS = {
    "scorer": Kind("scorers", "Scorer", ("spec",)),
    "selector": Kind("selectors", "Selector", ("spec",)),
    "merger": Kind("mergers", "Merger", ("spec",)),
    "estimator": Kind("estimators", "Estimator"),
    "shortcut": Kind("shortcuts", "Shortcut", ("spec",)),
    "regularizer": Kind("budget.regularizers", "Regularizer"),
    "controller": Kind("budget.controllers", "Controller"),
}


# Of a float of 32 bits.
_LARGEST = 3.4028234663852886e38


class Part(Protocol):
    """A part as a config has it: its name and options; ``given`` is the class or object that Python code gave instead."""

    @property
    def name(self) -> str: ...
    @property
    def options(self) -> Any: ...
    @property
    def given(self) -> Any: ...


@functools.cache
def files(package: str) -> Mapping[str, str]:
    """Full module name of every file in a package's folder, by file name.

    Standalone exports have no sub-folders, since transformers loads remote code from one folder: there ``scorers/learned.py`` is
    ``scorers_learned.py``, beside ``scorers.py``.
    """
    loaded = importlib.import_module(package)
    if hasattr(loaded, "__path__"):
        return {module.name: f"{package}.{module.name}" for module in pkgutil.iter_modules(loaded.__path__) if not module.ispkg}
    parent, _, folder = package.rpartition(".")
    beside = pkgutil.iter_modules(importlib.import_module(parent).__path__)
    modules = [module.name for module in beside if module.name.startswith(f"{folder}_")]
    return {name.removeprefix(f"{folder}_"): f"{parent}.{name}" for name in modules}


def names(package: str) -> list[str]:
    """Names of the parts in a package: its files, except the shared ones, whose names begin with ``base``."""
    return sorted(name for name in files(package) if not name.startswith("base"))


def check_name(what: str, name: str, allowed: list[str]) -> None:
    """Raises ValueError, listing the allowed names, unless ``name`` is one of them.

    Args:
        what: singular noun for the message.
        name: the given name.
        allowed: the allowed names.
    """
    if name not in allowed:
        near = difflib.get_close_matches(name, allowed, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{what} {name!r} does not exist: the {what}s are {', '.join(allowed)}{hint}")


def find(package: str, name: str, base: type[Any]) -> type[Any]:
    """The part class that a file defines.

    Args:
        package: full name of the folder's package.
        name: name of the file.
        base: class that the part derives from.

    Raises:
        ValueError: there is no file of that name; the message lists the names.
    """
    check_name(package.rpartition(".")[2][:-1], name, names(package))
    module = importlib.import_module(files(package)[name])
    defined = [item for item in vars(module).values() if isinstance(item, type) and issubclass(item, base)]
    return next(item for item in defined if item.__module__ == module.__name__)


@functools.cache
def outside(kind: str) -> dict[str, metadata.EntryPoint]:
    """Entry points of other packages, by part name.

    Raises:
        ValueError: an entry point has the name of a part of this package.
    """
    if not hasattr(importlib.import_module(KINDS[kind].package), "__path__"):
        # A standalone export holds every part of its model, those of other packages too.
        return {}
    found = {entry.name: entry for entry in metadata.entry_points(group=KINDS[kind].group)}
    for name in names(KINDS[kind].package):
        if name in found:
            raise ValueError(
                f"entry point {name!r} ({found[name].value}) in group {KINDS[kind].group} has the name of Laconic's own {kind}: rename it"
            )
    return found


def part_names(kind: str) -> list[str]:
    """Names of all parts of a kind, including those of other packages. No part is imported."""
    return sorted([*names(KINDS[kind].package), *outside(kind)])


def part_class(kind: str, part: Part) -> type[Any]:
    """The class of a part.

    Args:
        kind: a key of ``KINDS``.
        part: the part as the config has it.

    Raises:
        ValueError: there is no such part, or the given class or object is of another kind.
    """
    about = KINDS[kind]
    base = getattr(importlib.import_module(files(about.package)["base"]), about.base)
    if part.given is not None:
        cls = part.given if isinstance(part.given, type) else type(part.given)
    else:
        check_name(kind, part.name, part_names(kind))
        entry = outside(kind).get(part.name)
        cls = find(about.package, part.name, base) if entry is None else entry.load()
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ValueError(f"{kind} {part.name!r} is {cls!r}, which does not derive from laconic's {about.base}")
    return cls


def build(kind: str, part: Part, *given: Any) -> Any:
    """The built part. An object that was given is copied, so that every stage has its own.

    Args:
        kind: a key of ``KINDS``.
        part: the part as the config has it.
        given: constructor arguments that the stage passes.

    Raises:
        ValueError: an unknown name or option, or a value out of range.
    """
    cls = part_class(kind, part)
    if part.given is not None and not isinstance(part.given, type):
        return copy.deepcopy(part.given)
    _check_options(cls, kind, part.name, dict(part.options))
    try:
        return cls(*given, **part.options)
    except TypeError as error:
        raise ValueError(f"{kind} {part.name!r}: an option is of the wrong type: {error}") from None
    except RuntimeError as error:
        # Of torch: more memory than there is, for example.
        raise ValueError(f"{kind} {part.name!r} cannot be built with {dict(part.options)}: {' '.join(str(error).split())[:500]}") from error


def name_of(kind: str, cls: type[Any]) -> str | None:
    """The name by which a config can find a class; None if it is neither a part of this package nor an entry point."""
    for name, module in files(KINDS[kind].package).items():
        if module == cls.__module__ and not name.startswith("base"):
            return name
    place = f"{cls.__module__}:{cls.__qualname__}"
    return next((name for name, entry in outside(kind).items() if entry.value == place), None)


def _check_options(cls: type[Any], kind: str, name: str, options: dict[str, Any]) -> None:
    allowed = [key for key in inspect.signature(cls.__init__).parameters if key not in ("self", *KINDS[kind].given)]
    for key in options:
        if key not in allowed:
            what = f"its options are {', '.join(allowed)}" if allowed else "it has no options"
            near = difflib.get_close_matches(key, allowed, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{kind} {name!r} has no option {key!r}: {what}{hint}")
    try:
        hints = typing.get_type_hints(cls.__init__)
    except NameError:
        # A part of another package may name types that only a type checker imports.
        return
    for key, value in options.items():
        if isinstance(value, int | float) and _LARGEST < abs(value) < math.inf:
            raise ValueError(f"{kind} {name!r}: {key} = {value!r} is larger than a float of 32 bits can be")
        types = typing.get_args(hints.get(key)) or (hints.get(key),)
        if all(isinstance(item, type) for item in types) and not _fits(value, types):
            allowed_types = " or ".join("null" if item is NoneType else item.__name__ for item in types)
            raise ValueError(f"{kind} {name!r}: an option is of the wrong type: {key} = {value!r} must be {allowed_types}")


def _fits(value: Any, types: tuple[Any, ...]) -> bool:
    """True if a value is of one of the types: true is no number, an int is a float, and a float is finite."""
    if isinstance(value, bool):
        return bool in types
    if float in types and isinstance(value, int | float):
        return math.isfinite(value)
    return isinstance(value, types)
