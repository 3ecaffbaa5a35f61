"""Random scorer: the control that every router must beat."""

from __future__ import annotations

from ..site import SiteInput
from ..tokens.draws import uniform
from .base import Scored, Scorer


class RandomScorer(Scorer):
    """Uniform draws by (seed, step, sample id, position): random dropping, as in PatchDropout (arXiv 2208.07220)."""

    def forward(self, inputs: SiteInput) -> Scored:
        state, trace = inputs.state, inputs.trace
        rows = trace.rows_identity(state.rows, state.position.device)
        return Scored(uniform(trace.seed, trace.step, rows, inputs.stage, state.position + inputs.flow.seen))
