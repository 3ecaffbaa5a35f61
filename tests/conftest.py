"""Shared by all tests: one thread a worker, tiny random models, no network."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"
# Tokenizers are kept under a digest of what they were trained on.
os.environ["LACONIC_CACHE"] = os.path.join(tempfile.gettempdir(), "laconic-tests")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests.clean import CleanProcesses

if not torch.cuda.is_available():
    # torch.manual_seed notes a whole traceback for every device that is not there: a tenth of the time of small tests.
    torch.manual_seed = torch.default_generator.manual_seed


@pytest.fixture(autouse=True)
def _steady() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def clean() -> Iterator[CleanProcesses]:
    """Clean Python processes at once."""
    processes = CleanProcesses()
    yield processes
    processes.close()


# Fixtures that take seconds, once for all tests of a module that use them.
DEAR = ("good", "run", "runs", "tokenizer")


def _group(item: pytest.Function) -> str | None:
    """The dear fixture that a test shares with others, for its module or for all."""
    if "two_processes" in item.fixturenames:
        return "two_processes"
    return next((f"{item.module.__name__}.{name}" for name in DEAR if name in item.fixturenames), None)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share a dear fixture go to one process, where it is made once; long tests come first, so that all processes end together."""
    functions = [item for item in items if isinstance(item, pytest.Function)]
    # Clean processes are forked from one that takes ten seconds to start: the groups of all tests that want it are one.
    forked = {_group(item) for item in functions if "clean" in item.fixturenames} - {None}
    for item in functions:
        name = _group(item)
        if "clean" in item.fixturenames or name in forked:
            name = "clean"
        if name is not None:
            item.add_marker(pytest.mark.xdist_group(name))
    items.sort(key=lambda item: "trainer" not in item.path.parts)


def pytest_collection_finish() -> None:
    """What is imported and collected stays until the end, so that no collection of garbage has to walk it."""
    gc.freeze()
