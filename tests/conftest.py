"""Shared by all tests: one thread a worker, tiny random models, no network."""

from __future__ import annotations

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
# Tokenizers are kept under a digest of what they were trained on.
os.environ["LACONIC_CACHE"] = os.path.join(tempfile.gettempdir(), "laconic-tests")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(autouse=True)
def _steady() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
