"""Wrong input made from right input: hypothesis strategies of values, and mutations of plain data and of bytes."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

from hypothesis import strategies as st

# Values that code forgets: each was the cause of a traceback somewhere.
TRAPS: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 10**18, -(10**18), 0.0, 0.5, 1.5, -0.5, 1e-300, 1e300, "", " ", "x", "..", ".", "/", "~", "a/b",
    "-1", "1e3", "nan", "null", "{x}", "{recipe:>99}", "{0}", "%s", "a\nb", "a\0b", "ä→", "<b>", "$(x)", "x" * 300, [], {}, [[]], [None], [1, 2],
    ["a"], {"a": 1}, {"name": "x"}, {"name": 1}, {"": None}, {"layer": 1}, [{}],
]  # fmt: skip
# Texts that YAML reads in ways of its own.
YAML_TRAPS = [
    "!!bool x", "!!int x", "!!float x", "!!timestamp x", "!!binary x", "!!python/object:os.system x", "!!set {a}", "!!omap [a: 1]", ".inf",
    "-.inf", ".nan", "1e999", "2024-01-01", "12:30:00", "0o17", "0x1F", "1_000", "&a [*a]", "*a", "[" * 60, "{" * 60, "{a: 1, a: 2}", "<<: 1",
    "? [1]\n: 2", "true: 1", "---\n...\n---", "%YAML 9.9", "'", '"', "`", "@", "a: b: c", "\t", "\ufeff", "- - - - -", "|", ">", "#", "~", "=",
    "9" * 5000,
]  # fmt: skip

values = st.one_of(
    st.sampled_from(TRAPS),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12)),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
        max_leaves=6,
    ),
)
numbers = st.integers(0, 2**32 - 1)


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values in plain data, its own excluded."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [place for key, value in items for place in ((*path, key), *places(value, (*path, key)))]


def mutated(data: Any, draws: random.Random, value: Any, keys: list[str]) -> Any:
    """A copy of plain data with one change at a random place.

    Args:
        data: dict or list, possibly nested.
        draws: random numbers.
        value: value to put somewhere.
        keys: names of keys that may be added.
    """
    changed = copy.deepcopy(data)
    found = places(changed)
    if not found:
        return value
    *above, last = draws.choice(found)
    holder = changed
    for key in above:
        holder = holder[key]
    kind = draws.randrange(6)
    if kind <= 2:
        holder[last] = value
    elif kind == 3:
        del holder[last]
    elif kind == 4:
        # Another part of the same data: right in form, wrong in place.
        *other, key = draws.choice(found)
        source = changed
        for part in other:
            source = source[part]
        holder[last] = copy.deepcopy(source[key])
    elif isinstance(holder, dict):
        holder[draws.choice([*keys, "", "x", str(last).upper()])] = value
    else:
        holder.append(value)
    return changed


def damaged(content: bytes, draws: random.Random) -> bytes:
    """Bytes with some of them changed, cut, repeated or inserted."""
    changed = bytearray(content)
    for _ in range(draws.choice([1, 1, 2, 8])):
        place, kind = draws.randrange(len(changed) + 1), draws.randrange(5)
        if kind == 0 and changed:
            changed[min(place, len(changed) - 1)] ^= 1 << draws.randrange(8)
        elif kind == 1:
            del changed[place:]
        elif kind == 2:
            changed[place : place + draws.randrange(1, 16)] = bytes(draws.randrange(256) for _ in range(draws.randrange(1, 16)))
        elif kind == 3:
            changed[place:place] = changed[: draws.randrange(1, 64)]
        else:
            changed[place : place + 8] = draws.choice([b"\0" * 8, b"\xff" * 8, (2**40).to_bytes(8, "little")])
    return bytes(changed)


def as_json(data: Any, draws: random.Random) -> bytes:
    """JSON of plain data, now and then not quite."""
    text = json.dumps(data, ensure_ascii=draws.random() < 0.5, allow_nan=True).encode("utf-8", "surrogatepass")
    return damaged(text, draws) if draws.random() < 0.15 else text
