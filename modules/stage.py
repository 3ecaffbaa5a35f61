"""A stage: router and merger at a site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from . import registry
from .backbones.layer_adapter import LayerAdapter
from .config import PartConfig, StageConfig
from .cost.count_rules import COUNT_RULES, StageCount, at_least_half
from .cost.shape import StackShape
from .estimators.base import Estimate, Estimator
from .mergers.base import Merged, Merger
from .scorers.base import Scored, Scorer
from .selectors.base import Request, Selector, everything
from .site import SiteInput, TokenSpec
from .tokens.bypass import passing
from .tokens.dechunk import smoothing_macs
from .tokens.decision import Decision
from .tokens.draws import uniform
from .tokens.flow import Chunks, Flow
from .tokens.scope import COMPLETE, in_scope
from .tokens.state import TokenState
from .tokens.trace import Routing, Trace

# Keeps the draws of a selector's noise apart from those of a random scorer.
_NOISE = 1 << 20

# The part of a layer that a bypass skips for tokens that are not chosen: (B, K, C) tokens and their state -> (B, K, C).
Inner = Callable[[Tensor, TokenState], Tensor]


@dataclass(frozen=True)
class Choice:
    """What a router decided about the tokens at a site."""

    scored: Scored
    decision: Decision
    estimate: Estimate
    keep: float
    lookahead: bool
    agreement: Tensor | None
    skipped: bool


class Stage(nn.Module):
    """Scores the tokens, decides which stay, and lets the merger do it; around a layer, which are processed.

    Args:
        config: what the stage is made of.
        spec: the tokens that it scores.
        index: position among the model's stages.
        adapter: of the stack's layers.
        place: position among the stack's stages; None takes ``index``.

    Raises:
        ValueError: a part has no such name or option. Whether parts go together is ``compatibility``'s to say.
    """

    def __init__(self, config: StageConfig, spec: TokenSpec, index: int, adapter: type[LayerAdapter], place: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.index = index
        self.place = index if place is None else place
        self.adapter = adapter
        try:
            self.scorer: Scorer = registry.build("scorer", config.part("scorer"), spec)
            self.selector: Selector = registry.build("selector", config.part("selector"), spec)
            self.merger: Merger = registry.build("merger", config.part("merger"), spec)
            self.estimator: Estimator | None = self._build_estimator()
        except ValueError as error:
            raise ValueError(f"stage {config.key!r}: {error}") from None

    def _build_estimator(self) -> Estimator | None:
        """The config's estimator, or the one that the scorer is made for; none for a scorer that is not trained."""
        default = self.scorer.chunk_estimator if self.chunks and self.scorer.chunk_estimator else self.scorer.estimator
        if self.config.estimator is None and default is None:
            return None
        part = self.config.part("estimator") if self.config.estimator is not None else PartConfig(str(default))
        estimator: Estimator = registry.build("estimator", part)
        return estimator

    @property
    def bypass(self) -> bool:
        """Tokens that are not chosen bypass the layer."""
        return self.config.bypass

    @property
    def chunks(self) -> bool:
        """The tokens that leave stand for those behind them too, of a causal model, and a restore gives all of them what layers add."""
        return self.adapter.causal and not self.bypass and self.config.scope not in COMPLETE

    @property
    def lookahead(self) -> bool:
        """In evaluation, the decision for a token depends on later tokens."""
        return self.scorer.lookahead or self.selector.lookahead

    @property
    def deployable(self) -> bool:
        """A causal model can run it token by token: it uses no token that is not there yet."""
        return self.whole or self.config.scope in COMPLETE or not self.lookahead

    @property
    def idle(self) -> bool:
        """It changes nothing: every token is processed, and none is weighed."""
        return self.whole and not (self.estimator is not None and self.estimator.in_evaluation)

    @property
    def whole(self) -> bool:
        """It leaves every token as it is."""
        return self.config.keep == 1.0

    def count(self, present: int | Tensor, original: int | Tensor, keep: float | None = None) -> int | Tensor:
        """Routable tokens that leave (or are processed, around a layer), a merger's added token included.

        Args:
            present: routable tokens at the site.
            original: routable tokens before the first stage.
            keep: instead of the stage's own keep or number.
        """
        requested = self.config.keep if keep is None else keep
        if keep is None and self.config.tokens is not None:
            fixed = self.config.tokens
            count = torch.clamp(present, max=fixed) if isinstance(present, Tensor) else min(present, fixed)
        else:
            assert requested is not None
            count = COUNT_RULES[self.config.count or self.scorer.count](present, requested, StageCount(original, self.place))
        return at_least_half(present, count) if self.scorer.matches else count

    def expected(self, present: float, original: float, keep: float | None = None) -> float:
        """``count``, for cost: where rows keep different numbers, their mean, which is no whole number."""
        if self.selector.adaptive:
            requested = self.config.keep if keep is None else keep
            assert requested is not None
            return present * requested
        count = self.count(round(present), round(original), keep)
        assert isinstance(count, int)
        return count

    def forward(self, hidden_states: Tensor, layer: nn.Module, trace: Trace) -> Tensor:
        """Shrinks (B, M, C) tokens to (B, K, C); the new TokenState goes onto the flow, the Routing onto the trace."""
        flow = trace.flow(self.config.stack)
        state, eligible = flow.tokens, self._eligible(trace, flow)
        choice = self._choose(hidden_states, layer, trace, flow, eligible)
        merged = self._merge(self._site(hidden_states, layer, trace, flow), choice, eligible)
        # Counted on what the merger made, not taken from the rule.
        left = merged.state if eligible is state else eligible.select(choice.decision.index, choice.decision.valid)
        self._record(trace, choice, eligible, left.present)
        flow.state = replace(merged.state, empty=True) if choice.decision.empty else merged.state
        if self.chunks:
            flow.chunks = self._chunks(choice, merged, eligible)
        return merged.hidden_states

    def around(self, hidden_states: Tensor, layer: nn.Module, trace: Trace, inner: Inner) -> Tensor:
        """Processes the chosen of (B, M, C) tokens by ``inner``; the others bypass it (Mixture-of-Depths, arXiv 2404.02258).

        A token that was processed is what ``inner`` made of it, unscaled: a pretrained layer starts neutral.
        """
        flow = trace.flow(self.config.stack)
        state = self._eligible(trace, flow)
        choice = self._choose(hidden_states, layer, trace, flow, state)
        decision, estimate = choice.decision, choice.estimate
        inside = flow.tokens
        if estimate.key_bias is not None:
            inside = inside.add_key_bias(estimate.key_bias.masked_fill(~state.routable, 0.0))
        if choice.skipped:
            self._record(trace, choice, state, 0)
            return hidden_states
        through = passing(decision, flow.tokens, decision.rows is not None and self._may_skip(layer, flow))
        part, (before, rest) = through.state(inside), through.take_out(hidden_states)
        # Of rows of one token, part may have those alone that keep theirs.
        if state is not flow.tokens:
            kept: int | Tensor = (decision.kept_mask(state.tokens) & state.routable).sum(-1)
        else:
            kept = part.present if decision.rows is None or decision.valid is None else decision.valid.sum(-1)
        self._record(trace, choice, state, kept)
        after = inner(before, part)
        if estimate.scale is not None:
            protects = state.counts is None or state.counts.protected
            scale = estimate.scale.masked_fill(~state.routable, 1.0) if protects else estimate.scale
            after = before.to(after.dtype).lerp(after, through.of(scale).unsqueeze(-1).to(after.dtype))
        return through.put_back(rest, before, after)

    def _may_skip(self, layer: nn.Module, flow: Flow) -> bool:
        """True if the layer can be skipped for rows with no selected token (evaluation only, weights not sharded, hidden states not
        requested)."""
        return not self.training and not flow.keep_padded and not sharded(layer)

    def _site(self, hidden_states: Tensor, layer: nn.Module, trace: Trace, flow: Flow) -> SiteInput:
        return SiteInput(hidden_states, flow.tokens, trace, flow, self.index, layer, self.adapter)

    def _eligible(self, trace: Trace, flow: Flow) -> TokenState:
        """The tokens at the site, those protected that are outside the stage's scope."""
        if trace.keep.get(self.config.key, self.config.keep) == 1:
            return flow.tokens
        return in_scope(self.config.scope, trace, flow)

    @property
    def _smooths(self) -> bool:
        """What layers add to chunks is smoothed by the probabilities that the scores are."""
        return self.chunks and self.scorer.probabilities and self.selector.cuts

    def _chunks(self, choice: Choice, merged: Merged, eligible: TokenState) -> Chunks:
        decision, probability = choice.decision, None
        if self._smooths and decision.cut is not None:
            # Where a threshold follows the scores, a chunk is as probable as its score is above it. A protected token is certain to stay.
            probability = torch.sigmoid(choice.scored.scores - decision.cut).masked_fill(eligible.protected, 1.0)
            probability = probability.clamp(1e-4, 1 - 1e-4).gather(1, decision.index)
        return Chunks(self.index, merged.hidden_states, decision, probability, choice.estimate.confidence)

    def _choose(self, hidden_states: Tensor, layer: nn.Module, trace: Trace, flow: Flow, state: TokenState) -> Choice:
        requested = trace.keep.get(self.config.key)
        present: int | Tensor = state.present
        original = flow.original
        if state.document is not None:
            # Every document has a count of its own, as if it were alone.
            present = original = state.present_by_document
        count = self.count(present, original, requested)
        keep = self.config.keep if requested is None else requested
        if keep is None:
            # A number of tokens was given: as a fraction it is what this input makes of it.
            entering, kept = (float(n.sum()) if isinstance(n, Tensor) else float(n) for n in (present, count))
            keep = kept / max(entering, 1.0)
        site = replace(self._site(hidden_states, layer, trace, flow), state=state)
        scored: Scored = self.scorer(site)
        request = self._request(keep, count, present, site)
        complete = self.config.scope in COMPLETE
        ahead = self.scorer.lookahead or self.selector.looks_ahead(request)
        if ahead and self.adapter.causal and not complete and not self.training and not trace.lookahead and keep < 1:
            raise ValueError(
                f"stage {self.config.key!r} is non-causal: which tokens it chooses depends on later tokens, which a causal model does not "
                "have when it is deployed. Train with scorer 'linear' and selector 'predictor' or 'threshold', or pass "
                "Trace(lookahead=True) to see what the non-causal decisions would give"
            )
        decision = trace.replay.get(self.config.key)
        if decision is None and complete and (keep >= 1 or bool((torch.as_tensor(count) >= torch.as_tensor(present)).all())):
            # As in every step of generating: nothing of the scope is there, or all of it stays.
            decision = everything(state)
        if decision is None:
            decision = self.selector(scored.scores, state, request)
        auxiliary = self.selector.auxiliary(decision, state, request)
        estimate, skipped = Estimate(), self.bypass and decision.empty and self._may_skip(layer, flow)
        if self.estimator is not None and (self.training or self.estimator.in_evaluation) and not skipped:
            estimate = self.estimator(site, scored, decision)
        if self.training and auxiliary.loss is not None:
            estimate = replace(estimate, loss=auxiliary.loss if estimate.loss is None else estimate.loss + auxiliary.loss)
        return Choice(scored, decision, estimate, keep, ahead, auxiliary.agreement, skipped)

    def _request(self, keep: float, count: int | Tensor, present: int | Tensor, site: SiteInput) -> Request:
        state, trace = site.state, site.trace
        selected = self._selected(count, present)
        if self.selector.adaptive and self.merger.extra and keep < 1:
            # The token that the merger adds is one of those that were requested.
            mean = present.double().mean() if isinstance(present, Tensor) else present
            keep = max(float(keep - self.merger.extra / max(float(mean), 1.0)), 1e-6)
        request = Request(keep, selected, site.hidden_states, trace.lookahead)
        if not self.selector.draws and (self.estimator is None or (isinstance(trace.noise, float) and trace.noise == 0)):
            return request
        rows = trace.rows_identity(state.rows, state.position.device)
        draws = uniform(trace.seed, trace.step, rows, self.index + _NOISE, state.position + site.flow.seen)
        return replace(request, noise=trace.noise, draws=draws)

    def _selected(self, kept: int | Tensor, present: int | Tensor) -> int | Tensor:
        """Tokens for the selector: all, or ``kept`` less what the merger adds."""
        if isinstance(kept, Tensor) or isinstance(present, Tensor):
            return kept - self.merger.extra * (kept < present).long()  # type: ignore[union-attr]
        return kept - self.merger.extra if kept < present else kept

    def _merge(self, site: SiteInput, choice: Choice, eligible: TokenState) -> Merged:
        """Merges with the estimate's paths laid: through the tokens' scale, or through the bias of their keys."""
        hidden_states, state, estimate = site.hidden_states, site.state, choice.estimate
        if estimate.scale is not None:
            scale = estimate.scale.masked_fill(~eligible.routable, 1.0)
            hidden_states = hidden_states * scale.unsqueeze(-1).to(hidden_states.dtype)
        if estimate.key_bias is not None:
            state = state.add_key_bias(estimate.key_bias.masked_fill(~eligible.routable, 0.0))
        merged: Merged = self.merger(replace(site, hidden_states=hidden_states, state=state), choice.scored, choice.decision)
        return merged

    def _record(self, trace: Trace, choice: Choice, state: TokenState, kept: int | Tensor) -> None:
        scores = choice.scored.scores
        trace.routings[self.config.key] = Routing(
            stage=self.config.key,
            scores=scores,
            probabilities=self.scorer.probabilities,
            decision=choice.decision,
            state=state,
            requested=choice.keep,
            present=state.present,
            kept=kept,
            lookahead=choice.lookahead,
            adaptive=self.selector.adaptive,
            bypass=self.bypass,
            auxiliary_loss=choice.estimate.loss,
            agreement=choice.agreement,
        )

    def macs(self, shape: StackShape, tokens: int, kept: int) -> int:
        """MACs of this stage in evaluation for one row going from ``tokens`` to ``kept``, protected ones included."""
        spreading = smoothing_macs(kept, shape.hidden) if self._smooths else 0
        return self.scorer.macs(shape, tokens) + self.selector.macs(shape, tokens) + self.merger.macs(shape, tokens, kept) + spreading


def sharded(layer: nn.Module) -> bool:
    """Its weights lie on several ranks (ZeRO-3), which must all gather them at the same time."""
    # All parameters of a model are, or none is.
    return hasattr(next(layer.parameters(), None), "ds_id")


def stages_of(model: nn.Module) -> dict[str, Stage]:
    """The stages of a compressed model by name, in the order that they run."""
    return {module.config.key: module for module in model.modules() if isinstance(module, Stage)}
