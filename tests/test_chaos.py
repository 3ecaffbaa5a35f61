"""A short run of scripts/chaos: kills, full disks, overwritten runs and killed exports end as if nothing had happened."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHAOS = Path(__file__).resolve().parents[1] / "scripts" / "chaos"


@pytest.mark.slow
def test_disturbed_runs_end_as_unbroken_ones() -> None:
    cases = ["ViT", "ViT, accumulate 4", "ViT, TMPDIR elsewhere", "LoRA"]
    done = subprocess.run([sys.executable, str(CHAOS), "--kills", "6", "--cases", *cases], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "as unbroken: 10 of 10" in done.stdout
