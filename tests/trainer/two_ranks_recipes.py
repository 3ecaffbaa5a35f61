"""What two processes do for test_recipes_ranks. Not a test itself; two_ranks.py starts them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

from laconic.trainer.distributed import collective
from laconic.trainer.losses.answer_loss import answer_loss
from laconic.trainer.recipe.files import load, shipped
from laconic.trainer.run import silent, train_arm
from tests.matrix.processors import save
from tests.trainer.conftest import QUICK
from tests.trainer.small_recipes import CONTROLS, of_family, small

NAMES = [name for name in shipped() if name not in CONTROLS and not name.startswith("smollm2_lora_")]
# A family by the recipe for one's own chats: positions in three axes, and steps in which one process has images and the other none.
FAMILY = "qwen2_5_vl"
# Matrices are sharded; what is smaller stays whole: a recipe takes half as long, and test_lora_ranks and test_strategies shard everything.
_MATRICES = "trainer.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 300}}"
STRATEGIES = {
    "plain": ["trainer.strategy=plain"],
    "deepspeed_1": ["trainer.strategy=deepspeed_1"],
    "deepspeed_2": ["trainer.strategy=deepspeed_2"],
    "deepspeed_3": ["trainer.strategy=deepspeed_3", _MATRICES],
}

# Shortcuts are fitted to whole weights, so not under ZeRO-3; thirty layers take their time.
_LEFT_OUT = {("smollm2_lora", "deepspeed_1"), ("smollm2_lora", "deepspeed_3")}
CASES = [(name, strategy) for name in NAMES for strategy in STRATEGIES if (name, strategy) not in _LEFT_OUT]
OF_FAMILY = ("plain", "deepspeed_2", "deepspeed_3")


def prepare(folder: Path) -> None:
    """Writes what the recipes start from; called by one process, before there are two."""
    overrides = {}
    for name in NAMES:
        (folder / name).mkdir()
        overrides[name] = [item for item in small(name, folder / name, QUICK) if not item.startswith("output=")]
    (folder / FAMILY).mkdir()
    overrides[FAMILY] = [
        *(item for item in of_family(FAMILY, save(FAMILY, folder / FAMILY / "start"), folder / FAMILY) if not item.startswith("output=")),
        "data.batch_size=1",
        "trainer.max_steps=3",
    ]
    (folder / "overrides.json").write_text(json.dumps(overrides))


def recipes(folder: Path) -> dict[str, Any]:
    """Two steps of every recipe that is no control arm, under every strategy; called by both processes.

    Returns:
        By strategy, for each process whether each of its training batches of FAMILY had an image.
    """
    overrides = json.loads((folder / "overrides.json").read_text())
    for name in NAMES:
        data = None
        for strategy in (strategy for case, strategy in CASES if case == name):
            given = [*overrides[name], "trainer.devices=2", *STRATEGIES[strategy]]
            # Opened and hashed once, as the control arms of a run share their data.
            data = train_arm(load(name, given), "arm", folder / name / strategy, silent(), data).parts.data
    return {strategy: _of_family(folder / FAMILY / strategy, overrides[FAMILY], strategy) for strategy in OF_FAMILY}


def _of_family(folder: Path, overrides: list[str], strategy: str) -> list[list[bool]]:
    images = list[bool]()

    def watched(model: Any, batch: dict[str, Any], **options: Any) -> Any:
        images.extend(["pixel_values" in batch] * model.training)
        return answer_loss(model, batch, **options)

    with mock.patch("laconic.trainer.tasks.vision_language.answer_loss", watched):
        train_arm(load("vlm_finetune", [*overrides, "trainer.devices=2", *STRATEGIES[strategy]]), "arm", folder, silent())
    return collective.gather(images)
