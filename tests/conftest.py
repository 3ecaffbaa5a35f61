"""Shared by all tests: one thread a worker, tiny random models, no network."""

from __future__ import annotations

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
