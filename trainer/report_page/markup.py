"""HTML as a tree, so that all text is escaped when it is written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from xml.etree.ElementTree import Element, tostring

# Rows above which a table is folded.
_FOLDED = 14


def tag(name: str, /, *children: Any, **attributes: Any) -> Element:
    """An element with text, elements, or iterables of them inside.

    Args:
        name: of the element.
        children: what is inside; None is nothing, other objects than elements are text.
        attributes: by name, ``_`` standing for ``-``, and ``kind`` for ``class``; None leaves one out.
    """
    names = {key: "class" if key == "kind" else key.replace("_", "-") for key in attributes}
    element = Element(name, {names[key]: _text(value) for key, value in attributes.items() if value is not None})
    _put(element, children)
    return element


def _put(element: Element, children: Iterable[Any]) -> None:
    for child in children:
        if isinstance(child, Element):
            element.append(child)
        elif isinstance(child, Iterable) and not isinstance(child, str):
            _put(element, child)
        elif child is not None and len(element):
            element[-1].tail = (element[-1].tail or "") + _text(child)
        elif child is not None:
            element.text = (element.text or "") + _text(child)


def _text(value: Any) -> str:
    """Text that UTF-8 can hold: names of files need not be."""
    return str(value).encode("utf-8", "replace").decode()


def written(element: Element) -> str:
    """The element as HTML."""
    return tostring(element, encoding="unicode", method="html")


def number(value: Any, form: str = ".4g", unit: str = "") -> str:
    """A number as text; a dash for None and NaN, and anything that is no number as it is.

    Args:
        value: the number.
        form: its format, for a float.
        unit: what stands behind it.
    """
    if value is None or value != value:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return (f"{value:,}" if isinstance(value, int) else f"{value:{form}}") + unit


def table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[Any]], texts: int = 1, marked: Iterable[int] = (), fold: bool = True
) -> Element:
    """A table in a box that scrolls by itself.

    Args:
        title: what the table shows.
        header: names of the columns.
        rows: cells of each row, text or elements; the first is the row's name.
        texts: columns that hold text, from the left; the others hold numbers and are aligned to the right.
        marked: rows that are highlighted.
        fold: fold a long one.
    """
    kinds = ["text" if column < texts else "number" for column in range(len(header))]
    head = tag("tr", (tag("th", name, scope="col", kind=kind) for name, kind in zip(header, kinds, strict=True)))
    chosen = set(marked)
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row", kind=kinds[0]),
            (tag("td", cell, kind=kind) for cell, kind in zip(row[1:], kinds[1:], strict=True)),
            kind="marked" if place in chosen else None,
        )
        for place, row in enumerate(rows)
    ]
    box = tag(
        "div",
        tag("table", tag("thead", head), tag("tbody", body), aria_label=title),
        kind="scroll",
        tabindex="0",
        role="region",
        aria_label=title,
    )
    if fold and len(rows) > _FOLDED:
        return folded(f"{title} ({len(rows)} rows)", box)
    # Outside the box, so that a long title wraps where the table does not.
    return tag("div", tag("p", title, kind="title"), box)


def folded(title: str, *inside: Any) -> Element:
    """What is shown when its title is pressed."""
    return tag("details", tag("summary", title), *inside)
