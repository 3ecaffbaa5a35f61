"""Finding a part (scorer, selector, merger) by name: the folder is the registry, the file's name is the part's name."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from typing import Any


def files(package: str) -> dict[str, str]:
    """Full module name of every file in a package's folder, by the file's name.

    A folder may have been laid flat, as exports for machines without Laconic are: transformers loads files of one folder only, so
    that ``scorers/learned.py`` is ``scorers_learned.py`` there, beside ``scorers.py``.
    """
    loaded = importlib.import_module(package)
    if hasattr(loaded, "__path__"):
        return {module.name: f"{package}.{module.name}" for module in pkgutil.iter_modules(loaded.__path__) if not module.ispkg}
    parent, _, folder = package.rpartition(".")
    beside = pkgutil.iter_modules(importlib.import_module(parent).__path__)
    mine = [module.name for module in beside if module.name.startswith(f"{folder}_")]
    return {name.removeprefix(f"{folder}_"): f"{parent}.{name}" for name in mine}


def names(package: str) -> list[str]:
    """Names of the parts in a package: its files, without those that parts share, whose names begin with ``base``."""
    return sorted(name for name in files(package) if not name.startswith("base"))


def check_name(package: str, name: str) -> None:
    """Raises ValueError, with what there is, where a package has no part of that name; no part is imported."""
    kind = package.rsplit(".", 1)[-1]
    allowed = names(package)
    if name not in allowed:
        near = difflib.get_close_matches(name, allowed, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{kind[:-1]} {name!r} does not exist: the {kind} are {', '.join(allowed)}{hint}")


def find(package: str, name: str, base: type[Any]) -> type[Any]:
    """The class that a part's file defines.

    Args:
        package: full name of the folder's package.
        name: the part's name, as in a recipe.
        base: class that the part derives from.

    Raises:
        ValueError: no file of that name; the message lists what there is.
    """
    check_name(package, name)
    module = importlib.import_module(files(package)[name])
    defined = [item for item in vars(module).values() if isinstance(item, type) and issubclass(item, base)]
    return next(item for item in defined if item.__module__ == module.__name__)


def check_options(cls: type[Any], kind: str, name: str, options: dict[str, Any], given: tuple[str, ...]) -> None:
    """Raises ValueError when ``options`` has a key that the part's constructor does not take.

    Args:
        cls: the part's class.
        kind: ``scorer``, ``selector`` or ``merger``, for the message.
        name: the part's name, for the message.
        options: keyword arguments from the config.
        given: arguments that the stage passes itself and no config may set.
    """
    allowed = [key for key in inspect.signature(cls.__init__).parameters if key not in ("self", *given)]
    for key in options:
        if key not in allowed:
            what = f"its options are {', '.join(allowed)}" if allowed else "it has no options"
            near = difflib.get_close_matches(key, allowed, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{kind} {name!r} has no option {key!r}: {what}{hint}")
