"""Commands on the pages: the command line accepts each, with its recipe and overrides; the README lists every verb."""

from __future__ import annotations

import re
from typing import Any

import pytest
import typer

from laconic.trainer.cli.app import app
from laconic.trainer.compare.arms import arms_of
from laconic.trainer.recipe.files import load
from laconic.trainer.recipe.listing import listed

from .keys import exists
from .markdown import PAGES, Page

VERBS: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]
# A recipe of the page, which a reader writes: its overrides are checked as keys alone.
_FILE = re.compile(r"\S+\.yaml")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.path.stem)


def _check(words: list[str]) -> None:
    """Raises an error that says what is wrong with a command."""
    verb, *rest = words
    if not rest or "=" in rest[0] or rest[0].startswith("--"):
        rest = ["vit_image_folder", *rest]  # the page has an ellipsis
    given = VERBS[verb].make_context(verb, rest).params
    recipe, overrides = given.get("recipe"), list(given.get("overrides") or [])
    wrong = [override for override in overrides if not exists(override.partition("=")[0].rpartition(":")[2])]
    assert not wrong, f"no such keys: {wrong}"
    if recipe is None or _FILE.fullmatch(recipe):
        return
    if verb == "compare":
        # Ratios and smaller inputs are found by building the model.
        names = [name for name in given["arms"].split(",") if not (_FILE.search(name) or "@" in name or name in ("pooled", "downsampled"))]
        for arm in arms_of(recipe, names, overrides)[1]:
            arm.load(0)
    else:
        load(recipe, overrides)


@each_page
def test_commands_in_blocks_are_accepted(page: Page) -> None:
    for words in page.commands:
        try:
            _check(words)
        except Exception as error:
            pytest.fail(f"{page.name}: laconic {' '.join(words)}: {getattr(error, 'message', None) or error}")


@each_page
def test_commands_in_the_text_name_verbs_and_options_that_exist(page: Page) -> None:
    for span in page.spans:
        if not span.startswith("laconic "):
            continue
        # In the README several commands share a cell, and arguments that may be left out are in brackets.
        verb, *rest = re.split(r"[\s\[\]]+", span.removeprefix("laconic "))
        assert verb in VERBS or verb.startswith("--"), f"{page.name}: {span}"
        options = (
            {option for parameter in VERBS[verb].params for option in (*parameter.opts, *parameter.secondary_opts)} if verb in VERBS else ()
        )
        assert {word for word in rest if word.startswith("--")} <= {*options, "--help"}, f"{page.name}: {span}"


def test_the_list_of_recipes_has_whole_sentences() -> None:
    for lines in listed(controls=True).values():
        assert [line for line in lines.values() if not line.endswith(".")] == []


def test_the_readme_lists_every_verb() -> None:
    listed = [span.split()[1] for span in PAGES[0].spans if span.startswith("laconic ")]
    assert set(listed) == set(VERBS)
