"""One vector for each row of a shortened output."""

from __future__ import annotations

from torch import Tensor

from .state import TokenState
from .trace import Trace


def pooled(hidden_states: Tensor, trace: Trace, stack: str = "") -> Tensor:
    """The mean over the tokens of each row that are left, as a sentence encoder's mean pooling takes it over all of them.

    Padding does not count. A token that others were merged into counts as often as it stands for tokens, where its stage merges in
    proportion to their number. Leading tokens such as [CLS] count, as they do there.

    Args:
        hidden_states: (B, M, C) output of a compressed encoder, ``last_hidden_state`` of the base model.
        trace: trace of that forward.
        stack: name of the stack that the output is of; "" in a model of one stack.

    Returns:
        (B, C) means, in the dtype of the hidden states.

    Raises:
        ValueError: the trace is of no forward of a model with stages, or of another output.
    """
    state = trace.flow(stack).state
    if state is None or state.tokens != hidden_states.shape[1]:
        seen = "no tokens" if state is None else f"{state.tokens} tokens a row"
        raise ValueError(
            f"hidden_states have {hidden_states.shape[1]} tokens a row, and the trace has seen {seen}: give the last_hidden_state of "
            "model(**batch, trace=trace), and the same trace"
        )
    return mean_of_tokens(hidden_states, state)[:, 0]


def mean_of_tokens(hidden_states: Tensor, state: TokenState) -> Tensor:
    """(B, M, C) -> (B, 1, C) mean over real tokens, weighted by their size after merging in proportion to it; summed in float32."""
    weight = state.size if state.proportional else state.size.new_ones(state.size.shape)
    weight = (weight if state.valid is None else weight * state.valid).unsqueeze(-1)
    mean = (hidden_states.float() * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
    return mean.to(hidden_states.dtype)
