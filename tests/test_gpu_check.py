"""``scripts/gpu_check`` without a GPU: every part runs at tiny sizes, its models can be built at real ones, and a second run goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from laconic.trainer.measure import bench
from tests.loaded_script import SCRIPTS, loaded_script

sys.path.insert(0, str(SCRIPTS))
from gpu_checks import measuring, models, part, running

sys.path.remove(str(SCRIPTS))

# Process groups and other test runs belong into processes of their own.
APART = ("parts_equal_the_cpu", "deepspeed_zero_2", "deepspeed_zero_3")
OFTEN = ("llm_16k", "adaptive_packing", "decoding")


script = loaded_script("gpu_check")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in script.PARTS if name not in APART]
)
def test_a_part_runs_at_tiny_sizes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "WARM_UP_ROUNDS", 0)
    assert script.main(["--rehearse", "--only", name, "--to", str(tmp_path)]) == 0
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["rehearsal"]
    assert found["passed"]
    assert "skipped" not in found


@pytest.mark.slow
def test_parts_with_processes_of_their_own_run_at_tiny_sizes() -> None:
    command = [sys.executable, str(SCRIPTS / "gpu_check"), "--rehearse", "--only", *APART]
    done = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPTS.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not any("skipped" in found for found in json.loads(done.stdout)["checks"].values())


@pytest.mark.parametrize("name", [name for name, size in part.REAL.items() if "depth" in size])
def test_models_of_real_sizes_can_be_built(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "DEVICE", "meta")
    size = {**part.REAL[name], "depth": min(part.REAL[name]["depth"], 4)}
    if "vocab" in size:
        model: Any = models.llm(size, compressed=True)
        assert all(parameter.dtype == torch.bfloat16 for name, parameter in model.named_parameters() if "stages" not in name)
    else:
        model = models.vit(size, models.vit_stages(size["depth"]))
        models.vit(size, models.merged_in_every_layer(size))
    assert len(list(model.parameters())) > 20


def test_a_second_run_goes_on_with_the_parts_that_have_not_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Collecting garbage takes long among the objects of other tests.
    monkeypatch.setattr(running, "release", lambda: None)
    ran: list[str] = []

    def passing(setting: part.Setting) -> dict[str, Any]:
        ran.append("passing")
        return {"ms": 1.0}

    def failing(setting: part.Setting) -> dict[str, Any]:
        ran.append("failing")
        raise ValueError("no such kernel")

    def missing(setting: part.Setting) -> dict[str, Any]:
        ran.append("missing")
        raise part.NotHereError("a package is not installed")

    parts = {function.__name__: function for function in (passing, failing, missing)}

    def run(rehearsal: bool = True, again: bool = False) -> dict[str, Any]:
        ran.clear()
        return running.run_parts(parts, 2, rehearsal, 60.0, tmp_path / "found", again)

    first = run()
    assert ran == ["passing", "failing", "missing"]
    assert first["failing"]["error"] == "ValueError: no such kernel"
    assert first["missing"]["skipped"] == "a package is not installed"
    assert run()["passing"]["ms"] == 1.0
    assert ran == ["failing", "missing"]
    run(again=True)
    assert len(ran) == 3
    (tmp_path / "found" / "passing.json").write_text('{"passed": tr')
    run()
    assert len(ran) == 3
    # What was rehearsed is not what was measured.
    run(rehearsal=False)
    assert len(ran) == 3


def test_a_part_without_time_ends_its_rounds_early_and_says_so() -> None:
    setting = part.Setting({}, 30, ends=0.0)
    times = measuring.timed(setting, {"nothing": lambda: None})
    assert measuring.rounds_of(setting, len(times["nothing"])) == {"rounds": 8, "stopped_early": "30 rounds were requested"}
    assert measuring.rounds_of(setting, 30) == {"rounds": 30}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--only", "llm_step"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
