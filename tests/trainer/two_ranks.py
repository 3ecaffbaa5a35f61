"""All that tests do on two processes, in one launch: torchrun … two_ranks.py FOLDER PART…. Not a test itself.

One launch imports, finds the other process and compiles DeepSpeed's own code once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from laconic.trainer.distributed import collective
from laconic.trainer.distributed.processes import join, leave
from laconic.trainer.run import quiet
from tests.trainer.two_ranks_lora import bases, lora
from tests.trainer.two_ranks_recipes import prepare, recipes
from tests.trainer.two_ranks_settings import settings
from tests.trainer.two_ranks_strategies import strategies

ROOT = Path(__file__).resolve().parents[2]
# Each part has a folder of its name, with results.json in it.
PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {"strategies": strategies, "settings": settings, "lora": lora, "recipes": recipes}
# What one process does for a part before there are two.
BEFORE: dict[str, Callable[[Path], None]] = {"lora": bases, "recipes": prepare}


def launch(folder: Path, parts: Sequence[str]) -> None:
    """Starts two processes under torchrun and waits until they have done these parts."""
    for part in parts:
        (folder / part).mkdir()
        if part in BEFORE:
            BEFORE[part](folder / part)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, str(folder), *parts]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]


def main(folder: Path, parts: Sequence[str]) -> None:
    """What each of the two processes does."""
    quiet()
    join(2, 1, True)
    for part in parts:
        results = PARTS[part](folder / part)
        if collective.rank() == 0:
            (folder / part / "results.json").write_text(json.dumps(results))
        collective.wait()
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
