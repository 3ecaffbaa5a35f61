"""What two processes do for test_recipes_ranks. Not a test itself; two_ranks.py starts them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from laconic.trainer.recipe.files import load, shipped
from laconic.trainer.run import silent, train_arm
from tests.trainer.conftest import QUICK
from tests.trainer.small_recipes import CONTROLS, small
from tests.trainer.two_ranks_strategies import PARTITION

NAMES = [name for name in shipped() if name not in CONTROLS]
STRATEGIES = {
    "plain": ["trainer.strategy=plain"],
    "deepspeed_1": ["trainer.strategy=deepspeed_1"],
    "deepspeed_2": ["trainer.strategy=deepspeed_2"],
    "deepspeed_3": ["trainer.strategy=deepspeed_3", PARTITION],
}


def prepare(folder: Path) -> None:
    """Writes what the recipes start from; called by one process, before there are two."""
    overrides = {}
    for name in NAMES:
        (folder / name).mkdir()
        overrides[name] = [item for item in small(name, folder / name, QUICK) if not item.startswith("output=")]
    (folder / "overrides.json").write_text(json.dumps(overrides))


def recipes(folder: Path) -> dict[str, Any]:
    """Two steps of every recipe that is no control arm, under every strategy; called by both processes."""
    overrides = json.loads((folder / "overrides.json").read_text())
    for name in NAMES:
        data = None
        for strategy, settings in STRATEGIES.items():
            given = [*overrides[name], "trainer.devices=2", *settings]
            # Opened and hashed once, as the control arms of a run share their data.
            data = train_arm(load(name, given), "arm", folder / name / strategy, silent(), data).parts.data
    return {}
