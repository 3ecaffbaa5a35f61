"""The whole page."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from ...modules.checkpoints.whole_files import write_file
from .chart_groups import curves
from .facts import configuration, cost_by_layer, versions
from .markup import tag, written
from .results import results
from .runs import Shown, read_runs
from .style import STYLE

# Nothing is loaded from elsewhere, and nothing runs.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_page(
    folders: Sequence[str | Path], to: Path, before: Mapping[str, Sequence[Element]] | None = None, title: str | None = None
) -> None:
    """Writes one self-contained HTML page about runs.

    Args:
        folders: folders of runs; a single one is shown with its control arms.
        to: file to write.
        before: further sections by title, which come first.
        title: title of the page; None for the names of the runs.

    Raises:
        RecipeError: a folder is no run, or is given twice.
        DamagedFile: a report is damaged.
        OSError: a file could not be read or written.
    """
    write_file(to, page(read_runs(folders), before, title))


def page(runs: Sequence[Shown], before: Mapping[str, Sequence[Element]] | None = None, title: str | None = None) -> str:
    """The page as HTML. All texts of the runs are escaped; the page has no script and needs no other file."""
    own = [shown for shown in runs if not shown.control]
    costs = [cost for shown in own if (cost := cost_by_layer(shown)) is not None]
    sections: dict[str, Sequence[Element]] = {
        **(before or {}),
        "Results": results(own),
        "Curves": curves(runs),
        "Kept tokens": [_picture(shown) for shown in own if shown.run.kept_tokens.is_file()],
        "Cost by layer": [tag("p", "MACs of one row; a bar is as long as the dense layer costs.", kind="soft"), *costs] if costs else [],
        "Configuration": configuration(runs),
        "Versions and data": versions(own),
    }
    filled = {title: parts for title, parts in sections.items() if parts}
    title = title or ", ".join(shown.name for shown in own)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{title}: report of Laconic"),
        tag("style", STYLE),
    )
    body = tag(
        "body",
        tag("header", tag("h1", title), [_about(shown) for shown in own], _remarks(own)),
        tag("nav", tag("ul", (tag("li", tag("a", title, href=f"#{_id(title)}")) for title in filled)), aria_label="Sections"),
        tag(
            "main",
            (tag("section", tag("h2", title, id=_id(title)), parts, aria_labelledby=_id(title)) for title, parts in filled.items()),
        ),
    )
    return f"<!doctype html>\n{written(tag('html', head, body, lang='en'))}\n"


def _id(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower())


def _about(shown: Shown) -> Element:
    facts = [f"{shown.settings.get('task', '').replace('_', ' ')}, seed {shown.settings.get('seed', '0')}", str(shown.run.path)]
    if shown.ended is None:
        facts.append("no report.json: the run has not ended, or is a control arm")
    return tag("p", " · ".join(facts if len(facts[0]) else facts[1:]), kind="soft")


def _remarks(runs: Sequence[Shown]) -> Element | None:
    """What the reader should change, of the runs and their control arms."""
    rows = {name: arm for shown in runs if shown.ended is not None for name, arm in shown.ended.rows.items()}
    found = [tag("li", f"{name}: {remark}") for name, arm in rows.items() for remark in arm.remarks]
    return tag("ul", found, kind="remarks", aria_label="Remarks") if found else None


def _picture(shown: Shown) -> Element:
    return picture(
        shown.run.kept_tokens, f"Tokens that the arms of {shown.name} keep: the same images for each arm, with dropped patches darkened"
    )


def picture(path: Path, text: str) -> Element:
    """A figure of a PNG file, which becomes a part of the page, with a text that says what it shows."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    image = tag("img", src=f"data:image/png;base64,{data}", alt=text, kind="picture")
    box = tag("div", image, kind="scroll", tabindex="0", role="region", aria_label=text)
    return tag("figure", box, tag("figcaption", text, kind="soft"))
