"""The paired measurement: its oracle does the same work, and its figures are ratios of what was timed."""

from __future__ import annotations

import io
import itertools

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from laconic import Trace
from laconic.trainer.measure.bench import bench, paired_ratio, sliced
from laconic.trainer.measure.report import Arm, table
from laconic.trainer.measure.shares import shares, static_of
from laconic.trainer.measure.training_step import TrainingStep, Update
from tests.matrix import BACKBONES, METHODS, compressed, dense, images, inputs, labels


@pytest.mark.parametrize("family", BACKBONES)
def test_the_oracle_sees_the_same_token_counts_without_a_router(family: str) -> None:
    random = next(method for method in METHODS if method.name == "random")
    model, trace = compressed(family, random, 0.5, 0.6, attn_implementation="eager"), Trace()
    with torch.no_grad(), FlopCounterMode(display=False) as ours:
        model(**inputs(model, images(1)), trace=trace)
    oracle = sliced(dense(family, attn_implementation="eager"), trace.flow().layer_tokens)
    with torch.no_grad(), FlopCounterMode(display=False) as theirs:
        oracle(**inputs(oracle, images(1)))
    assert theirs.get_total_flops() == ours.get_total_flops()


def test_a_bench_measures_every_arm_against_dense_and_its_own_oracle() -> None:
    def loss(name: str, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(**batch, **({} if name == "dense" else {"trace": Trace()})).loss

    batch = {"pixel_values": images(4), "labels": labels(4)}
    arms = {"half": compressed("vit", METHODS[0], 0.5, 1.0), "tenth": compressed("vit", METHODS[0], 0.1, 1.0)}
    measured = bench(dense("vit"), arms, batch, loss, rounds=3)  # type: ignore[arg-type]
    assert set(measured.arms) == {"half", "tenth"}
    assert measured.memory["tenth"] < measured.memory["half"] < measured.memory["dense"]
    assert measured.memory_kind == "saved_for_backward"
    assert measured.to_dict()["arms"]["half"]["claimed_of_oracle"] == measured.arms["half"].claimed_of_oracle


def test_a_slow_model_is_measured_in_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("laconic.trainer.measure.bench.WARM_UP_ROUNDS", 0)
    monkeypatch.setattr("laconic.trainer.measure.bench._timed", lambda step, device: 1.0)
    model = compressed("vit", METHODS[0], 0.5, 1.0)
    batch = {"pixel_values": images(1), "labels": labels(1)}
    measured = bench(dense("vit"), {"half": model}, batch, lambda name, model, batch: model(**batch).loss, 40, seconds=0)  # type: ignore[arg-type]
    assert measured.rounds == 8


def test_a_measured_step_has_the_clipped_gradient_of_all_its_batches_and_hardly_moves_the_weights() -> None:
    model, whole = dense("vit").double(), dense("vit").double()
    halves = [{"pixel_values": images(4).double()[part], "labels": labels(4)[part]} for part in (slice(0, 2), slice(2, 4))]
    whole(pixel_values=images(4).double(), labels=labels(4)).loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.01)
    assert norm > 0.01
    before = [parameter.clone() for parameter in model.parameters()]
    step = TrainingStep(
        model,
        lambda batch, factor: factor * model(**batch).loss,
        itertools.cycle(halves),
        Update(lambda model: torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.0), clip=0.01, accumulate=2),
    )
    step(1.0)
    for ours, theirs, old in zip(model.parameters(), whole.parameters(), before, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-9, rtol=1e-6)
        assert float((ours - old).detach().abs().max()) < 2e-5
    # The second step has the gradient of its own loss alone: not enough to be clipped.
    step(1e-6)
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert 0 < norm < 0.005
    assert TrainingStep(model, lambda batch: model(**batch).loss, itertools.cycle(halves), Update()).optimizer.defaults["fused"]


@pytest.mark.parametrize(
    ("number", "static", "shown"),
    [
        (0, 0, "–"),
        (0, 3, "3 static"),
        (2, 0, "0.200 0.300"),
        (1, 11, "0.200, 11 static"),
        (5, 7, "min 0.200 mean 0.400 max 0.600, 7 static"),
    ],
)
def test_shares_of_many_stages_are_their_range(number: int, static: int, shown: str) -> None:
    left_out = [f"around_{index}" for index in range(static)]
    assert shares({str(index): 0.2 + 0.1 * index for index in range(number)} | dict.fromkeys(left_out, 0.0), left_out) == shown


def test_a_closed_router_is_no_static_stage() -> None:
    assert shares({"around_3": 0.0, "around_4": 0.0}, static_of({"around_3": 0.5, "around_4": 0.0})) == "0.000, 1 static"


@pytest.mark.parametrize("stages", [1, 12, 30])
def test_the_table_of_a_run_cuts_no_figure_in_a_terminal_of_80_columns(stages: int) -> None:
    keep = {f"around_{index}": 0.5 if index < (6 if stages > 12 else 1) else 0.0 for index in range(stages)}
    measured = {"step_seconds": 12.345, "speedup": 1.23, "of_oracle": 0.987, "memory": 2**30, "macs_ratio_requested": 0.75}
    arm = Arm("smollm2_lora", 12.3456, {"requested": keep, "achieved": keep}, 0.8, 0.8, 1.0, **measured)  # type: ignore[arg-type]
    console = Console(file=io.StringIO(), width=80)
    console.print(table(dict.fromkeys(("dense", "smollm2_lora_uniform", "smollm2_lora"), arm), "perplexity", None))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert not any("…" in line for line in lines)
    for shown in ("12.3456", "0.500", "0.800", "of 0.750", "12345 ms", "1.23×", "98.7", "1024 MiB", *{1: (), 12: ("11 static",), 30: ("mean 0.500", "24 static")}[stages]):  # fmt: skip
        assert any(shown in line for line in lines), shown


def test_a_ratio_is_claimed_by_its_lower_bound() -> None:
    exact = paired_ratio([2.0] * 40, [1.0] * 40)
    assert (exact.median, exact.low, exact.high) == (2.0, 2.0, 2.0)
    noisy = paired_ratio([2.0 + 0.1 * (i % 5) for i in range(40)], [1.0] * 40)
    assert noisy.low <= noisy.median <= noisy.high
    assert noisy.half_width > 0
