"""Stage: a router (scorer and selector) and a merger at one site of a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import registry
from .backbones.layer_adapter import LayerAdapter
from .backbones.stack import sharded
from .config import COMPLETE, PartConfig, StageConfig
from .cost.shape import StackShape
from .cost.stage_counts import CountsTokens
from .estimators.base import Choice, Estimate, Estimator
from .mergers.base import Merged, Merger
from .scorers.base import Scored, Scorer
from .selectors.base import Auxiliary, Request, Selector, everything
from .shortcuts.base import Shortcut
from .site import SiteInput, TokenSpec
from .stages.left_out import NoScores, NoTokens, no_decision
from .stages.refused import refused_noncausal, refused_unset
from .stages.scoring import scores_of
from .tokens.bypass import passing
from .tokens.dechunk import smoothing_macs
from .tokens.draws import uniform
from .tokens.flow import Chunks, Flow
from .tokens.scope import in_scope
from .tokens.state import TokenState
from .tokens.trace import Routing, Trace, Update
from .tokens.units import Units

# Offset of the draw index: selector noise must not repeat the draws of a random scorer.
_NOISE = 1 << 20

# The part of a layer that a stage bypasses: (B, K, C) selected tokens and their TokenState -> (B, K, C).
Inner = Callable[[Tensor, TokenState], Tensor]


class Stage(CountsTokens, nn.Module):
    """Scores the tokens at a site, decides which are kept, and merges. At a bypass site it selects the tokens that are processed.

    Args:
        config: configuration of the stage.
        spec: the tokens that its parts are built for.
        index: index among the model's stages.
        adapter: adapter of the stack's layers.
        place: index among the stack's stages; None means ``index``.
        places: number of the stack's stages.
        reads: name of the earlier stage whose decision this one reads; None if it reads none.

    Raises:
        ValueError: a part has an unknown name or option. ``compatibility`` checks whether the parts fit together.
    """

    def __init__(
        self,
        config: StageConfig,
        spec: TokenSpec,
        index: int,
        adapter: type[LayerAdapter],
        place: int | None = None,
        places: int = 1,
        reads: str | None = None,
    ) -> None:
        super().__init__()
        self.reads = reads
        self.config = config
        self.index = index
        self.place = index if place is None else place
        self.places = places
        self.adapter = adapter
        # Tokens that stay or leave together; at a bypass site each is processed or not by itself.
        self.unit = 1 if config.bypass else spec.unit
        spec = replace(spec, unit=self.unit)
        try:
            self.scorer, self.selector = self._build_router(spec)
            self.merger: Merger = registry.build("merger", config.part("merger"), spec)
            self.estimator: Estimator | None = self._build_estimator()
            self.shortcut: Shortcut | None = None if config.shortcut is None else registry.build("shortcut", config.shortcut, spec)
            if self.scorer.fits_updates and not config.bypass:
                raise ValueError(
                    f"site = {config.site!r}: scorer {config.part('scorer').name!r} predicts what a layer adds: take site 'around'"
                )
            if self.shortcut is not None and not config.bypass:
                raise ValueError(f"site = {config.site!r}: no layer is bypassed there that shortcut {config.shortcut.name!r} could replace")
        except ValueError as error:
            raise ValueError(f"stage {config.key!r}: {error}") from None

    def _build_router(self, spec: TokenSpec) -> tuple[Scorer, Selector]:
        if self.config.left_out:
            return NoScores(spec), NoTokens(spec)
        return registry.build("scorer", self.config.part("scorer"), spec), registry.build("selector", self.config.part("selector"), spec)

    def _build_estimator(self) -> Estimator | None:
        """The config's estimator, or else the scorer's default; None if the scorer is not trained."""
        default = self.scorer.chunk_estimator if self.chunks and self.scorer.chunk_estimator else self.scorer.estimator
        if self.config.estimator is None and default is None:
            return None
        part = self.config.part("estimator") if self.config.estimator is not None else PartConfig(str(default))
        estimator: Estimator = registry.build("estimator", part)
        return estimator

    @property
    def bypass(self) -> bool:
        """Tokens that are not selected bypass the layer or its half; the sequence keeps its length."""
        return self.config.bypass

    @property
    def skips(self) -> bool:
        """The layer or its half is left out for every token, protected ones included."""
        return self.config.left_out and self.config.scope == "all"

    @property
    def needs_threshold(self) -> bool:
        """True if the decisions of a causal stage depend on a threshold that has seen no score yet."""
        return self.adapter.causal and not self.whole and self.selector.uncalibrated

    @property
    def chunks(self) -> bool:
        """A causal stage that shortens the text: each kept token represents a chunk, and a restore by ``dechunk`` follows."""
        return self.adapter.causal and not self.bypass and self.config.scope not in COMPLETE

    @property
    def lookahead(self) -> bool:
        """In evaluation, the decision for a token depends on later tokens."""
        return self.scorer.lookahead or self.selector.lookahead

    @property
    def deployable(self) -> bool:
        """A causal model can run the stage token by token: no decision depends on tokens that are not generated yet."""
        return not self.adapter.causal or self.whole or self.config.scope in COMPLETE or not self.lookahead

    @property
    def idle(self) -> bool:
        """The stage has no effect: every token is processed, with weight 1."""
        return self.idle_at(self.config.keep)

    def idle_at(self, keep: float | None) -> bool:
        """In evaluation at this keep the stage has no effect, and its router and merger do not run."""
        return keep == 1 and self.merger.outputs is None and not (self.estimator is not None and self.estimator.in_evaluation)

    def _idles(self, trace: Trace) -> bool:
        """The router need not run: every token is kept, and nothing learns from the scores or compares them with updates."""
        name = self.config.key
        learns = self.training and name not in trace.idle and (self.estimator is not None or self.scorer.learns_updates)
        return not (learns or name in trace.updates or name in trace.replay) and self.idle_at(trace.keep.get(name, self.config.keep))

    @property
    def whole(self) -> bool:
        """The stage keeps every token."""
        return self.config.keep == 1.0

    def forward(self, hidden_states: Tensor, layer: nn.Module, trace: Trace, inputs: Mapping[str, Any] | None = None) -> Tensor:
        """(B, M, C) -> (B, K, C). Sets the flow's TokenState and adds the stage's Routing to the trace.

        Args:
            hidden_states: (B, M, C) current tokens.
            layer: layer that the site belongs to.
            trace: Trace of the forward.
            inputs: the layer's keyword arguments, for parts that read them.
        """
        flow, site = trace.flow(self.config.stack), self._site(hidden_states, layer, trace, inputs)
        state, eligible = flow.tokens, self._eligible(trace, flow)
        choice = self._choose(site, eligible)
        merged = self._merge(site, choice, eligible)
        # Counted on the merger's output, not computed by the count rule.
        left = merged.state if eligible is state else eligible.select(choice.decision.index, choice.decision.valid)
        self._record(trace, choice, eligible, left.present)
        flow.state = replace(merged.state, empty=True) if choice.decision.empty else merged.state
        if self.chunks:
            scores = choice.scored.scores if self._smooths else None
            flow.chunks = Chunks.of(self.index, merged.hidden_states, choice.decision, eligible, scores, choice.estimate.confidence)
        return merged.hidden_states

    def around(
        self, hidden_states: Tensor, layer: nn.Module, trace: Trace, inner: Inner, inputs: Mapping[str, Any] | None = None
    ) -> Tensor:
        """Applies ``inner`` to the selected tokens of (B, M, C); the others bypass it (Mixture-of-Depths, arXiv 2404.02258).

        The output of ``inner`` is not multiplied by the score, so a pretrained layer is unchanged at the start.
        """
        flow = trace.flow(self.config.stack)
        state = self._eligible(trace, flow)
        if self._skipped(trace):
            scores = torch.zeros(state.position.shape, device=hidden_states.device)
            self._record(trace, Choice(Scored(scores), no_decision(state), Estimate(), 0.0, False, None, True), state, 0)
            return self._shortened(hidden_states, hidden_states, state.routable)
        choice = self._choose(self._site(hidden_states, layer, trace, inputs), state)
        decision, estimate = choice.decision, choice.estimate
        inside = flow.tokens
        if estimate.key_bias is not None:
            inside = inside.add_key_bias(estimate.key_bias.masked_fill(~state.routable, 0.0))
        if choice.skipped:
            self._record(trace, choice, state, 0)
            return self._shortened(hidden_states, hidden_states, state.routable)
        through = passing(decision, flow.tokens, decision.rows is not None and self._may_skip(layer, flow))
        part, (before, rest) = through.state(inside), through.take_out(hidden_states)
        # If rows have one token each, ``part`` may hold only the rows whose token is selected.
        if state.counts is not None and decision.valid is None:
            kept: int | Tensor = decision.index.shape[1] - state.counts.protected
        elif state is not flow.tokens:
            kept = (decision.kept_mask(state.tokens) & state.routable).sum(-1)
        else:
            kept = part.present if decision.rows is None or decision.valid is None else decision.valid.sum(-1)
        self._record(trace, choice, state, kept)
        after = inner(before, part)
        learns = self.training and choice.routed and self.scorer.learns_updates
        if self.config.key in trace.updates or learns:
            update = Update.of(before, after, part.valid)
            loss = self.scorer.update_loss(through.of(choice.scored.scores), update) if learns else None
            trace.routings[self.config.key] = trace.routings[self.config.key].with_update(update, loss)
        if estimate.scale is not None:
            protects = state.counts is None or state.counts.protected
            scale = estimate.scale.masked_fill(~state.routable, 1.0) if protects else estimate.scale
            after = before.to(after.dtype).lerp(after, through.of(scale).unsqueeze(-1).to(after.dtype))
        output = through.put_back(rest, before, after)
        if (self.shortcut is None or not (choice.routed or self.training)) and estimate.bypassed is None:
            return output
        bypassing = state.routable & ~decision.kept_mask(state.tokens)
        if estimate.bypassed is not None:
            output = output * estimate.bypassed.masked_fill(~bypassing, 1.0).unsqueeze(-1).to(output.dtype)
        return self._shortened(output, hidden_states, bypassing)

    def _shortened(self, output: Tensor, hidden_states: Tensor, bypassing: Tensor) -> Tensor:
        """(B, M, C) output of the site, with what the shortcut adds to the (B, M) tokens that bypass it; they are ``hidden_states`` before it."""
        if self.shortcut is None:
            return output
        added: Tensor = self.shortcut(hidden_states)
        return output + added.masked_fill(~bypassing.unsqueeze(-1), 0.0).to(output.dtype)

    def processed(self, trace: Trace) -> int | Tensor:
        """Tokens per row that the layer or its half has processed in a forward, protected ones included."""
        routing = trace.routings[self.config.key]
        return 0 if self._skipped(trace) else routing.kept + routing.state.protected_real

    def _skipped(self, trace: Trace) -> bool:
        return self.skips and trace.keep.get(self.config.key, 0.0) == 0

    def _may_skip(self, layer: nn.Module, flow: Flow) -> bool:
        """True if the layer can be skipped for rows with no selected token: evaluation only, weights not sharded, hidden states not
        requested."""
        return not self.training and not flow.keep_padded and not sharded(layer)

    def _site(self, hidden_states: Tensor, layer: nn.Module, trace: Trace, inputs: Mapping[str, Any] | None) -> SiteInput:
        flow = trace.flow(self.config.stack)
        return SiteInput(hidden_states, flow.tokens, trace, flow, self.index, layer, self.adapter, inputs or {})

    def _eligible(self, trace: Trace, flow: Flow) -> TokenState:
        """TokenState at the site, with tokens outside the stage's scope marked as protected."""
        if trace.keep.get(self.config.key, self.config.keep) == 1 and self.config.key not in trace.updates:
            return flow.tokens
        config = self.config
        return in_scope(config.scope, trace, flow, config.first, config.last, config.special)

    @property
    def _smooths(self) -> bool:
        """The restore smooths the layers' output over chunks, by the scores' probabilities."""
        return self.chunks and self.scorer.probabilities and self.selector.cuts

    def _choose(self, site: SiteInput, state: TokenState) -> Choice:
        trace, flow = site.trace, site.flow
        if self._idles(trace):
            every = everything(state)
            return Choice(
                Scored(torch.zeros_like(state.size), partner=every.index), every, Estimate(), 1.0, False, None, False, routed=False
            )
        requested = trace.keep.get(self.config.key)
        units = Units.at(state, flow.units, self.unit, flow.leading)
        # The tokens among which the selector chooses.
        choices = state if units is None else units.state
        present: int | Tensor = choices.present
        original = flow.original // self.unit
        if state.document is not None:
            # Each document has its own count, as if it were alone in the row.
            assert flow.original_by_document is not None
            present, original = state.present_by_document, flow.original_by_document
        count = self._count(present, original, requested)
        keep = self.config.keep if requested is None else requested
        if keep is None:
            # The config gives a number of tokens: convert it to a fraction of this input.
            entering, kept = (float(n.sum()) if isinstance(n, Tensor) else float(n) for n in (present, count))
            keep = kept / entering if entering else 1.0
        own = keep if requested is None else self.config.keep
        site = site if state is site.state else replace(site, state=state)
        scored = scores_of(self.scorer, site)
        if units is not None:
            mean = units.mean(scored.scores)
            scored = replace(scored, scores=units.spread(mean))
        request = self._request(
            keep, own, count, present, site if units is None else replace(site, state=choices, hidden_states=units.mean(site.hidden_states))
        )
        complete = self.config.scope in COMPLETE
        noncausal = self.scorer.lookahead or self.selector.is_noncausal(request)
        if noncausal and self.adapter.causal and not complete and not self.training and not trace.lookahead and keep < 1:
            raise refused_noncausal(self.config.key)
        decision = trace.replay.get(self.config.key)
        # A threshold decides for each token, whatever their number.
        enough = present * 0 if self.selector.adaptive else count
        # In training, or with shards of weights, all processes must call the same modules, also one whose rows have no token of the scope.
        together = self.training or (complete and sharded(site.layer))
        fewer = together or bool((torch.as_tensor(enough) < torch.as_tensor(present)).any()) if complete and keep < 1 else False
        if decision is None and complete and not fewer:
            # The scope has no tokens, as in every generation step after the first, or all of them are kept: no selection is needed.
            decision = everything(state)
        deployed = keep < 1 and self.adapter.causal and not noncausal and not self.selector.training
        if decision is None and deployed and self.selector.uncalibrated:
            raise refused_unset(self.config.key)
        auxiliary = Auxiliary()
        if units is None:
            if decision is None:
                decision = self.selector(self._ranked(scored.scores, trace), state, request)
            auxiliary = self.selector.auxiliary(decision, state, request)
        elif decision is None:
            chosen = self.selector(mean, choices, request)
            auxiliary = self.selector.auxiliary(chosen, choices, request)
            decision = everything(state) if chosen.everything else units.tokens_of(chosen, state)
        untouched = decision.empty and (self.estimator is None or not self.estimator.of_bypassed)
        estimate, skipped = Estimate(), self.bypass and untouched and self._may_skip(site.layer, flow)
        if self.estimator is not None and (self.training or self.estimator.in_evaluation) and not skipped:
            estimate = self.estimator(site, scored, decision)
        if self.training and auxiliary.loss is not None:
            estimate = replace(estimate, loss=auxiliary.loss if estimate.loss is None else estimate.loss + auxiliary.loss)
        asked = keep if requested is None and self.config.tokens is not None else self.share(keep)
        return Choice(scored, decision, estimate, asked, noncausal, auxiliary.agreement, skipped)

    def _ranked(self, scores: Tensor, trace: Trace) -> Tensor:
        """Scores by which tokens are selected: those that the last stage has left out gain ``spread``."""
        if not self.config.spread or self.reads is None:
            return scores
        return scores + self.config.spread * ~trace.routings[self.reads].kept_mask

    def _request(self, keep: float, own: float | None, count: int | Tensor, present: int | Tensor, site: SiteInput) -> Request:
        state, trace = site.state, site.trace
        selected = self._selected(count, present)
        if self.selector.adaptive and self.merger.extra and keep < 1:
            # The merger's added token is one of the requested tokens.
            mean = present.double().mean() if isinstance(present, Tensor) else present
            added = self.merger.extra / max(float(mean), 1.0)
            keep, own = max(float(keep - added), 1e-6), None if own is None else max(float(own - added), 1e-6)
        request = Request(keep, selected, site.hidden_states, trace.lookahead, own=own, alone=trace.alone)
        if not self.selector.draws and (self.estimator is None or (isinstance(trace.noise, float) and trace.noise == 0)):
            return request
        rows = trace.rows_identity(state.rows, state.position.device)
        draws = uniform(trace.seed, trace.step, rows, self.index + _NOISE, state.position + site.flow.seen)
        return replace(request, noise=trace.noise, draws=draws)

    def _selected(self, kept: int | Tensor, present: int | Tensor) -> int | Tensor:
        """Number of tokens that the selector keeps: ``kept`` less the tokens that the merger adds."""
        extra = self.merger.extra
        if extra and (isinstance(kept, Tensor) or isinstance(present, Tensor)):
            return kept - extra * (kept < present).long()  # type: ignore[union-attr]
        return kept - extra if extra and kept < present else kept

    def _merge(self, site: SiteInput, choice: Choice, eligible: TokenState) -> Merged:
        """Merges, after applying the estimate's scale to the tokens and its bias to their keys."""
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
            routed=choice.routed,
            free=self.selector.needs_probabilities if self.config.follows is None else trace.routings[str(self.reads)].free,
            length=trace.flow(self.config.stack).dense,
        )

    def macs(self, shape: StackShape, tokens: int, kept: int) -> int:
        """MACs of this stage in evaluation for one row, ``tokens`` before and ``kept`` after it, protected tokens included."""
        spreading = smoothing_macs(kept, shape.hidden) if self._smooths else 0
        parts = self.scorer.macs(shape, tokens) + self.selector.macs(shape, tokens) + self.merger.macs(shape, tokens, kept)
        return parts + spreading + (0 if self.shortcut is None else self.shortcut.macs(shape, tokens))


def stages_of(model: nn.Module) -> dict[str, Stage]:
    """The stages of a compressed model by name, in running order."""
    return {module.config.key: module for module in model.modules() if isinstance(module, Stage)}
