"""Paired measurement of training steps: time and memory."""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...modules.backbones import adapter_of
from ...modules.backbones.layer_adapter import LayerAdapter
from ...modules.compressed_model import CompressedModel
from ...modules.layer import base_class
from ...modules.tokens.flow import RowTokens
from ...modules.tokens.state import TokenState
from ...modules.tokens.trace import Trace
from .training_step import TrainingStep, Update

WARM_UP_ROUNDS = 3
LEAST_ROUNDS = 8


@dataclass(frozen=True)
class Ratio:
    """Ratio of two arms' times, from pairs of the same round.

    Attributes:
        median: median of the ratios.
        low: lower 95 % bound of the median.
        high: upper 95 % bound of the median.
    """

    median: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class ArmTimes:
    """Times of one compressed arm, relative to the dense model and to its oracle.

    Attributes:
        seconds: median time of a training step.
        oracle_seconds: median time of the oracle, the backbone with the same token counts by slicing and without a router.
        speedup: dense ÷ compressed.
        of_oracle: oracle ÷ compressed.
        control: oracle ÷ a second, equal oracle: the noise of the measurement.
    """

    seconds: float
    oracle_seconds: float
    speedup: Ratio
    of_oracle: Ratio
    control: Ratio

    @property
    def claimed_speedup(self) -> float:
        """Lower bound of the speed-up, less the noise."""
        return self.speedup.low - self.control.half_width

    @property
    def claimed_of_oracle(self) -> float:
        """Lower bound of oracle ÷ compressed, less the noise."""
        return self.of_oracle.low - self.control.half_width


@dataclass(frozen=True)
class Bench:
    """Result of a measurement.

    Attributes:
        dense_seconds: median time of a dense training step.
        arms: times by arm.
        memory: bytes by arm, with ``dense``, and ``ARM/oracle`` of an arm's oracle: the device's peak on CUDA, otherwise the tensors that
            autograd saves for backward.
        memory_kind: ``cuda_peak`` or ``saved_for_backward``.
        rounds: number of paired rounds.
        amount: images or tokens of a step, by the task's unit.
    """

    dense_seconds: float
    arms: Mapping[str, ArmTimes]
    memory: Mapping[str, int]
    memory_kind: str
    rounds: int
    amount: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, with the claimed ratios."""
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
    seconds: float = math.inf,
    progress: Callable[[int, int], None] = lambda done, total: None,
    forward: Callable[..., Any] = lambda model, batch, **options: model(**batch, **options),
    amount: int | None = None,
    update: Update | None = None,
) -> Bench:
    """Times training steps of all arms in one process, interleaved, in rotating order.

    Args:
        dense: the dense model.
        arms: compressed models by name; the measurement changes their weights.
        batch: inputs of a step, on the models' device.
        loss: function of arm name, model and batch that returns the training loss.
        rounds: number of rounds; at least 30 for reported results.
        seconds: time after which no further round begins, if there are eight: a slow model's steps differ less from round to round.
        progress: called with the number of finished rounds and of all rounds.
        forward: function of model, batch and ``trace`` that runs an evaluation forward, for its token counts.
        amount: images or tokens of the batch, by the task's unit; None counts rows.
        update: optimizer, clipping and batches of a step; None for AdamW after each batch.
    """
    device = next(dense.parameters()).device
    update = Update() if update is None else update

    def step_of(kind: str, model: PreTrainedModel) -> TrainingStep:
        return TrainingStep(model, lambda batch: loss(kind, model, batch), itertools.repeat(batch), update)

    contestants: dict[str, tuple[str, PreTrainedModel]] = {"dense": ("dense", dense)}
    for name, model in arms.items():
        # An adaptive threshold settles in the first step; token counts are valid only after it.
        step_of(name, model)()
        counts = token_counts(model, batch, forward)
        contestants[name] = (name, model)
        for copy_name in (f"{name}/oracle", f"{name}/control"):
            contestants[copy_name] = ("dense", sliced(copy.deepcopy(dense), *counts))
    steps = {name: step_of(kind, model) for name, (kind, model) in contestants.items()}
    memory = {name: _memory(steps[name], device) for name in contestants if not name.endswith("/control")}
    times = paired_times(steps, device, rounds, seconds, progress)
    return Bench(
        dense_seconds=statistics.median(times["dense"]),
        arms={
            name: ArmTimes(
                seconds=statistics.median(times[name]),
                oracle_seconds=statistics.median(times[f"{name}/oracle"]),
                speedup=paired_ratio(times["dense"], times[name]),
                of_oracle=paired_ratio(times[f"{name}/oracle"], times[name]),
                control=paired_ratio(times[f"{name}/oracle"], times[f"{name}/control"]),
            )
            for name in arms
        },
        memory=memory,
        memory_kind="cuda_peak" if device.type == "cuda" else "saved_for_backward",
        rounds=len(times["dense"]),
        amount=update.accumulate * (len(next(iter(batch.values()))) if amount is None else amount),
    )


def paired_times(
    steps: Mapping[str, Callable[[], None]],
    device: torch.device,
    rounds: int,
    seconds: float = math.inf,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[float]]:
    """Seconds of each step by name, one a round: every round runs all steps, in rotating order, after a few rounds that do not count.

    Args:
        steps: what to time.
        device: device of the steps.
        rounds: number of rounds.
        seconds: time after which no further round begins, if there are eight.
        progress: called with the number of finished rounds and of all rounds.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    order, began = list(steps), time.perf_counter()
    for round_index in range(-WARM_UP_ROUNDS, rounds):
        if round_index >= LEAST_ROUNDS and time.perf_counter() - began > seconds:
            break
        shift = round_index % len(order)
        for name in order[shift:] + order[:shift]:
            taken = _timed(steps[name], device)
            if round_index >= 0:
                times[name].append(taken)
        progress(max(0, round_index + 1), rounds)
    return times


def sliced(model: PreTrainedModel, tokens: Mapping[int, RowTokens], final: int | None = None) -> PreTrainedModel:
    """The oracle: a dense model whose layers process as many tokens, by plain slicing ``x[:, :k]``. Only the main stack is sliced.

    Args:
        model: dense model; changed in place.
        tokens: tokens by layer index, from the flow of a compressed model's forward; if rows differ, the mean is used.
        final: tokens after the last layer; None uses those of its MLP.
    """
    adapter = adapter_of(model)
    stack = adapter.main_stack(model)
    layers = stack.layers
    early = adapter.whole_until(model)
    whole = range(early + 1) if early else ()
    present = [(_longest if index in whole else _mean)(tokens[index].present) for index in range(len(layers))]
    removed = _Removed()
    for index, layer in enumerate(layers):
        if stack.adapter.masks_in_layers:
            stack.adapter.patch_layer(layer)
        layer.__class__ = type("Sliced" + type(layer).__name__, (_SlicedLayer, type(layer)), {})
        attention, mlp = _mean(tokens[index].attention), _mean(tokens[index].mlp)
        leaving = present[index + 1] if index + 1 < len(layers) else mlp if final is None else final
        filled = index == len(layers) - 1 and adapter.head_counts_places(model)
        layer.slices = _Slices(index, present[index], attention, mlp, leaving, stack.adapter, removed, filled)
    return model


@dataclass
class _Removed:
    """The sliced-off tokens, for layers after a restore."""

    whole: Tensor | None = None

    def fit(self, hidden_states: Tensor, tokens: int) -> Tensor:
        """(B, M, C) cut, or extended from the whole sequence, to ``tokens``."""
        missing = tokens - hidden_states.shape[1]
        if missing <= 0:
            return hidden_states[:, :tokens]
        assert self.whole is not None
        return torch.cat([hidden_states, self.whole[:, -missing:]], 1)


@dataclass(frozen=True)
class _Slices:
    """Number of tokens that an oracle's layer receives, processes in each half, and passes on; ``filled`` restores the full length."""

    index: int
    present: int
    attention: int
    mlp: int
    leaving: int
    adapter: type[LayerAdapter]
    removed: _Removed
    filled: bool = False

    def inputs(self, layer: nn.Module, given: Mapping[str, Any], hidden_states: Tensor) -> dict[str, Any]:
        """Inputs of the layer, by name, for its first tokens."""
        whole = self.removed.whole
        rows, tokens, _ = hidden_states.shape
        if whole is None or tokens == whole.shape[1]:
            return dict(given)
        if not self.adapter.masks_in_layers:
            return self.adapter.slice_inputs(given, tokens)
        # The layer has one bias for every pair of tokens.
        first = torch.arange(tokens, device=hidden_states.device).expand(rows, -1)
        state = TokenState.initial(rows, whole.shape[1], 0, None, hidden_states.device).select(first, None)
        return self.adapter.layer_inputs(layer, state, hidden_states.dtype, given)


class _SlicedLayer(nn.Module):
    slices: _Slices

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        slices = self.slices
        given = dict(zip(slices.adapter.positional, args, strict=False)) | kwargs
        if slices.index == 0:
            slices.removed.whole = hidden_states
        hidden_states = slices.removed.fit(hidden_states, slices.present)
        call = super().__call__

        if slices.attention == slices.mlp:
            hidden_states = _through(hidden_states, slices.mlp, lambda tokens: call(tokens, **slices.inputs(self, given, tokens)))
        else:
            half = slices.adapter.attention_half
            hidden_states = _through(
                hidden_states, slices.attention, lambda tokens: half(self, tokens, **slices.inputs(self, given, tokens))
            )
            if slices.leaving < slices.present:
                hidden_states = hidden_states[:, : slices.mlp]
            hidden_states = _through(hidden_states, slices.mlp, lambda tokens: slices.adapter.mlp_half(self, tokens))
        hidden_states = slices.removed.fit(hidden_states, slices.leaving)
        whole = slices.removed.whole
        return slices.removed.fit(hidden_states, whole.shape[1]) if slices.filled and whole is not None else hidden_states


def _through(hidden_states: Tensor, tokens: int, inner: Callable[[Tensor], Tensor]) -> Tensor:
    """Processes the first tokens by a part of a layer; the others bypass it."""
    if tokens == 0:
        return hidden_states
    if tokens == hidden_states.shape[1]:
        return inner(hidden_states)
    return torch.cat([inner(hidden_states[:, :tokens]), hidden_states[:, tokens:]], 1)


def _mean(count: int | Tensor) -> int:
    return round(float(count.double().mean())) if isinstance(count, Tensor) else count


def _longest(count: int | Tensor) -> int:
    return int(count.max()) if isinstance(count, Tensor) else count


def token_counts(
    model: PreTrainedModel,
    batch: Mapping[str, Tensor],
    forward: Callable[..., Any] = lambda model, batch, **options: model(**batch, **options),
) -> tuple[dict[int, RowTokens], int]:
    """Tokens of each layer, and after the last, from one evaluation forward of a compressed model."""
    assert isinstance(model, CompressedModel), base_class(type(model))
    # Training is measured, and training may be non-causal.
    trace = Trace(lookahead=True)
    training = model.training
    with torch.no_grad():
        forward(model.eval(), batch, trace=trace)
    model.train(training)
    flow = trace.flow(adapter_of(model).stack_name)
    return dict(flow.layer_tokens), _mean(flow.tokens.tokens_per_row)


def _timed(step: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _memory(step: TrainingStep, device: torch.device) -> int:
    if device.type == "cuda":
        step()
        # The step frees the last gradients first, so they must not count in ``before``.
        step.optimizer.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    weights = {parameter.untyped_storage().data_ptr() for parameter in step.model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    # Of one batch: those of the next one lie where these did.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step.backward()
    return sum(saved.values())


def paired_ratio(over: list[float], under: list[float]) -> Ratio:
    """Median of the paired ratios with its bootstrap interval; the bootstrap draws are fixed."""
    ratios = np.asarray(over) / np.asarray(under)
    draws = np.random.default_rng(0).integers(0, len(ratios), (2000, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
    return Ratio(float(np.median(ratios)), float(low), float(high))
