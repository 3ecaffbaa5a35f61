"""A Markdown page: its code blocks, code spans, links and headings, and the commands that it shows."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
# What stands for arguments that a reader fills in.
_LEFT_OUT = re.compile(r"…|\.\.\.")


@dataclass(frozen=True)
class Page:
    """A page, by its path."""

    path: Path

    @property
    def name(self) -> str:
        """Its path from the root, for messages."""
        return str(self.path.relative_to(ROOT))

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    def blocks(self, *languages: str) -> list[str]:
        """Code blocks in these languages."""
        return [code for language, code in _FENCE.findall(self.text) if language in languages]

    @cached_property
    def prose(self) -> str:
        """The text without code blocks."""
        return _FENCE.sub("\n", self.text)

    @cached_property
    def spans(self) -> list[str]:
        """Code in the prose; line breaks in it are spaces."""
        return [" ".join(span.replace("\\|", "|").split()) for span in _SPAN.findall(self.prose)]

    @cached_property
    def links(self) -> list[str]:
        """Targets of links and pictures."""
        return _LINK.findall(_SPAN.sub("", self.prose))

    @cached_property
    def anchors(self) -> set[str]:
        """What a link behind # may name: headings as GitHub writes them."""
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in _HEADING.findall(self.prose)}

    @cached_property
    def commands(self) -> list[list[str]]:
        """Arguments of every ``laconic`` command in a shell block, without what the page leaves out by an ellipsis."""
        lines = [line for block in self.blocks("bash", "sh") for line in _lines(block)]
        words = [[word for word in line if not _LEFT_OUT.fullmatch(word)] for line in lines]
        return [line[line.index("laconic") + 1 :] for line in words if "laconic" in line]


def _lines(block: str) -> Iterator[list[str]]:
    """Words of each command; a line continues where it ends in a backslash or inside quotes."""
    waiting = ""
    for line in block.replace("\\\n", " ").replace("&&", "\n").splitlines():
        waiting += f"{line}\n"
        try:
            words = shlex.split(waiting, comments=True)
        except ValueError:
            continue
        waiting = ""
        yield words


PAGES = [Page(ROOT / "README.md"), *(Page(path) for path in sorted((ROOT / "docs").glob("*.md")))]
