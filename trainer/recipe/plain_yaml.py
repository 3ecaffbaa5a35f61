"""Reads YAML as plain data: keys once, numbers finite, values of JSON's types, and a limited size."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from ..errors import RecipeError

# Recipes have a few thousand characters; parsing takes seconds per million.
LONGEST, DEEPEST, MOST = 200_000, 40, 100_000
# Characters of a value that count as one more value, because an alias repeats them too.
_LONG = 100


_DATE, _FLOAT, _MERGE = (f"tag:yaml.org,2002:{name}" for name in ("timestamp", "float", "merge"))


# libyaml's parser is ten times as fast, and not in every build of PyYAML.
_Safe: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Safe):
    """YAML's safe types, with the floats of YAML 1.2 (``1e-3``), dates as text, and an error for a key that is given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            # A merge (<<) may be overridden by the keys beside it.
            name = key.value if key.tag == _MERGE else self.construct_object(key, deep=True)
            if isinstance(name, bool) or not isinstance(name, str | int):
                raise RecipeError(f"line {key.start_mark.line + 1}: the key {name!r} is not text; put it in quotes")
            if name in seen:
                raise RecipeError(f"the key {name!r} is given twice, in line {key.start_mark.line + 1} again: remove one of them")
            seen.add(name)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _DATE] for first, resolvers in _Safe.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_FLOAT, re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))


def read_file(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        RecipeError: the file is no text, or its content is refused, as in ``parsed``.
    """
    try:
        if path.stat().st_size > 4 * LONGEST:
            raise RecipeError(f"{path} has {path.stat().st_size:,} bytes, more than a recipe has: is it another file?")
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is not YAML: it is not text in UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror or error}") from None
    return parsed(text, f"{path} is not YAML")


def parsed(text: str, problem: str) -> Any:
    """The plain data of a YAML text: dict, list, str, int, finite float, bool and None.

    Args:
        text: the YAML.
        problem: beginning of an error message.

    Raises:
        RecipeError: the text is no YAML, too long, too deep, repeats too much by aliases, gives a key twice, or has other types.
    """
    if len(text) > LONGEST:
        raise RecipeError(f"{problem}: it has {len(text):,} characters, and {LONGEST:,} are allowed")
    try:
        _check_extent(text)
        data = yaml.load(text, _Loader)
        return _plain(data, "")
    except RecipeError as error:
        raise RecipeError(f"{problem}: {error}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{problem}: {' '.join(str(error).split())}") from None
    except Exception as error:
        # PyYAML raises errors of many types here.
        raise RecipeError(f"{problem}: a value does not fit its tag ({' '.join(str(error).split())[:200]})") from None


def _check_extent(text: str) -> None:
    """Raises RecipeError if the data would be deeper than DEEPEST or have more than MOST values, aliases counted as often as they occur."""
    values, sizes = 0, dict[str, int]()
    opened: list[tuple[str | None, int]] = []
    for event in yaml.parse(text, _Safe):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise RecipeError(f"the alias *{event.anchor} stands before or inside its anchor")
            values += sizes[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, values))
            values += 1
        elif isinstance(event, yaml.ScalarEvent):
            size = 1 + len(event.value) // _LONG
            values += size
            sizes |= {event.anchor: size} if event.anchor else {}
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            sizes |= {anchor: values - before} if anchor else {}
        if len(opened) > DEEPEST:
            raise RecipeError(f"it is nested more than {DEEPEST} deep")
        if values > MOST:
            raise RecipeError(f"it has more than {MOST:,} values, those that aliases repeat included")


def _plain(value: Any, path: str) -> Any:
    """The value itself, lists and mappings copied, so that no two keys share one. Raises RecipeError for another type."""
    if isinstance(value, dict):
        return {key: _plain(item, _under(path, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, _under(path, index)) for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{f'{path} = ' if path else ''}{value} is not a finite number")
    if isinstance(value, int) and abs(value) > 2**63:
        raise RecipeError(f"{f'{path}: ' if path else ''}a number of more than 64 bits")
    if value is None or isinstance(value, str | int | float):
        return value
    raise RecipeError(f"{f'{path}: ' if path else ''}a {type(value).__name__} is not one of text, number, true or false, list, and mapping")


def _under(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)
