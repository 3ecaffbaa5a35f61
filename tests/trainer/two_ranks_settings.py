"""What two processes do for test_strategy_settings. Not a test itself; two_ranks.py starts them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any
from unittest import mock

from laconic.trainer.callbacks.guards import NotANumber
from laconic.trainer.distributed import collective
from laconic.trainer.errors import RecipeError
from laconic.trainer.measure.calibration import Calibration
from laconic.trainer.measure.step_time import calibration_of
from laconic.trainer.recipe.files import load
from laconic.trainer.run import silent, train, train_arm
from laconic.trainer.run_folder import RunFolder
from laconic.trainer.tasks.base_language_model import LanguageModelModule
from tests.data.texts import jsonl, small_tokenizer
from tests.trainer.conftest import QUICK
from tests.trainer.small_recipes import small
from tests.trainer.two_ranks_strategies import PARTITION, STRATEGIES, TWO, broken, trained

FURTHER = {
    "deepspeed_1": ["trainer.strategy=deepspeed_1"],
    "deepspeed_2_offload": ["trainer.strategy=deepspeed_2", "trainer.offload=optimizer"],
    "deepspeed_3_offload": ["trainer.strategy=deepspeed_3", "trainer.offload=all", PARTITION],
}
NAN = [*TWO, "optimizer.lr=1e30", "trainer.clip=0", "trainer.max_steps=30"]
DROPOUT = "model.config.hidden_dropout_prob=0.1"
LEARNED = ["compression.stages.0.scorer=learned", "compression.stages.0.layer=1", "compression.stages.0.selector=gumbel",
           "budget.noise=1", "budget.target=0.8", "budget.regularizer=macs_squared"]  # fmt: skip
# What is drawn, scheduled or controlled goes on where a run was stopped, on every rank.
MOVING = {
    "dropout_plain": ["trainer.strategy=plain", DROPOUT],
    "dropout_deepspeed_3": ["trainer.strategy=deepspeed_3", DROPOUT, PARTITION],
    "controlled_plain": ["trainer.strategy=plain", *LEARNED, "budget.schedule=linear", "budget.schedule_until=1"],
    "controlled_deepspeed_3": ["trainer.strategy=deepspeed_3", *LEARNED, "budget.controller=nupi", "budget.noise_until=1", PARTITION],
}
SETTINGS = {
    "accumulate": ["trainer.strategy=deepspeed_2", "trainer.accumulate=2", "trainer.max_steps=3"],
    "bf16_2": ["trainer.strategy=deepspeed_2", "trainer.precision=bf16", "trainer.gradient_checkpointing=true"],
    "bf16_3": ["trainer.strategy=deepspeed_3", "trainer.precision=bf16", PARTITION],
    "checkpointing_3": ["trainer.strategy=deepspeed_3", "trainer.gradient_checkpointing=true", PARTITION],
    "learned_3": ["trainer.strategy=deepspeed_3", *LEARNED, PARTITION],
    "learned_plain": ["trainer.strategy=plain", *LEARNED],
}  # fmt: skip
# Pretraining with masks: the masks are the same on any number of ranks, and positions are frozen parameters.
MASKED = ["compression.restore.layer=2", "model.config.decoder_hidden_size=8", "model.config.decoder_num_hidden_layers=1"]
# Selectors and budgets that count over processes in training, in steps that one process measures while the other waits.
ALONE = {
    "gumbel": [*LEARNED, "trainer.bench_rounds=1"],
    "threshold": ["compression.stages.0.selector=threshold", "trainer.bench_rounds=1"],
    "predictor": ["compression.stages.0.selector=predictor", "trainer.bench_rounds=1"],
}
# Few tokens, and routers that let hardly any through: in some step a layer of some rank has none.
TEXT = ["trainer.max_steps=4", "trainer.log_every=1", "trainer.bench_rounds=0", "baselines=[]", "model.config.vocab_size=300",
        "model.config.hidden_size=32", "model.config.intermediate_size=48", "model.config.num_hidden_layers=3",
        "data.sequence_length=16", "data.train_samples=2", "data.eval_samples=1", "budget.target=0.8", "budget.regularizer=macs_squared",
        "compression.stages=[{layer: 1, site: around, scorer: {name: linear, bias: -1.6}, "
        "selector: {name: threshold, calibrate: false}, protect: {first: 0}}]"]  # fmt: skip
TWO_TEXT = [*TEXT, "trainer.devices=2", "data.batch_size=2"]
LANGUAGE = ("deepspeed_1", "deepspeed_2", "deepspeed_3")
# Answers of very different lengths, in two batches a step.
UNEVEN = [item for item in TEXT if not item.startswith(("data.", "budget.", "compression.", "model.config.vocab_size"))]
UNEVEN += ["data.name=json", "data.sequence_length=64", "model.config.vocab_size=320"]
TWO_UNEVEN = [*UNEVEN, "trainer.devices=2", "data.batch_size=1", "trainer.accumulate=2"]
ACCUMULATED = ("plain", "deepspeed_1", "deepspeed_2", "deepspeed_3")
# The model teaches itself, with another keep in each step; parts have their own rates, and chats of a process share rows.
TEACHING = [*small("vlm_digits_base", Path(), QUICK), "baselines=[]", "trainer.max_steps=4", "trainer.log_every=1", "data.eval_samples=2",
            "compression.method=learned", "training_keep={lowest: 0.2, full: 0.3}", "distillation={teacher: self, weight: 0.5, hidden: 0.3}",
            "optimizer.part_lr={vision: 0, projector: 1.0e-3}"]  # fmt: skip
TAUGHT = ("deepspeed_1", "deepspeed_2")
# Bags of two tokens in steps 0 to 4, of which the resumed run does the last.
PHASED = [*(item for item in TEXT if not item.startswith(("budget.", "compression.", "trainer.max_steps", "data.train_samples"))),
          "data.train_samples=6", "trainer.max_steps=6", "phases=[{share: 0.84, superposition: 2}, {}]"]  # fmt: skip


def settings(folder: Path) -> dict[str, Any]:
    """Every run of the tests, into folders of this one; called by both processes."""
    results: dict[str, Any] = {}
    for name, overrides in FURTHER.items():
        results[name] = broken(folder / name, "model", trained, [*TWO, "trainer.checkpoint_every=4", *overrides])
    for name, overrides in SETTINGS.items():
        results[name] = trained(folder / name, [*TWO, *overrides])
    for name in STRATEGIES:
        results[f"masked_{name}"] = trained(folder / f"masked_{name}", [*TWO, *MASKED, *STRATEGIES[name]], recipe="mae_digits")
    for name, overrides in MOVING.items():
        broken(folder / name, "model", trained, [*TWO, "trainer.checkpoint_every=4", *overrides])
    for name in LANGUAGE:
        overrides = [*TWO_TEXT, *{**STRATEGIES, **FURTHER}[name]]
        results[f"text_{name}"] = collective.gather(_routed(folder / f"text_{name}", overrides))
    if collective.rank() == 0:
        uneven_files(folder / "uneven")
    collective.wait()
    for name in ACCUMULATED:
        overrides = [*TWO_UNEVEN, *uneven(folder / "uneven"), *{**STRATEGIES, **FURTHER}[name]]
        trained(folder / f"uneven_{name}", overrides, recipe="llm_pretrain_dense")
    for name in TAUGHT:
        overrides = [*TEACHING, "trainer.devices=2", "data.batch_size=4", "data.packing=true", *{**STRATEGIES, **FURTHER}[name]]
        trained(folder / f"taught_{name}", overrides, recipe="vlm_digits_base")
    for name in STRATEGIES:
        given = [*PHASED, "trainer.devices=2", "data.batch_size=2", "trainer.checkpoint_every=4", *STRATEGIES[name]]
        broken(folder / f"phased_{name}", "model", functools.partial(trained, recipe="llm_pretrain_dense"), given)
    for name, overrides in ALONE.items():
        results[f"alone_{name}"] = collective.gather(_alone(folder / f"alone_{name}", [*TWO, "trainer.strategy=plain", *overrides]))
    results["calibrated"] = collective.gather(_calibrated(folder / "calibrated"))
    for name in STRATEGIES:
        results[f"nan_{name}"] = collective.gather(_nan([*NAN, *STRATEGIES[name]], folder / f"nan_{name}"))
    return results


def uneven_files(folder: Path) -> None:
    """Writes prompts with answers of very different lengths, and a tokenizer."""
    folder.mkdir()
    rows = [{"prompt": f"Count to {index % 9}: ", "completion": "one two " * (1 + 5 * (index % 9 == 0))} for index in range(60)]
    jsonl(folder / "rows.jsonl", rows)
    small_tokenizer().save_pretrained(folder / "tokenizer")


def uneven(folder: Path) -> list[str]:
    """Overrides for these files."""
    return [f"data.data_files={folder / 'rows.jsonl'}", f"data.tokenizer={folder / 'tokenizer'}"]


def _routed(folder: Path, overrides: list[str]) -> list[int]:
    """Tokens that the routed layer processed on this rank, step by step."""
    counts, losses = [], LanguageModelModule.losses

    def counted(module: LanguageModelModule, batch: dict[str, Any]) -> dict[str, Any]:
        found = losses(module, batch)
        counts.append(found["trace"].routings["around_1"].counts()[0])
        return found

    LanguageModelModule.losses = counted  # type: ignore[method-assign]
    try:
        trained(folder, overrides, recipe="llm_pretrain")
    finally:
        LanguageModelModule.losses = losses  # type: ignore[method-assign]
    return counts


def _alone(folder: Path, overrides: list[str]) -> list[Any]:
    """What this process says of steps that the first measures by itself: before a training for a requested time, and behind one."""
    (folder / "before").mkdir(parents=True, exist_ok=True)
    given = [*overrides, f"output={folder / 'run'}"]
    timed = load("vit_digits", [*given, "budget.measure=step_time", "budget.target=0.9"]).recipe
    try:
        found, _ = calibration_of(timed, RunFolder(folder / "before"), None, silent(), resumed=False)
        before = str(found)
    except RecipeError as error:
        # A step of so small a model may take as long as a dense one.
        before = str(error)
    return [before, train(load("vit_digits", given), given, silent()).step_time["dense"]]


def _calibrated(folder: Path) -> dict[str, Any]:
    """The calibration of this rank, where the first measures what no other would."""
    folder.mkdir(exist_ok=True)
    measured = Calibration(0.6, ((0.2, 0.3 + 0.1 * collective.rank()), (1.0, 1.0)), 0.5, 3, f"rank {collective.rank()}")
    recipe = load("vit_digits", [*TWO, "budget.measure=step_time", "budget.target=0.6"]).recipe
    with mock.patch("laconic.trainer.measure.step_time.calibrate", return_value=measured):
        found, _ = calibration_of(recipe, RunFolder(folder), None, silent(), resumed=False)
    again, _ = calibration_of(recipe, RunFolder(folder), None, silent(), resumed=True)
    assert found is not None
    assert again == found
    return found.to_dict()


def _nan(overrides: list[str], folder: Path) -> str:
    try:
        train_arm(load("vit_digits", overrides), "arm", folder, silent())
    except NotANumber as error:
        return str(error)
    return "trained on"
