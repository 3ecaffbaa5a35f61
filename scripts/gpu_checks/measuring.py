"""Paired times of training steps and of other calls, as short tables."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from laconic.modules.cost.cost import CostModel
from laconic.trainer.measure.bench import Ratio, bench, paired_ratio, paired_times

from .models import DEVICE, autocast, loss_of
from .part import Setting


def measured(
    setting: Setting, dense: nn.Module, arms: Mapping[str, nn.Module], batch: dict[str, Tensor], size: Any = None, share: float = 1.0
) -> dict[str, Any]:
    """Paired training steps of dense, arms and their oracles, what they claim, and what MACs predict.

    Args:
        setting: rounds, and the time that is left.
        dense, arms: models.
        batch: inputs of a step.
        size: size of an input, for the cost model.
        share: share of the time that is left.
    """

    def loss(name: str, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with autocast():
            return loss_of(model, batch, name != "dense")

    found = bench(dense, arms, batch, loss, setting.rounds, setting.seconds(share)).to_dict()  # type: ignore[arg-type]
    short: dict[str, Any] = {"dense_ms": 1e3 * found["dense_seconds"], "dense_memory_mib": found["memory"]["dense"] / 2**20}
    for name, arm in found["arms"].items():
        short[name] = {
            "ms": 1e3 * arm["seconds"],
            "oracle_ms": 1e3 * arm["oracle_seconds"],
            **{key: [arm[key][bound] for bound in ("median", "low", "high")] for key in ("speedup", "of_oracle", "control")},
            "claimed_of_oracle": arm["claimed_of_oracle"],
            "memory_mib": found["memory"][name] / 2**20,
            "macs_ratio": CostModel(arms[name], size=size)().macs_ratio,  # type: ignore[arg-type]
        }
    return short | rounds_of(setting, found["rounds"])


def each_measured(
    setting: Setting,
    dense: Callable[[], nn.Module],
    arms: Mapping[str, Callable[[], nn.Module]],
    batch: dict[str, Tensor],
    size: Any = None,
) -> dict[str, Any]:
    """``measured`` for one arm after another, since each brings two oracles; each arm has its own dense model."""
    found = {}
    for place, (name, make) in enumerate(arms.items()):
        found[name] = measured(setting, dense(), {name: make()}, batch, size, 1 / (len(arms) - place))
        release()
    return found


def timed(setting: Setting, calls: Mapping[str, Callable[[], Any]], share: float = 1.0) -> dict[str, list[float]]:
    """Seconds of each call by name, one a round, interleaved, in rotating order."""
    return paired_times(calls, torch.device(DEVICE), setting.rounds, setting.seconds(share))


def ratio_of(over: list[float], under: list[float]) -> list[float]:
    """Median of the paired ratios, and its 95 % bounds."""
    found: Ratio = paired_ratio(over, under)
    return [found.median, found.low, found.high]


def milliseconds(times: list[float]) -> float:
    """Median."""
    return 1e3 * statistics.median(times)


def rounds_of(setting: Setting, done: int) -> dict[str, Any]:
    """Number of rounds, and whether the time ended them."""
    return {"rounds": done} | ({"stopped_early": f"{setting.rounds} rounds were requested"} if done < setting.rounds else {})


def release() -> None:
    """Gives back the memory of models that nothing names any more."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
