"""Strategies: two processes learn what one does, resume exactly, end together, and say before training what is missing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from laconic.data.loader import EvalBatches
from laconic.trainer.distributed.deepspeed import deepspeed_config
from laconic.trainer.distributed.resume import MARKER, find_checkpoint
from laconic.trainer.distributed.strategies import check, processes_of, resolved
from laconic.trainer.errors import RecipeError
from laconic.trainer.evaluate import evaluate
from laconic.trainer.recipe.files import load
from laconic.trainer.run import train_arm
from laconic.trainer.run_folder import RunFolder
from tests.clean import CleanProcesses
from tests.trainer.two_ranks_strategies import SHARED, STRATEGIES, TWO

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def two_ranks(two_processes: Path) -> Path:
    """Folder of what two processes did under every strategy."""
    return two_processes / "strategies"


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on one process, at the same global batch."""
    folder = tmp_path_factory.mktemp("one")
    torch.set_num_threads(1)
    train_arm(load("vit_digits", [*SHARED, "data.batch_size=16"]), "arm", folder / "run", Console(quiet=True))
    return folder


def scalars(run: Path, tag: str = "train/loss") -> list[float]:
    events = EventAccumulator(str(run / "tensorboard"), purge_orphaned_data=False)
    events.Reload()
    # By step: a resumed run has repeated some, and files written within one second are read in the order of their names.
    values = {event.step: event.value for event in events.Scalars(tag)}
    return [values[step] for step in sorted(values)]


def weights(run: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run / name / "model.safetensors")


def results_of(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "results.json").read_text())
    return found


def check_learned_alike(ours: Path, expected: Path) -> None:
    """Losses, decisions and weights of two processes are those of one."""
    differences = [abs(a - b) for a, b in zip(scalars(ours), scalars(expected), strict=True)]
    print(f"{ours.name}: losses of {len(differences)} steps differ by at most {max(differences):.1e}")
    assert max(differences) < 1e-5
    assert scalars(ours, "before_0/keep_achieved") == scalars(expected, "before_0/keep_achieved")
    torch.testing.assert_close(weights(ours, "unbroken"), weights(expected), rtol=0, atol=2e-4)


def check_resumed_alike(run: Path) -> None:
    """The resumed run has one checkpoint and the weights of the unbroken one, bit for bit."""
    assert [path.name for path in (run / "checkpoints").glob("*.ckpt")] == ["6.ckpt"]
    unbroken, resumed = weights(run, "unbroken"), weights(run)
    assert unbroken.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[key]) for key, value in unbroken.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", list(STRATEGIES))
def test_two_processes_learn_what_one_does_at_the_same_global_batch(name: str, two_ranks: Path, one_process: Path) -> None:
    check_learned_alike(two_ranks / name, one_process / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(STRATEGIES))
def test_a_resumed_run_ends_bit_for_bit_like_an_unbroken_one_on_two_processes(name: str, two_ranks: Path) -> None:
    check_resumed_alike(two_ranks / name)


@pytest.mark.slow
def test_rows_are_counted_once_whatever_the_number_of_processes(two_ranks: Path, one_process: Path, console: Console) -> None:
    results = results_of(two_ranks)
    for name in STRATEGIES:
        target = str(two_ranks / name)
        alone = evaluate(target, RunFolder.open(target).read_recipe(), console)["variants"]["compressed"]
        assert results[name]["quality"] == alone["accuracy"]  # type: ignore[index]
        assert results[name]["keep"] == alone["keep"]  # type: ignore[index]


@pytest.mark.slow
def test_a_model_built_in_shards_has_the_weights_of_a_plain_one(two_ranks: Path) -> None:
    assert results_of(two_ranks)["same_first_weights"] is True


@pytest.mark.slow
def test_one_process_under_zero_3_learns_what_a_plain_one_does(tmp_path: Path, clean: CleanProcesses) -> None:
    for name, strategy in (("plain", "plain"), ("zero", "deepspeed_3")):
        folder = f"output={tmp_path / name}"
        done = clean.module("laconic", ["train", "vit_digits", *SHARED, f"trainer.strategy={strategy}", folder])
        assert done.returncode == 0, done.stderr
    # The gradient of a key's bias is rounding, and Adam makes steps of it.
    torch.testing.assert_close(weights(tmp_path / "zero"), weights(tmp_path / "plain"), rtol=0, atol=2e-4)
    assert scalars(tmp_path / "zero") == pytest.approx(scalars(tmp_path / "plain"), abs=1e-5)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 8, 9, 17])
def test_evaluation_splits_rows_without_duplicates_into_as_many_batches_on_each_rank(length: int, world_size: int) -> None:
    ranks = [EvalBatches(length, 4, rank, world_size) for rank in range(world_size)]
    batches = [list(batches) for batches in ranks]
    assert {len(item) for item in batches} == {len(ranks[0])}
    counted = [row for sampler, item in zip(ranks, batches, strict=True) for batch in item[: sampler.counted] for row in batch]
    assert sorted(counted) == list(range(length))


@pytest.mark.slow
def test_another_number_of_processes_and_incomplete_folders_are_refused(two_ranks: Path, tmp_path: Path, console: Console) -> None:
    run = two_ranks / "deepspeed_2"
    alone = load("vit_digits", [*SHARED, "trainer.strategy=deepspeed_2", "trainer.checkpoint_every=4"])
    with pytest.raises(RecipeError, match=r"cannot resume .*: it was trained by 2 process\(es\), now there are 1; set trainer.devices"):
        train_arm(alone, "arm", run, console, resume="auto")
    folder = tmp_path / "checkpoints" / "2.ckpt"
    (folder / "checkpoint").mkdir(parents=True)
    with pytest.raises(RecipeError, match=f"2.ckpt is not complete, it has no {MARKER}"):
        find_checkpoint(RunFolder(tmp_path), str(folder))
    (folder / MARKER).write_text("{}")
    with pytest.raises(RecipeError, match=f"{MARKER} is damaged"):
        find_checkpoint(RunFolder(tmp_path), "auto")
    (folder / MARKER).write_text('{"files": {}}')
    assert find_checkpoint(RunFolder(tmp_path), "auto") == (folder, [])


REFUSED = [
    (["trainer.strategy=deepspeed_4"], r"trainer.strategy = 'deepspeed_4': input should be 'auto', 'plain', 'deepspeed_1'"),
    (["trainer.devices=0"], r"trainer.devices.* greater than or equal to 1"),
    (["trainer.offload=optimizer"], r"trainer.offload = 'optimizer' needs DeepSpeed: set trainer.strategy=deepspeed_2"),
    (
        ["trainer.strategy=deepspeed_2", "trainer.offload=all"],
        r"trainer.offload = 'all' keeps parameters .*set trainer.strategy=deepspeed_3",
    ),
    (["trainer.deepspeed={}"], r"trainer.deepspeed is set but trainer.strategy is plain"),
    (["trainer.strategy=deepspeed_3", "trainer.compile=true"], r"trainer.compile = true is not supported with deepspeed_3"),
    (["trainer.num_nodes=2"], r"trainer.num_nodes = 2: MASTER_ADDR, MASTER_PORT, NODE_RANK is not set"),
    (["trainer.strategy=deepspeed_1", "trainer.deepspeed=none.json"], r"trainer.deepspeed = 'none.json' does not exist"),
    *(
        (["trainer.strategy=deepspeed_1", f"trainer.deepspeed={{{given}}}"], message)
        for given, message in (
            ("train_batch_size: 4", r"sets train_batch_size, which the recipe sets: set data.batch_size"),
            ("train_micro_batch_size_per_gpu: 4", r"sets train_micro_batch_size_per_gpu, .*set data.batch_size"),
            ("gradient_accumulation_steps: 4", r"sets gradient_accumulation_steps, .*set trainer.accumulate instead"),
            ("gradient_clipping: 1", r"sets gradient_clipping, .*set trainer.clip instead"),
            ("bf16: {enabled: true}", r"sets bf16, .*set trainer.precision instead"),
            ("optimizer: {type: Adam}", r"sets optimizer, .*set the optimizer block instead"),
            ("scheduler: {type: WarmupLR}", r"sets scheduler, .*set optimizer.schedule, optimizer.warmup"),
            (
                "zero_optimization: {stage: 3}",
                r"sets zero_optimization.stage = 3, and trainer.strategy is deepspeed_1: remove the stage",
            ),
            ("zero_optimization: {overlap_com: true}", r"zero_optimization.overlap_com is not a key of DeepSpeed"),
            ("zero_optimization: {reduce_bucket_size: -1}", r"zero_optimization: .*reduce_bucket_size"),
        )
    ),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=[" ".join(item) for item, _ in REFUSED])
def test_what_does_not_go_together_is_named_with_its_cure(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check(load("vit_digits", overrides).recipe)


def test_a_lock_of_a_killed_build_is_named_instead_of_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    recipe = load("vit_digits", ["trainer.strategy=deepspeed_2"]).recipe
    check(recipe)
    os.utime(lock, (0, 0))
    with pytest.raises(RecipeError, match=r"deepspeed_shm_comm/lock is .* minutes old: .* delete the file"):
        check(recipe)


def test_a_missing_compiler_is_named_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load("vit_digits", ["trainer.strategy=deepspeed_2"]).recipe
    monkeypatch.setattr("laconic.trainer.distributed.strategies.torch.cuda.is_available", lambda: False)
    check(recipe)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RecipeError, match=r"DeepSpeed compiles an extension on a CPU, and no-such-compiler cannot be found: install"):
        check(recipe)


def test_more_devices_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("laconic.trainer.distributed.strategies.torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("laconic.trainer.distributed.strategies.torch.cuda.device_count", lambda: 2)
    with pytest.raises(RecipeError, match=r"trainer.devices = 4, and this machine has 2 CUDA devices"):
        check(load("vit_digits", ["trainer.devices=4"]).recipe)
    assert processes_of(load("vit_digits", ["trainer.devices=auto", "trainer.num_nodes=3"]).recipe.trainer) == 6


TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
SLURM = {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "2", "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "train"}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (TORCHRUN, r"torchrun started 4 processes, 2 on this machine, and the recipe asks for trainer.devices = 2 × trainer.num_nodes = 1"),
        (SLURM, r"SLURM starts 4 processes on 2 nodes, .*give trainer.devices=2 trainer.num_nodes=2"),
    ],
    ids=["torchrun", "slurm"],
)
def test_torchrun_and_slurm_must_start_what_the_recipe_asks_for(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=message):
        check(load("vit_digits", ["trainer.devices=2"]).recipe)
    fitting = load("vit_digits", ["trainer.devices=auto", "trainer.num_nodes=2"]).recipe
    check(fitting)
    assert resolved(fitting).trainer.strategy == "deepspeed_2"
    assert processes_of(fitting.trainer) == 4


def test_a_users_file_is_laid_over_laconics_own_configuration(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"wall_clock_breakdown": True, "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}}))
    recipe = resolved(load("vit_digits", [*TWO, f"trainer.deepspeed={path}", "trainer.offload=optimizer"]).recipe)
    config = deepspeed_config(recipe.trainer, recipe.data.batch_size)
    assert config["wall_clock_breakdown"] is True
    assert config["zero_optimization"]["reduce_bucket_size"] == 1000
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    path.write_text("{")
    with pytest.raises(RecipeError, match="is not JSON"):
        check(recipe)
