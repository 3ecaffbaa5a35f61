"""Paired measurement of training steps and of the memory that they hold."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..modules.backbones import backbone_for
from ..modules.backbones.base import Backbone
from ..modules.compress import CompressedModel, base_class
from ..modules.state import TokenState, Trace

WARM_UP_ROUNDS = 3


@dataclass(frozen=True)
class Ratio:
    """Ratio of two arms' times, from pairs of the same round.

    Attributes:
        median: of the ratios.
        low: lower 95 % bound of the median.
        high: upper 95 % bound.
    """

    median: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of the interval's width."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class ArmTimes:
    """One compressed arm against the dense model and against its oracle.

    Attributes:
        seconds: median of a training step.
        oracle_seconds: of the backbone given the same token counts by slicing, no router.
        speedup: dense ÷ compressed.
        of_oracle: oracle ÷ compressed.
        control: oracle ÷ the same oracle again: the noise of this measurement.
    """

    seconds: float
    oracle_seconds: float
    speedup: Ratio
    of_oracle: Ratio
    control: Ratio

    @property
    def claimed_speedup(self) -> float:
        """Lower bound of the speed-up less the noise."""
        return self.speedup.low - self.control.half_width

    @property
    def claimed_of_oracle(self) -> float:
        """Lower bound of the share of oracle speed less the noise."""
        return self.of_oracle.low - self.control.half_width


@dataclass(frozen=True)
class Bench:
    """What was measured.

    Attributes:
        dense_seconds: median of a dense training step.
        arms: by name.
        memory: bytes by arm, ``dense`` among them: peak of the device on CUDA, else what autograd saves for backward.
        memory_kind: ``cuda_peak`` or ``saved_for_backward``.
        rounds: of the pairing.
        batch_size: images a step.
    """

    dense_seconds: float
    arms: Mapping[str, ArmTimes]
    memory: Mapping[str, int]
    memory_kind: str
    rounds: int
    batch_size: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, with the claimed ratios beside the measured ones."""
        data = asdict(self)
        for name, arm in self.arms.items():
            data["arms"][name] |= {"claimed_speedup": arm.claimed_speedup, "claimed_of_oracle": arm.claimed_of_oracle}
        return data


def bench(
    dense: PreTrainedModel,
    arms: Mapping[str, PreTrainedModel],
    batch: Mapping[str, Tensor],
    loss: Callable[[str, PreTrainedModel, Mapping[str, Tensor]], Tensor],
    rounds: int = 40,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Bench:
    """Times training steps (forward, backward, optimizer) of all arms in one process, interleaved, their order rotated.

    Args:
        dense: the uncompressed model.
        arms: compressed models by name; all are left with other weights than they had.
        batch: inputs of a step, on the models' device.
        loss: arm name, model and batch -> the loss that training minimises.
        rounds: at least 30 for a figure that is reported.
        progress: called with rounds done and in all.
    """
    device = next(dense.parameters()).device
    contestants: dict[str, tuple[str, nn.Module]] = {"dense": ("dense", dense)}
    for name, model in arms.items():
        counts = _counts(model, batch)
        contestants[name] = (name, model)
        for copy_name in (f"{name}/oracle", f"{name}/control"):
            contestants[copy_name] = ("dense", sliced(copy.deepcopy(dense), counts))
    steps = {name: _step(kind, model, batch, loss) for name, (kind, model) in contestants.items()}
    memory = {name: _memory(steps[name], contestants[name][1], device) for name in ("dense", *arms)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for round_index in range(-WARM_UP_ROUNDS, rounds):
        shift = round_index % len(order)
        for name in order[shift:] + order[:shift]:
            seconds = _timed(steps[name], device)
            if round_index >= 0:
                times[name].append(seconds)
        progress(max(0, round_index + 1), rounds)
    return Bench(
        dense_seconds=statistics.median(times["dense"]),
        arms={
            name: ArmTimes(
                seconds=statistics.median(times[name]),
                oracle_seconds=statistics.median(times[f"{name}/oracle"]),
                speedup=_ratio(times["dense"], times[name]),
                of_oracle=_ratio(times[f"{name}/oracle"], times[name]),
                control=_ratio(times[f"{name}/oracle"], times[f"{name}/control"]),
            )
            for name in arms
        },
        memory=memory,
        memory_kind="cuda_peak" if device.type == "cuda" else "saved_for_backward",
        rounds=rounds,
        batch_size=len(next(iter(batch.values()))),
    )


def sliced(model: PreTrainedModel, counts: Mapping[int, int]) -> PreTrainedModel:
    """The oracle: a dense model whose layer i sees the first ``counts[i]`` tokens, by plain slicing.

    Args:
        model: dense; changed in place.
        counts: tokens by layer index, protected ones included, never growing.
    """
    backbone = backbone_for(model.config.model_type, type(model).__name__)
    shape = backbone.shape(model)
    for index, layer in enumerate(backbone.layers(model)):
        layer.__class__ = type("Sliced" + type(layer).__name__, (_SlicedLayer, type(layer)), {})
        layer.tokens = counts[index]
        layer.biased_by = None
        if backbone.masks_in_layers:
            backbone.adopt(layer)
            layer.biased_by, layer.whole = backbone, shape.prefix + shape.patches
    return model


class _SlicedLayer(nn.Module):
    tokens: int
    biased_by: type[Backbone] | None
    whole: int

    def __call__(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        hidden_states = hidden_states[:, : self.tokens]
        if self.biased_by is not None:
            rows, tokens, _ = hidden_states.shape
            first = torch.arange(tokens, device=hidden_states.device).expand(rows, -1)
            state = TokenState.initial(rows, self.whole, 0, None, hidden_states.device).select(first, None)
            attention_mask = self.biased_by.layer_mask(self, attention_mask, state, hidden_states.dtype, **kwargs)
        return super().__call__(hidden_states, attention_mask, *args, **kwargs)


def _counts(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[int, int]:
    """Tokens of each layer, from one real forward."""
    assert isinstance(model, CompressedModel), base_class(type(model))
    trace = Trace()
    training = model.training
    with torch.no_grad():
        model.eval()(pixel_values=batch["pixel_values"], trace=trace)
    model.train(training)
    return dict(trace.layer_tokens)


def _step(kind: str, model: nn.Module, batch: Mapping[str, Tensor], loss: Callable[..., Tensor]) -> Callable[[], None]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(kind, model, batch).backward()
        optimizer.step()

    return step


def _timed(step: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _memory(step: Callable[[], None], model: nn.Module, device: torch.device) -> int:
    if device.type == "cuda":
        step()
        # The step frees the last gradients first: they are not part of what stood before it.
        model.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(saved.values())


def _ratio(over: list[float], under: list[float]) -> Ratio:
    """Median of the paired ratios with its bootstrap interval, from draws that are always the same."""
    ratios = np.asarray(over) / np.asarray(under)
    draws = np.random.default_rng(0).integers(0, len(ratios), (2000, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
    return Ratio(float(np.median(ratios)), float(low), float(high))
