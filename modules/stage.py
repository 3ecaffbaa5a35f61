"""A stage: router and merger at a site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .backbones.base import Backbone
from .config import PartConfig, StageConfig
from .cost.count_rules import COUNT_RULES, StageCount, at_least_half
from .cost.shape import BackboneShape
from .estimators.base import Estimate, Estimator
from .mergers.base import Merged, Merger
from .scorers.base import Scored, Scorer, SiteInput, TokenSpec
from .selectors.base import Request, Selector
from .tokens.bypass import passing
from .tokens.dechunk import smoothing_macs
from .tokens.decision import Decision
from .tokens.draws import uniform
from .tokens.scope import prompt_of
from .tokens.state import TokenState
from .tokens.trace import Chunks, Routing, Trace

# Keeps the draws of a selector's noise apart from those of a random scorer.
_NOISE = 1 << 20

# The part of a layer that a bypass goes around: (B, K, C) tokens and their state -> (B, K, C).
Inner = Callable[[Tensor, TokenState], Tensor]


@dataclass(frozen=True)
class Choice:
    """What a router said of the tokens at a site."""

    scored: Scored
    decision: Decision
    estimate: Estimate
    keep: float
    lookahead: bool
    agreement: Tensor | None
    skipped: bool


class Stage(nn.Module):
    """Scores the tokens, decides which stay, and lets the merger do it; around a layer, which go through it.

    Args:
        config: what the stage is made of.
        spec: the tokens that it scores.
        index: position among the model's stages.
        backbone: adapter of the model's family.

    Raises:
        ValueError: a part has no such name or option, or parts do not go together.
    """

    def __init__(self, config: StageConfig, spec: TokenSpec, index: int, backbone: type[Backbone]) -> None:
        super().__init__()
        self.config = config
        self.index = index
        self.backbone = backbone
        try:
            self.scorer: Scorer = config.part("scorer").build("scorer", spec)
            self.selector: Selector = config.part("selector").build("selector", spec)
            self.merger: Merger = config.part("merger").build("merger", spec)
            self.estimator: Estimator | None = self._build_estimator()
            self._check_parts()
        except ValueError as error:
            raise ValueError(f"stage {config.key!r}: {error}") from None

    def _build_estimator(self) -> Estimator | None:
        """The config's estimator, or the one that the scorer is made for; none for a scorer that is not trained."""
        given = self.config.estimator
        if self.scorer.estimator is None:
            if given is not None:
                raise ValueError(f"scorer {self.config.part('scorer').name!r} is not trained: leave estimator out")
            return None
        default = "confidence" if self.chunks and self.scorer.probabilities else self.scorer.estimator
        part = PartConfig(default) if given is None else self.config.part("estimator")
        estimator: Estimator = part.build("estimator")
        if estimator.needs_chunks and not self.chunks:
            raise ValueError(
                f"estimator {part.name!r} is for chunks of a causal model that a restore by 'dechunk' spreads; leave estimator out"
            )
        if estimator.bypass_only and not self.bypass:
            raise ValueError(
                f"estimator {part.name!r} weighs what a layer adds to the tokens around it: give site = 'around', or leave it out"
            )
        if estimator.needs_answers != self.scorer.answers_task:
            raise ValueError(
                f"estimator {part.name!r} cannot train scorer {self.config.part('scorer').name!r}: "
                f"leave estimator out, or take {self.scorer.estimator!r}"
            )
        return estimator

    def _check_parts(self) -> None:
        scorer, selector, merger = (self.config.part(kind).name for kind in ("scorer", "selector", "merger"))
        if self.merger.needs_partner and not self.scorer.matches:
            raise ValueError(f"merger {merger!r} merges the pairs that scorer 'bipartite' finds, not those of {scorer!r}; try 'squeeze'")
        if self.selector.needs_probabilities and not self.scorer.probabilities:
            raise ValueError(f"selector {selector!r} takes scores for probabilities, which those of scorer {scorer!r} are not")
        if self.selector.adaptive and self.config.count is not None:
            raise ValueError(
                f"count = {self.config.count!r} has nothing to count: selector {selector!r} keeps as many as score high; leave it out"
            )
        if self.scorer.matches and self.bypass:
            raise ValueError(f"scorer {scorer!r} finds pairs to merge, and around a layer nothing is merged; take another one")
        if self.scorer.matches and self.config.fraction is not None and self.config.fraction < 0.5:
            raise ValueError(
                f"keep = {self.config.fraction}: scorer {scorer!r} can take away half of the tokens at most; give 0.5 or more, and more stages"
            )
        if self.selector.adaptive and (self.scorer.matches or self.merger.outputs is not None or self.config.tokens is not None):
            what = f"tokens = {self.config.tokens}" if self.config.tokens is not None else f"scorer {scorer!r} with merger {merger!r}"
            raise ValueError(
                f"selector {selector!r} lets every row keep as many as it likes, which {what} does not allow; take 'top_k', or give keep or capacity"
            )
        if self.selector.prompt_only and (self.bypass or not self.backbone.causal):
            where = f"site = {self.config.site!r}" if self.bypass else "a model that is not causal"
            raise ValueError(f"selector {selector!r} shortens the prompt of a causal model at site 'before'; with {where} take another one")
        if self.merger.outputs is not None and self.config.tokens != self.merger.outputs:
            raise ValueError(f"merger {merger!r} makes {self.merger.outputs} tokens: give the stage tokens = {self.merger.outputs}")

    @property
    def bypass(self) -> bool:
        """Tokens that are not chosen go around."""
        return self.config.bypass

    @property
    def chunks(self) -> bool:
        """The tokens that leave stand for those behind them too, of a causal model, and a restore gives all of them what layers add."""
        return self.backbone.causal and not self.bypass and not self.selector.prompt_only

    @property
    def lookahead(self) -> bool:
        """In evaluation, the decision for a token depends on later tokens."""
        return self.scorer.lookahead or self.selector.lookahead

    @property
    def deployable(self) -> bool:
        """A causal model can run it token by token: it looks at nothing that is not there yet."""
        return self.whole or self.selector.prompt_only or not self.lookahead

    @property
    def idle(self) -> bool:
        """It changes nothing: every token goes through, and none is weighed."""
        return self.whole and not (self.estimator is not None and self.estimator.in_evaluation)

    @property
    def whole(self) -> bool:
        """It leaves every token as it is."""
        return self.config.fraction == 1.0

    def count(self, present: int | Tensor, original: int | Tensor, keep: float | None = None) -> int | Tensor:
        """Routable tokens that leave (or go through, around a layer), a merger's added token included.

        Args:
            present: routable tokens at the site.
            original: routable tokens before the first stage.
            keep: instead of the stage's own keep, capacity or number.
        """
        wanted = self.config.fraction if keep is None else keep
        if keep is None and self.config.tokens is not None:
            fixed = self.config.tokens
            count = torch.clamp(present, max=fixed) if isinstance(present, Tensor) else min(present, fixed)
        else:
            assert wanted is not None
            count = COUNT_RULES[self.config.count or self.scorer.count](present, wanted, StageCount(original, self.index))
        return at_least_half(present, count) if self.scorer.matches else count

    def expected(self, present: float, original: float, keep: float | None = None) -> float:
        """``count``, for cost: where rows keep different numbers, their mean, which is no whole number."""
        if self.selector.adaptive:
            wanted = self.config.fraction if keep is None else keep
            assert wanted is not None
            return present * wanted
        count = self.count(round(present), round(original), keep)
        assert isinstance(count, int)
        return count

    def forward(self, hidden_states: Tensor, layer: nn.Module, trace: Trace) -> Tensor:
        """Shrinks (B, M, C) tokens to (B, K, C); the new TokenState and the Routing go onto the trace."""
        state = _state(trace)
        eligible = self._eligible(trace)
        choice = self._choose(hidden_states, layer, trace, eligible)
        merged = self._merge(self._site(hidden_states, layer, trace), choice, eligible)
        # Counted on what the merger made, not taken from the rule.
        left = merged.state if eligible is state else eligible.select(choice.decision.index, choice.decision.valid)
        self._record(trace, choice, eligible, left.present)
        trace.state = replace(merged.state, empty=True) if choice.decision.empty else merged.state
        if self.chunks:
            trace.chunks = self._chunks(choice, merged)
        return merged.hidden_states

    def around(self, hidden_states: Tensor, layer: nn.Module, trace: Trace, inner: Inner) -> Tensor:
        """Sends the chosen of (B, M, C) tokens through ``inner`` and the others around it (Mixture-of-Depths, arXiv 2404.02258).

        A token that went through is what ``inner`` made of it, unscaled: a pretrained layer starts neutral.
        """
        state = _state(trace)
        choice = self._choose(hidden_states, layer, trace, state)
        decision, estimate = choice.decision, choice.estimate
        inside = state if estimate.key_bias is None else state.add_key_bias(estimate.key_bias.masked_fill(~state.routable, 0.0))
        if choice.skipped:
            self._record(trace, choice, state, 0)
            return hidden_states
        through = passing(decision, state, decision.rows is not None and self._may_skip(layer, trace))
        part, (before, rest) = through.state(inside), through.take_out(hidden_states)
        # Of rows of one token, part may have those alone that keep theirs.
        self._record(trace, choice, state, part.present if decision.rows is None or decision.valid is None else decision.valid.sum(-1))
        after = inner(before, part)
        if estimate.scale is not None:
            scale = estimate.scale.masked_fill(~state.routable, 1.0) if state.protected_per_row else estimate.scale
            after = before.to(after.dtype).lerp(after, through.of(scale).unsqueeze(-1).to(after.dtype))
        return through.put_back(rest, before, after)

    def _may_skip(self, layer: nn.Module, trace: Trace) -> bool:
        """The layer need not run for rows of which nothing goes through: no gradient is missed, no other rank waits, nobody reads them."""
        return not self.training and not trace.side_by_side and not sharded(layer)

    def _site(self, hidden_states: Tensor, layer: nn.Module, trace: Trace) -> SiteInput:
        return SiteInput(hidden_states, _state(trace), trace, self.index, layer, self.backbone)

    def _eligible(self, trace: Trace) -> TokenState:
        """The tokens at the site, those protected that this stage may not touch."""
        state = _state(trace)
        if not self.selector.prompt_only or trace.keep.get(self.config.key, self.config.fraction) == 1:
            return state
        # Rows have prompts of different lengths, so that counts are those of each row.
        valid = torch.ones_like(state.protected) if state.valid is None else state.valid
        return replace(state, protected=~prompt_of(trace, state), valid=valid)

    @property
    def _smooths(self) -> bool:
        """What layers add to chunks is smoothed by the probabilities that the scores are."""
        return self.chunks and self.scorer.probabilities and self.selector.cuts

    def _chunks(self, choice: Choice, merged: Merged) -> Chunks:
        decision, probability = choice.decision, None
        if self._smooths and decision.cut is not None:
            # Where a threshold follows the scores, a chunk is as sure as it is above it.
            probability = torch.sigmoid(choice.scored.scores - decision.cut).clamp(1e-4, 1 - 1e-4).gather(1, decision.index)
        return Chunks(self.index, merged.hidden_states, decision, probability, choice.estimate.confidence)

    def _choose(self, hidden_states: Tensor, layer: nn.Module, trace: Trace, state: TokenState) -> Choice:
        asked = trace.keep.get(self.config.key)
        present: int | Tensor = state.present
        original = trace.original
        if state.document is not None:
            # Every document has a count of its own, as if it were alone.
            present = original = state.present_by_document
        count = self.count(present, original, asked)
        keep = self.config.fraction if asked is None else asked
        if keep is None:
            # A number of tokens was given: as a fraction it is what this input makes of it.
            entering, kept = (float(n.sum()) if isinstance(n, Tensor) else float(n) for n in (present, count))
            keep = kept / max(entering, 1.0)
        site = replace(self._site(hidden_states, layer, trace), state=state)
        scored: Scored = self.scorer(site)
        request = self._request(keep, count, present, site)
        ahead = self.scorer.lookahead or self.selector.looks_ahead(request)
        if ahead and self.backbone.causal and not self.selector.prompt_only and not self.training and not trace.lookahead and keep < 1:
            raise ValueError(
                f"stage {self.config.key!r} looks ahead: which tokens it chooses hangs on later tokens, which a causal model has not got "
                "when it is deployed. Train with scorer 'linear' and selector 'predictor' or 'threshold', or pass Trace(lookahead=True) "
                "to see what looking ahead would give"
            )
        decision = trace.replay.get(self.config.key)
        if decision is None:
            decision = self.selector(scored.scores, state, request)
        taught = self.selector.auxiliary(decision, state, request)
        estimate, skipped = Estimate(), self.bypass and decision.empty and self._may_skip(layer, trace)
        if self.estimator is not None and (self.training or self.estimator.in_evaluation) and not skipped:
            estimate = self.estimator(scored.scores, scored.answers, decision, state, trace)
        if self.training and taught.loss is not None:
            estimate = replace(estimate, loss=taught.loss if estimate.loss is None else estimate.loss + taught.loss)
        return Choice(scored, decision, estimate, keep, ahead, taught.agreement, skipped)

    def _request(self, keep: float, count: int | Tensor, present: int | Tensor, site: SiteInput) -> Request:
        state, trace = site.state, site.trace
        selected = self._selected(count, present)
        if self.selector.adaptive and self.merger.extra and keep < 1:
            # The token that the merger adds is one of those that were asked for.
            mean = present.double().mean() if isinstance(present, Tensor) else present
            keep = max(float(keep - self.merger.extra / max(float(mean), 1.0)), 1e-6)
        request = Request(keep, selected, site.hidden_states, trace.lookahead)
        if not self.selector.draws and (self.estimator is None or (isinstance(trace.noise, float) and trace.noise == 0)):
            return request
        rows = trace.rows_identity(state.rows, state.position.device)
        return replace(
            request, noise=trace.noise, draws=uniform(trace.seed, trace.step, rows, self.index + _NOISE, state.position + trace.seen)
        )

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

    def macs(self, shape: BackboneShape, tokens: int, kept: int) -> int:
        """MACs of this stage in evaluation for one row going from ``tokens`` to ``kept``, protected ones included."""
        spreading = smoothing_macs(kept, shape.hidden) if self._smooths else 0
        return self.scorer.macs(shape, tokens) + self.selector.macs(shape, tokens) + self.merger.macs(shape, tokens, kept) + spreading


def _state(trace: Trace) -> TokenState:
    assert trace.state is not None
    return trace.state


def sharded(layer: nn.Module) -> bool:
    """Its weights lie on several ranks (ZeRO-3), which must all ask for them at the same time."""
    # All parameters of a model are, or none is.
    return hasattr(next(layer.parameters(), None), "ds_id")
