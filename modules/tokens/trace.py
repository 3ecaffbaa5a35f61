"""Trace: the caller's settings for one forward, and the Routing of each stage that the forward returns.

Shapes: B rows of a batch, N tokens before the first stage, M tokens now, K tokens after a stage.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .decision import Decision
from .flow import Flow
from .state import TokenState

# Odd, so that the images of two batches have different identities in 32 bits.
_IMAGES = 0x9E3779B1


@dataclass(frozen=True)
class Update:
    """What a layer or its half changed in the K tokens of each row that it processed, before an estimator scales the change.

    Attributes:
        size: (B, K) float32, norm of the change ÷ norm of the token before it.
        cosine: (B, K) float32, cosine of the token before and after it.
        valid: (B, K) bool, False for padding; None without padding.
        tokens: (B, K, C) the tokens before the layer, detached.
        after: (B, K, C) the tokens after it, detached.
    """

    size: Tensor
    cosine: Tensor
    valid: Tensor | None
    tokens: Tensor
    after: Tensor

    @staticmethod
    def of(before: Tensor, after: Tensor, valid: Tensor | None) -> Update:
        """The update from (B, K, C) tokens to (B, K, C), without gradient."""
        old, new = before.detach().float(), after.detach().float()
        size = (new - old).norm(dim=-1) / old.norm(dim=-1).clamp(min=1e-12)
        return Update(size, torch.cosine_similarity(old, new, dim=-1), valid, before.detach(), after.detach())

    @property
    def real(self) -> Tensor:
        """(B, K) bool: neither padding nor a token of length 0, to which nothing is relative."""
        there = self.tokens.abs().amax(-1) > 0
        return there if self.valid is None else there & self.valid

    def mean(self) -> tuple[float, float]:
        """Mean size and mean cosine over all real tokens."""
        weight = self.real.float()
        size, cosine = ((value * weight).sum() / weight.sum().clamp(min=1) for value in (self.size, self.cosine))
        return float(size), float(cosine)


@dataclass(frozen=True)
class Routing:
    """The result of one stage in one forward. Regularizers, meters, callbacks and pictures read it.

    Attributes:
        stage: name of the stage, by default its site and layer (``before_3``).
        scores: (B, M) float32 scores, with gradient if the scorer is trained.
        probabilities: the sigmoid of a score is a keep probability.
        decision: the kept slots.
        state: TokenState before the stage; tokens outside its scope are protected.
        requested: keep requested by the config or the schedule, at this stage by its count rule.
        present: routable tokens entering, one int for every row or int64 (B,).
        kept: routable tokens leaving, likewise; in a bypass, routable tokens processed.
        lookahead: the decision for a token depends on later tokens.
        adaptive: rows keep different numbers of tokens; only their mean meets the request.
        bypass: tokens that were not selected bypassed the layer and stayed in the sequence.
        auxiliary_loss: scalar that estimator and selector add to the task's loss in training; None without one.
        agreement: scalar, fraction of the routable tokens for which a causal predictor and the non-causal decision agree; None if either
            is missing.
        update: what the layer changed in the tokens that it processed; None unless ``Trace.updates`` requests it.
        routed: scorer and selector ran; False where every token is kept and nothing needs the scores, which are 0 then.
        free: the selector leaves the number of tokens to the router.
        length: tokens of each original row without padding, protected ones included, one int for every row or int64 (B,).
    """

    stage: str
    scores: Tensor
    probabilities: bool
    decision: Decision
    state: TokenState
    requested: float
    present: int | Tensor
    kept: int | Tensor
    lookahead: bool
    adaptive: bool = False
    bypass: bool = False
    auxiliary_loss: Tensor | None = None
    agreement: Tensor | None = None
    update: Update | None = None
    routed: bool = True
    free: bool = False
    length: int | Tensor = 0

    def with_update(self, update: Update, loss: Tensor | None) -> Routing:
        """The routing with an update, and with the loss of a scorer that learns to predict it."""
        both = loss if loss is None or self.auxiliary_loss is None else loss + self.auxiliary_loss
        return replace(self, update=update, auxiliary_loss=self.auxiliary_loss if loss is None else both)

    @property
    def soft(self) -> Tensor | None:
        """(B, M) float32 keep probabilities in (0, 1); None for a scorer without probabilities."""
        return self.scores.sigmoid() if self.probabilities else None

    @property
    def routable(self) -> Tensor:
        """(B, M) bool, the tokens that the stage could remove."""
        return self.state.routable

    def counts(self) -> tuple[int, int]:
        """Routable tokens (kept, present) summed over the rows. Synchronises with the device if rows differ."""
        return self._total(self.kept), self._total(self.present)

    def _total(self, count: int | Tensor) -> int:
        return int(count.sum()) if isinstance(count, Tensor) else count * self.scores.shape[0]

    @property
    def achieved(self) -> float:
        """Achieved keep of this forward: routable tokens leaving ÷ entering, summed over rows before dividing; 1 if none entered."""
        kept, present = self.counts()
        return kept / present if present else 1.0

    @property
    def kept_mask(self) -> Tensor:
        """(B, M) bool: the kept tokens at the stage's input, protected tokens included."""
        return self.decision.kept_mask(self.scores.shape[1])


@dataclass
class Trace:
    """Settings and results of one forward: ``out = model(**batch, trace=trace)``. Every forward needs a new trace.

    Set by the caller:

    Attributes:
        step: training step, part of the seed of every random draw.
        seed: seed of the run.
        sample_ids: (B,) int64 identity of each row, so that a row has the same draws on any number of ranks; None numbers the rows of
            the batch.
        noise: strength of the exploration noise on trained scores, 0 in evaluation.
        progress: share of training that is done, for parts that change over it; 1 in evaluation.
        keep: requested keep by stage name, which replaces the stages' own; for schedules.
        idle: names of stages with keep 1 that do nothing in this forward, so that their routers learn nothing in training either; for phases.
        labels: labels for estimators: (B,) int64 or (B, classes) probabilities per row; (B, N) int64 per token of a language model;
            (B, N, classes) per original token, zeros for a token without a label; or (B, height, width) int64 per pixel. The labels that
            a model is called with are used only in its own loss.
        replay: decisions by stage name to reuse, from an earlier trace; for tests and comparisons.
        lookahead: allow non-causal decisions of a causal model in evaluation; ``generate`` never allows them.
        documents: (B, N) int64, document of each token in packed rows, counted from 0 in each row, -1 for padding. None: a causal model
            without a mask derives it from ``position_ids`` that restart.
        prompt: (B, N) bool, tokens that stages of scope ``prompt`` may touch. None takes the tokens before the first label, or with a
            cache the tokens of the first forward, in both cases without the last one. The token after them is the query of scorer
            ``last_query``.
        protected: (B, N) bool, tokens that no stage may touch, in addition to those that the model family protects; None without any.
        blank: the images of this forward are in padding, so that all processes call the same modules: stages before the language model
            keep all of their tokens and count none.
        alone: only this process runs the forward, to measure it: thresholds and budgets ask no other one, which would not answer.
        updates: names of the bypass stages that record what their layer changes, ``Routing.update``.

    Set by the forward:

    Attributes:
        routings: Routing of each stage that ran, by stage name, in running order.
        flows: Flow of each stack, by stack name.
    """

    step: int | Tensor = 0
    seed: int = 0
    sample_ids: Tensor | None = None
    noise: float | Tensor = 0.0
    progress: float | Tensor = 1.0
    keep: Mapping[str, float] = field(default_factory=dict)
    idle: Container[str] = ()
    labels: Tensor | None = None
    replay: Mapping[str, Decision] = field(default_factory=dict)
    lookahead: bool = False
    documents: Tensor | None = None
    prompt: Tensor | None = None
    protected: Tensor | None = None
    blank: bool = False
    alone: bool = False
    updates: Container[str] = ()
    routings: dict[str, Routing] = field(default_factory=dict)
    flows: dict[str, Flow] = field(default_factory=dict)

    def flow(self, stack: str = "") -> Flow:
        """The Flow of one stack; created at the first call."""
        flow = self.flows.get(stack)
        if flow is None:
            flow = self.flows[stack] = Flow()
        return flow

    @contextlib.contextmanager
    def as_tensors(self, device: torch.device) -> Iterator[None]:
        """Context in which the numbers that change from step to step are tensors. Noise 0 stays a number: then nothing is drawn."""
        numbers = self.step, self.noise, self.progress
        self.step, self.progress = (torch.as_tensor(number, device=device) for number in (self.step, self.progress))
        self.noise = torch.as_tensor(self.noise, device=device) if isinstance(self.noise, Tensor) or self.noise else self.noise
        try:
            yield
        finally:
            self.step, self.noise, self.progress = numbers

    @property
    def state(self) -> TokenState | None:
        """TokenState after the forward, of the last stack with stages; None before the forward."""
        states = [flow.state for flow in self.flows.values() if flow.state is not None]
        return states[-1] if states else None

    @property
    def auxiliary_loss(self) -> Tensor | None:
        """Sum of the auxiliary losses of all stages; None if there are none."""
        losses = [routing.auxiliary_loss for routing in self.routings.values() if routing.auxiliary_loss is not None]
        return torch.stack(losses).sum() if losses else None

    def decisions(self) -> dict[str, Decision]:
        """The decisions of this forward by stage name, for ``replay`` in another trace."""
        return {name: routing.decision for name, routing in self.routings.items()}

    def rows_identity(self, rows: int, device: torch.device) -> Tensor:
        """(rows,) int64 identity of each row of a stack.

        Images of a batch whose rows have none or several are numbered from the identity of its first row.
        """
        if self.sample_ids is None:
            return torch.arange(rows, device=device)
        own = self.sample_ids.to(device)
        return own if len(own) == rows else own[:1] * _IMAGES + torch.arange(rows, device=device)
