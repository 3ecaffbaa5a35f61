"""Image features of a model whose tower or projector has stages.

transformers gives the tower no keyword arguments, reads its features by hooks, and needs one feature for each placeholder. So the tower's
layers and the projector are called here. The forward takes patches that are gone out of the language model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..tokens.state import TokenState
from ..tokens.trace import Trace
from .stack import Stack


def image_features(
    hidden_states: Tensor, vision: Stack, projector: nn.Module, skipped: int, trace: Trace, unused: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Runs the layers of a tower and the projector, with their stages.

    Args:
        hidden_states: (I, N, C) input of the tower's first layer, for I images.
        vision: stack of the tower's layers, up to the one whose output the projector reads.
        projector: maps each token to the width of the language model.
        skipped: tokens at the start that the projector does not read: 1 for a class token that is not used, else 0.
        trace: trace of the forward; the flows ``vision`` and ``projector`` have their inputs.
        unused: (I, N - skipped) bool, patches that the language model of the dense model does not get; None if it gets all.

    Returns:
        (I, N - skipped, width) features in the order of the placeholders, zeros for patches that are gone, and (I, N - skipped) bool, True
        for these; None if none is.
    """
    images, tokens, _ = hidden_states.shape
    for layer in vision.layers:
        hidden_states = layer(hidden_states, None, trace=trace)
    state = trace.flow(vision.name).state or TokenState.initial(images, tokens, skipped, None, hidden_states.device)
    # The class token is protected, so it is the first one still.
    position = state.position[:, skipped:] - skipped
    valid = None if state.valid is None else state.valid[:, skipped:]
    flow = trace.flow("projector")
    if unused is not None:
        valid = ~unused.gather(1, position) if valid is None else valid & ~unused.gather(1, position)
    flow.valid, flow.places = valid, None if state.whole else position
    calls: Any = projector
    values: Tensor = calls(hidden_states[:, skipped:], trace=trace)
    patches = tokens - skipped
    if flow.state is not None:
        # In the dense model the projector has all tokens, also those that go no further.
        further = patches if unused is None else patches - unused.sum(-1)
        flow.gone, flow.dense = further - flow.original, patches
    if flow.state is not None and not flow.state.whole:
        position, valid = position.gather(1, flow.state.position), flow.state.valid
    elif state.whole:
        return values, None
    # Padding is written to one more place, which is cut off.
    place = position if valid is None else position.masked_fill(~valid, patches)
    full = values.new_zeros(images, patches + 1, values.shape[-1]).scatter(1, place.unsqueeze(-1).expand_as(values), values)
    gone = torch.ones(images, patches + 1, dtype=torch.bool, device=values.device).scatter(1, place, False)
    return full[:, :-1], gone[:, :-1]
