"""A stage: router and merger at a site."""

from __future__ import annotations

from torch import Tensor, nn

from .backbones.base import Backbone
from .config import PartConfig, StageConfig
from .counting import COUNT_RULES, BackboneShape, StageCount
from .draws import gumbel, uniform
from .estimators.base import Estimate, Estimator
from .mergers.base import Merged, Merger
from .scorers.base import Scorer, ScorerInput, TokenSpec
from .selectors.base import Selector
from .state import Decision, Routing, TokenState, Trace

# Keeps the draws of a selector's noise apart from those of a random scorer.
_NOISE = 1 << 20


class Stage(nn.Module):
    """Scores the tokens, decides which stay, and lets the merger do it.

    Args:
        config: what the stage is made of.
        spec: the tokens that it scores.
        index: position among the model's stages.
        backbone: adapter of the model's family.

    Raises:
        ValueError: a part has no such name or option.
    """

    def __init__(self, config: StageConfig, spec: TokenSpec, index: int, backbone: type[Backbone]) -> None:
        super().__init__()
        self.config = config
        self.index = index
        self.backbone = backbone
        try:
            self.scorer: Scorer = config.part("scorer").build("scorer", spec)
            self.selector: Selector = config.part("selector").build("selector")
            self.merger: Merger = config.part("merger").build("merger")
            self.estimator: Estimator | None = self._build_estimator()
        except ValueError as error:
            raise ValueError(f"stage {config.key!r}: {error}") from None

    def _build_estimator(self) -> Estimator | None:
        """The config's estimator, or the one that the scorer is made for; none for a scorer that is not trained."""
        given = self.config.estimator
        if self.scorer.estimator is None:
            if given is not None:
                raise ValueError(f"scorer {self.config.part('scorer').name!r} is not trained: leave estimator out")
            return None
        part = PartConfig(self.scorer.estimator) if given is None else self.config.part("estimator")
        estimator: Estimator = part.build("estimator")
        if estimator.needs_answers != self.scorer.answers_task:
            raise ValueError(
                f"estimator {part.name!r} cannot train scorer {self.config.part('scorer').name!r}: "
                f"leave estimator out, or take {self.scorer.estimator!r}"
            )
        return estimator

    def keep(self, trace: Trace) -> float:
        """Requested keep: what the trace asks for, else the stage's own."""
        assert self.config.keep is not None
        return trace.keep.get(self.config.key, self.config.keep)

    def count(self, present: int | Tensor, keep: float, original: int | Tensor) -> int | Tensor:
        """Routable tokens that leave, a merger's added token included."""
        return COUNT_RULES[self.config.count](present, keep, StageCount(original, self.index))

    def forward(self, hidden_states: Tensor, layer: nn.Module, trace: Trace) -> Tensor:
        """(B, M, C) tokens -> (B, K, C); the new TokenState and the Routing go onto the trace."""
        state = trace.state
        assert state is not None
        keep, present = self.keep(trace), state.present
        kept = self.count(present, keep, trace.original)
        scored = self.scorer(ScorerInput(hidden_states, state, trace, self.index, layer, self.backbone))
        decision = trace.replay.get(self.config.key)
        if decision is None:
            decision = self.selector(scored.scores, state, self._selected(kept, present), self._noise(state, trace))
        estimate = Estimate()
        if self.training and self.estimator is not None:
            estimate = self.estimator(scored.scores, scored.answers, decision, state, trace)
        merged = self._merge(hidden_states, scored.scores, decision, state, estimate)
        trace.routings[self.config.key] = Routing(
            stage=self.config.key,
            scores=scored.scores,
            soft=scored.scores.sigmoid() if self.scorer.probabilities else None,
            routable=state.routable,
            decision=decision,
            state=state,
            requested=keep,
            present=present,
            # Counted on what the merger made, not taken from the rule.
            kept=merged.state.present,
            lookahead=self.scorer.lookahead or self.selector.lookahead,
            auxiliary_loss=estimate.loss,
        )
        trace.state = merged.state
        return merged.hidden_states

    def _selected(self, kept: int | Tensor, present: int | Tensor) -> int | Tensor:
        """Tokens for the selector: all, or ``kept`` less what the merger adds."""
        if isinstance(kept, Tensor) or isinstance(present, Tensor):
            return kept - self.merger.extra * (kept < present).long()  # type: ignore[union-attr]
        return kept - self.merger.extra if kept < present else kept

    def _noise(self, state: TokenState, trace: Trace) -> Tensor | None:
        if self.estimator is None or (isinstance(trace.noise, float) and trace.noise == 0):
            return None
        rows = trace.rows_identity(state.rows, state.position.device)
        return gumbel(uniform(trace.seed, trace.step, rows, self.index + _NOISE, state.position)) * trace.noise

    def _merge(self, hidden_states: Tensor, scores: Tensor, decision: Decision, state: TokenState, estimate: Estimate) -> Merged:
        """Merges with the estimate's paths laid: through the tokens' scale, or through the bias of their keys."""
        if estimate.scale is not None:
            scale = estimate.scale.masked_fill(~state.routable, 1.0)
            hidden_states = hidden_states * scale.unsqueeze(-1).to(hidden_states.dtype)
        if estimate.key_bias is not None:
            state = state.add_key_bias(estimate.key_bias.masked_fill(~state.routable, 0.0))
        merged: Merged = self.merger(hidden_states, scores, decision, state)
        return merged

    def macs(self, shape: BackboneShape, tokens: int, kept: int) -> int:
        """MACs of this stage in evaluation for one row going from ``tokens`` to ``kept``, protected ones included."""
        return self.scorer.macs(shape, tokens) + self.merger.macs(shape, tokens, kept)
