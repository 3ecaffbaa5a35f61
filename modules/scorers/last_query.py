"""Last-query scorer: the attention from the last token of the prompt to every token."""

from __future__ import annotations

import torch

from ..cost.shape import StackShape
from ..site import SiteInput
from ..tokens.scope import last_of_prompt, one_prompt_a_row
from .base import Scored, Scorer


class LastQueryScorer(Scorer):
    """Mean over heads of softmax(q_last · K) in the site's layer, with its norm, projections and positions.

    The criterion of PyramidDrop (arXiv 2410.17247). FastV (arXiv 2403.06764) reads the same row of attention one layer earlier. One
    query meets all keys, so that no attention matrix is made and the layer keeps its fused attention. The scorer is not trained.
    A sliding window of the layer is ignored, since a token outside it may matter to later layers.
    """

    lookahead = True
    reads_query = True
    reads_prompt = True

    @torch.no_grad()
    def forward(self, inputs: SiteInput) -> Scored:
        """
        Raises:
            ValueError: rows contain several documents, each of which has a prompt of its own.
        """
        state = inputs.state
        one_prompt_a_row(state, "last_query")
        if state.tokens == 1:
            # A generated token, to which no scope of a prompt applies.
            return Scored(torch.zeros(state.position.shape, device=state.position.device))
        last = last_of_prompt(inputs.trace, inputs.flow)
        slot = state.source.gather(1, last).clamp(min=0)
        query, key, scale = inputs.adapter.query_and_keys(inputs.layer, inputs.hidden_states, slot, state, inputs.inputs)
        rows, groups, tokens, width = key.shape
        logits = (query.float() * scale).view(rows, groups, -1, width) @ key.float().transpose(-1, -2)
        visible = state.position <= last
        if state.valid is not None:
            visible = visible & state.valid
        # The query's own key is visible except in a row of padding, whose scores are not used.
        logits = logits.masked_fill(~visible[:, None, None], torch.finfo(logits.dtype).min)
        return Scored(logits.softmax(-1).view(rows, -1, tokens).mean(1))

    def macs(self, shape: StackShape, tokens: int) -> int:
        queries = shape.hidden if shape.query_width is None else shape.query_width
        keys = shape.hidden if shape.key_width is None else shape.key_width
        return shape.hidden * (queries + tokens * keys) + tokens * queries
