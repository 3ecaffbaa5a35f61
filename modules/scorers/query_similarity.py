"""Query-similarity scorer: how much a token resembles the words of the question."""

from __future__ import annotations

import torch
from torch.nn import functional

from ..cost.shape import StackShape
from ..site import SiteInput
from ..tokens.scope import last_of_prompt, one_prompt_a_row
from .base import Scored, Scorer


class QuerySimilarityScorer(Scorer):
    """Cosine of a token's hidden state and the mean hidden state of the prompt's words, in a language model.

    The words are all text tokens up to the last one of the prompt, that of scorer ``last_query``: those of earlier turns too, and none of the
    answer that follows. The mean comes first, so that no matrix of all pairs is made. It reads no attention, and is not trained.
    """

    lookahead = True
    reads_prompt = True

    @torch.no_grad()
    def forward(self, inputs: SiteInput) -> Scored:
        """
        Raises:
            ValueError: rows contain several documents, each of which has a prompt of its own.
        """
        state, flow = inputs.state, inputs.flow
        one_prompt_a_row(state, "query_similarity")
        hidden_states = inputs.hidden_states.float()
        if state.tokens == 1:
            # A generated token, to which no scope of a prompt applies.
            return Scored(hidden_states.new_zeros(state.position.shape))
        words = state.position <= last_of_prompt(inputs.trace, flow)
        if flow.visual is not None:
            words = words & ~flow.visual.gather(1, state.position)
        if state.valid is not None:
            words = words & state.valid
        # The sum has the direction of the mean. A row without a word before its image has scores of 0.
        query = words.unsqueeze(1).float() @ hidden_states
        similarity = functional.normalize(hidden_states, dim=-1) @ functional.normalize(query, dim=-1).transpose(1, 2)
        return Scored(similarity.squeeze(-1))

    def macs(self, shape: StackShape, tokens: int) -> int:
        return 2 * tokens * shape.hidden
