"""Image features of a model whose tower or projector has stages.

transformers gives the tower no keyword arguments, reads its features by hooks, and needs one feature for each placeholder. So the tower's
layers and the projector are called here. The forward takes patches that are gone out of the language model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..tokens.state import TokenState
from ..tokens.trace import Trace
from ..tokens.units import Units
from .stack import Stack


@dataclass(frozen=True)
class TowerInput:
    """What the first layer of a tower is given, and how its output is read.

    Attributes:
        hidden_states: (I, N, C) input of the tower's first layer, for I rows.
        skipped: tokens at the start that the projector does not read: 1 for a class token that is not used, else 0.
        unit: tokens that the projector joins into one; their numbers are on the flow ``vision``.
        unused: (I, N - skipped) bool, patches that the language model of the dense model does not get; None if it gets all.
        inputs: keyword arguments of each layer, by its index; None for none.
        behind: norm behind the last layer; None without one.
        taps: modules that read the output of a layer like a projector, by the layer's index (DeepStack).
    """

    hidden_states: Tensor
    skipped: int = 0
    unit: int = 1
    unused: Tensor | None = None
    inputs: Callable[[int], Mapping[str, Any]] | None = None
    behind: Callable[[Tensor], Tensor] | None = None
    taps: Mapping[int, nn.Module] = field(default_factory=dict)


@dataclass(frozen=True)
class RowFeatures:
    """Features of the rows of a tower, P = (N - skipped) / unit for each.

    Attributes:
        values: (I, P, width) in the order of the placeholders, zeros for patches that are gone.
        gone: (I, P) bool, True for these; None if none is.
        tapped: for each tap (I, P, width) features, zeros for patches that were gone there.
    """

    values: Tensor
    gone: Tensor | None
    tapped: tuple[Tensor, ...] = ()


def image_features(given: TowerInput, vision: Stack, projector: Stack, trace: Trace) -> RowFeatures:
    """Runs the layers of a tower and the projector, with their stages.

    Args:
        given: input of the tower.
        vision: stack of the tower's layers, up to the one whose output the projector reads.
        projector: maps each token, or each unit, to the width of the language model.
        trace: trace of the forward; the flows ``vision`` and ``projector`` have their inputs.
    """
    hidden_states, skipped = given.hidden_states, given.skipped
    rows, tokens, _ = hidden_states.shape
    seen, flow = trace.flow(vision.name), trace.flow(projector.name)
    tapped = []
    for index, layer in enumerate(vision.layers):
        inputs = {} if given.inputs is None else given.inputs(index)
        calls: Any = layer
        if calls.plan.dense:
            whole = TokenState.initial(rows, tokens, skipped, seen.valid, hidden_states.device)
            hidden_states = vision.adapter.call(
                layer, hidden_states, vision.adapter.layer_inputs(layer, whole, hidden_states.dtype, inputs)
            )
        else:
            hidden_states = calls(hidden_states, **inputs, trace=trace)
        if index in given.taps:
            state = seen.state or TokenState.initial(rows, tokens, skipped, seen.valid, hidden_states.device)
            assert seen.units is not None
            values = _project(given.taps[index], projector, hidden_states, state, seen.units, given.unit)
            tapped.append(_to_places(values, *_numbers(state, seen.units, given.unit), tokens // given.unit)[0])
    if given.behind is not None:
        hidden_states = given.behind(hidden_states)
    state = seen.state or TokenState.initial(rows, tokens, skipped, seen.valid, hidden_states.device)
    # The class token is protected, so it is the first one still.
    position = state.position[:, skipped:] - skipped
    valid = None if state.valid is None else state.valid[:, skipped:]
    if given.unused is not None:
        used = ~given.unused.gather(1, position)
        valid = used if valid is None else valid & used
    flow.valid = valid
    if seen.places is not None:
        flow.places = seen.places.gather(1, state.position)[:, skipped:] - skipped
    else:
        flow.places = None if state.whole else position
    numbers = position if seen.units is None else seen.units.expand(rows, -1).gather(1, state.position)[:, skipped:]
    flow.units = None if given.unit == 1 else numbers
    calls = projector.layers[0]
    if calls.plan.dense:
        begun = TokenState.initial(rows, position.shape[1], 0, valid, hidden_states.device)
        values = _project(calls, projector, hidden_states[:, skipped:], begun, flow.units, given.unit)
    else:
        values = calls(hidden_states[:, skipped:], units=flow.units, unit=given.unit, trace=trace)
    if flow.state is not None:
        # In the dense model the projector has all tokens, also those that go no further.
        every: int | Tensor = tokens - skipped if seen.valid is None else seen.valid[:, skipped:].sum(-1)
        further = every if given.unused is None else every - given.unused.sum(-1)
        flow.gone, flow.dense = further - flow.original, every
    if state.whole and (flow.state is None or flow.state.whole):
        return RowFeatures(values, None, tuple(tapped))
    assert flow.state is not None
    return RowFeatures(*_to_places(values, *_numbers(flow.state, numbers, given.unit), (tokens - skipped) // given.unit), tuple(tapped))


def _project(module: nn.Module, projector: Stack, hidden_states: Tensor, state: TokenState, units: Tensor | None, unit: int) -> Tensor:
    """Output of a module that reads tokens as the projector does."""
    inputs = projector.adapter.layer_inputs(module, state, hidden_states.dtype, {"units": units, "unit": unit})
    output: Tensor = projector.adapter.call(module, hidden_states, inputs)
    return output


def _numbers(state: TokenState, numbers: Tensor, unit: int) -> tuple[Tensor, Tensor | None]:
    """(B, K) place of each token or unit behind the projector, and (B, K) bool, False for padding.

    Args:
        state: TokenState of the tokens at the projector.
        numbers: (B or 1, N) place, or number of the unit, of each token before the projector's stage.
        unit: tokens of a unit.
    """
    if unit == 1:
        return numbers.gather(1, state.position), state.valid
    units = Units.of(state, numbers, unit)
    return units.number, units.state.valid


def _to_places(values: Tensor, number: Tensor, valid: Tensor | None, places: int) -> tuple[Tensor, Tensor]:
    """(B, K, width) values at their places, (B, P, width), zeros elsewhere; and (B, P) bool, True there."""
    # Padding is written to one more place, which is cut off.
    place = number if valid is None else number.masked_fill(~valid, places)
    full = values.new_zeros(len(values), places + 1, values.shape[-1]).scatter(1, place.unsqueeze(-1).expand_as(values), values)
    gone = torch.ones(len(values), places + 1, dtype=torch.bool, device=values.device).scatter(1, place, False)
    return full[:, :-1], gone[:, :-1]
