"""Strategies with everything that a recipe can set beside them, on two processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from laconic.modules.backbones.vit_mae import sine_positions
from laconic.trainer.distributed.resume import MARKER
from laconic.trainer.recipe.files import load
from laconic.trainer.run import train_arm
from tests.trainer.test_strategies import ENVIRONMENT, check_learned_alike, check_resumed_alike, results_of, scalars, weights
from tests.trainer.two_ranks_settings import (
    ACCUMULATED,
    ALONE,
    FURTHER,
    LANGUAGE,
    MASKED,
    MOVING,
    PHASED,
    SETTINGS,
    TAUGHT,
    TEACHING,
    TEXT,
    UNEVEN,
    uneven,
    uneven_files,
)
from tests.trainer.two_ranks_strategies import SHARED

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two_ranks(two_processes: Path) -> Path:
    """Folder of what two processes did."""
    return two_processes / "settings"


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs on one process, at the same global batch."""
    folder = tmp_path_factory.mktemp("one")
    torch.set_num_threads(1)
    plain = [*SHARED, "data.batch_size=16"]
    for name in (None, "accumulate", "bf16_2", "learned_plain"):
        settings = [item for item in SETTINGS.get(name or "", []) if not item.startswith("trainer.strategy")]
        train_arm(load("vit_digits", [*plain, *settings]), "arm", folder / (name or "run"), Console(quiet=True))
    train_arm(load("llm_pretrain", [*TEXT, "data.batch_size=4"]), "arm", folder / "text", Console(quiet=True))
    train_arm(load("mae_digits", [*plain, *MASKED]), "arm", folder / "masked", Console(quiet=True))
    uneven_files(folder / "uneven")
    whole = load("llm_pretrain_dense", [*UNEVEN, *uneven(folder / "uneven"), "data.batch_size=4"])
    train_arm(whole, "arm", folder / "whole", Console(quiet=True))
    train_arm(load("vlm_digits_base", [*TEACHING, "data.batch_size=8"]), "arm", folder / "taught", Console(quiet=True))
    train_arm(load("llm_pretrain_dense", [*PHASED, "data.batch_size=4"]), "arm", folder / "phased", Console(quiet=True))
    return folder


@pytest.mark.parametrize("name", list(FURTHER))
def test_further_strategies_learn_and_resume_like_the_others(name: str, two_ranks: Path, one_process: Path) -> None:
    check_learned_alike(two_ranks / name, one_process / "run")
    check_resumed_alike(two_ranks / name)


@pytest.mark.parametrize("name", ["plain", "deepspeed_2", "deepspeed_3"])
def test_masks_of_pretraining_are_the_same_on_two_processes(name: str, two_ranks: Path, one_process: Path) -> None:
    ours, expected = scalars(two_ranks / f"masked_{name}"), scalars(one_process / "masked")
    assert max(abs(a - b) for a, b in zip(ours, expected, strict=True)) < 1e-5
    torch.testing.assert_close(weights(two_ranks / f"masked_{name}"), weights(one_process / "masked"), rtol=0, atol=2e-4)
    positions = weights(two_ranks / f"masked_{name}")["decoder.decoder_pos_embed"]
    assert positions.any()
    # Frozen: nothing has moved them.
    assert torch.equal(positions[0], sine_positions(8, 8))


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_rank_whose_layer_processes_no_token_learns_with_the_others(name: str, two_ranks: Path, one_process: Path) -> None:
    counts = results_of(two_ranks)[f"text_{name}"]
    assert isinstance(counts, list)
    # While one rank has none in a step, the other has some.
    assert any(sum(step) > 0 and min(step) == 0 for step in zip(*counts, strict=True)), counts
    ours, expected = scalars(two_ranks / f"text_{name}"), scalars(one_process / "text")
    difference = max(abs(a - b) for a, b in zip(ours, expected, strict=True))
    print(f"text_{name}: losses of {len(ours)} steps differ by at most {difference:.1e}")
    assert difference < 1e-5
    tag = "around_1/keep_achieved"
    assert scalars(two_ranks / f"text_{name}", tag) == pytest.approx(scalars(one_process / "text", tag), abs=1e-6)


@pytest.mark.parametrize("name", ACCUMULATED)
def test_two_batches_of_two_processes_weigh_their_tokens_as_one_batch_does(name: str, two_ranks: Path, one_process: Path) -> None:
    assert scalars(two_ranks / f"uneven_{name}") == pytest.approx(scalars(one_process / "whole"), abs=1e-5)
    torch.testing.assert_close(weights(two_ranks / f"uneven_{name}"), weights(one_process / "whole"), rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", TAUGHT)
def test_a_model_that_teaches_itself_with_drawn_keeps_and_rates_by_part_learns_as_on_one_process(
    name: str, two_ranks: Path, one_process: Path
) -> None:
    ours, expected = two_ranks / f"taught_{name}", one_process / "taught"
    assert scalars(ours) == pytest.approx(scalars(expected), abs=1e-5)
    tag = "projector.before_0/keep_achieved"
    assert len(set(scalars(expected, tag))) > 1
    assert scalars(ours, tag) == pytest.approx(scalars(expected, tag), abs=1e-6)
    torch.testing.assert_close(weights(ours), weights(expected), rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", list(MOVING))
def test_dropout_schedules_and_controllers_of_every_rank_go_on_where_they_were(name: str, two_ranks: Path) -> None:
    unbroken, resumed = weights(two_ranks / name, "unbroken"), weights(two_ranks / name)
    assert all(torch.equal(value, resumed[key]) for key, value in unbroken.items())


@pytest.mark.parametrize("name", ["plain", "deepspeed_2", "deepspeed_3"])
def test_phases_learn_as_on_one_process_and_resume_over_their_border(name: str, two_ranks: Path, one_process: Path) -> None:
    assert scalars(two_ranks / f"phased_{name}")[:6] == pytest.approx(scalars(one_process / "phased"), abs=1e-5)
    check_resumed_alike(two_ranks / f"phased_{name}")


@pytest.mark.parametrize("name", ALONE)
def test_the_first_process_measures_steps_while_the_other_waits(name: str, two_ranks: Path) -> None:
    first, second = results_of(two_ranks)[f"alone_{name}"]
    # The second has measured nothing: it has the calibration, or its refusal, from the first.
    assert first[0] == second[0]
    assert first[1] > 0
    assert second[1] is None


def test_both_processes_take_the_step_time_that_the_first_measured(two_ranks: Path) -> None:
    first, second = results_of(two_ranks)["calibrated"]
    assert first == second
    assert first["device"] == "rank 0"


@pytest.mark.parametrize(
    ("name", "reference", "tolerance"),
    [
        ("accumulate", "accumulate", 1e-5),
        ("checkpointing_3", "run", 1e-5),
        ("learned_plain", "learned_plain", 1e-5),
        ("learned_3", "learned_plain", 1e-5),
        # Sums in bf16 depend on how rows are split.
        ("bf16_2", "bf16_2", 5e-3),
        ("bf16_3", "bf16_2", 5e-3),
    ],
)
def test_settings_mean_the_same_under_every_strategy(
    name: str, reference: str, tolerance: float, two_ranks: Path, one_process: Path
) -> None:
    ours, expected = scalars(two_ranks / name), scalars(one_process / reference)
    difference = max(abs(a - b) for a, b in zip(ours, expected, strict=True))
    print(f"{name}: losses of {len(ours)} steps differ by at most {difference:.1e}")
    assert difference < tolerance
    assert {value.dtype for value in weights(two_ranks / name).values()} == {torch.float32}
    if name.startswith("learned"):
        for value in ("regularizer", "gap/macs_ratio", "multiplier/macs_ratio"):
            found = [scalars(run, f"budget/{value}") for run in (two_ranks / name, one_process / reference)]
            assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_gradients_are_as_large_under_deepspeed_with_accumulation(two_ranks: Path, one_process: Path) -> None:
    # Adam hides a wrong scale from the losses; clipping and its epsilon do not hide it from the weights.
    torch.testing.assert_close(weights(two_ranks / "accumulate"), weights(one_process / "accumulate"), rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", ["plain", "deepspeed_2", "deepspeed_3"])
def test_all_ranks_stop_together_at_a_gradient_that_is_not_finite(name: str, two_ranks: Path) -> None:
    messages = results_of(two_ranks)[f"nan_{name}"]
    assert isinstance(messages, list)
    assert len(messages) == 2
    assert all(message.startswith("the gradient is not finite at step 1:") for message in messages)


def test_the_command_starts_its_processes_stops_all_at_sigterm_and_resumes(tmp_path: Path, quick: list[str]) -> None:
    overrides = [*quick, "baselines=[vit_digits_dense]", "trainer.max_steps=12", "trainer.strategy=deepspeed_2", "trainer.devices=2"]
    command = [sys.executable, "-m", "laconic", "train", "vit_digits", *overrides]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)
    assert process.stdout is not None
    for line in process.stdout:
        if "evidence  step 3/" in line:
            break
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    assert process.wait(timeout=60) == 143, rest
    assert rest.count("--resume auto") == 1
    (stopped,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert json.loads((stopped / MARKER).read_text())["world_size"] == 2
    (tmp_path / "run" / "checkpoints" / "1000.ckpt").mkdir()
    done = subprocess.run([*command, "--resume", "auto", "--json"], capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "run" / "report.json").read_text())
    assert "passed over: " in done.stderr
    assert "1000.ckpt is not complete" in done.stderr
    assert done.stderr.count("step 12/12") == 1
    assert "evidence  step 3/" not in done.stderr
