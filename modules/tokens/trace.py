"""Trace: what the caller gives to one forward, and the Routing of each stage that comes back.

Shapes: B rows of a batch, N tokens before the first stage, M tokens now, K tokens after a stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .decision import Decision
from .flow import Flow
from .state import TokenState


@dataclass(frozen=True)
class Routing:
    """What one stage did in one forward. Regularisers, meters, callbacks and pictures read it.

    Attributes:
        stage: name of the stage, the path of its site (``before_3``).
        scores: (B, M) float32 scores of the scorer, with gradient where it has any.
        probabilities: the sigmoid of a score is a keep probability, as of a scorer that is trained.
        decision: which slots stayed.
        state: TokenState before the stage.
        requested: keep that the config or the schedule requested.
        present: routable tokens entering, one int for every row or int64 (B,).
        kept: routable tokens leaving, likewise.
        lookahead: the decision for a token depends on later tokens.
        adaptive: rows keep different numbers; only their mean is what was requested.
        bypass: tokens that were not chosen bypassed the layer and stayed; ``kept`` are those processed.
        auxiliary_loss: scalar that the stage's estimator and selector add to the task's loss in training; None without one.
        agreement: scalar, share of the routable tokens on which a causal predictor and the non-causal decision agree; None where
            there are not both.
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

    @property
    def soft(self) -> Tensor | None:
        """(B, M) float32 keep probabilities in (0, 1); None for a scorer that is not trained."""
        return self.scores.sigmoid() if self.probabilities else None

    @property
    def routable(self) -> Tensor:
        """(B, M) bool, the tokens that could be dropped."""
        return self.state.routable

    def counts(self) -> tuple[int, int]:
        """Routable tokens (kept, present) summed over the rows. Synchronises with the device when rows differ."""
        return self._total(self.kept), self._total(self.present)

    def _total(self, count: int | Tensor) -> int:
        return int(count.sum()) if isinstance(count, Tensor) else count * self.scores.shape[0]

    @property
    def achieved(self) -> float:
        """Hard keep of this forward: routable tokens leaving ÷ entering, summed over rows before dividing."""
        kept, present = self.counts()
        return kept / max(present, 1)

    @property
    def kept_mask(self) -> Tensor:
        """(B, M) bool: the decision at the stage's input, protected tokens True."""
        return self.decision.kept_mask(self.scores.shape[1])


@dataclass
class Trace:
    """Made by the caller for one forward: ``out = model(**batch, trace=trace)``. Two forwards need two traces.

    What the caller gives:

    Attributes:
        step: training step, part of the seed of every random draw.
        seed: seed of the run.
        sample_ids: (B,) int64 identity of each row, so that a row draws the same noise on any number of ranks;
            None numbers the rows of the batch.
        noise: strength of the exploration noise on trained scores, 0 in evaluation.
        keep: requested keep by stage name, over the stages' own; for schedules.
        labels: for estimators that learn from them: (B,) int64 or (B, classes) probabilities of each row; (B, N) int64 of each token
            of a language model; (B, N, classes) of each original token, zeros for a token that has none; or (B, height, width) int64
            of each pixel. The labels that a model is called with stay with its own loss.
        replay: decisions to repeat by stage name, those of an earlier trace; for tests and comparisons.
        lookahead: in evaluation too, a causal model may choose tokens by what comes after them, which ``generate`` never can.
        documents: (B, N) int64, the document of each token of rows that are packed, counted from 0 in each row, -1 for padding.
            None: a causal model finds it in ``position_ids`` that start again, where there is no mask.
        prompt: (B, N) bool, tokens that stages of scope ``prompt`` may touch; None takes those in front of the first label, or where a
            cache is filled all but the last of each row.
        protected: (B, N) bool, tokens that no stage may touch, beside those that the model's family protects; None without any.

    What the forward leaves:

    Attributes:
        routings: the Routing of each stage that ran, by name, in order.
        flows: what the forward of each stack needed while it ran, by stack.
    """

    step: int | Tensor = 0
    seed: int = 0
    sample_ids: Tensor | None = None
    noise: float | Tensor = 0.0
    keep: Mapping[str, float] = field(default_factory=dict)
    labels: Tensor | None = None
    replay: Mapping[str, Decision] = field(default_factory=dict)
    lookahead: bool = False
    documents: Tensor | None = None
    prompt: Tensor | None = None
    protected: Tensor | None = None
    routings: dict[str, Routing] = field(default_factory=dict)
    flows: dict[str, Flow] = field(default_factory=dict)

    def flow(self, stack: str = "") -> Flow:
        """The forward of one stack; made where it is not there yet."""
        return self.flows.setdefault(stack, Flow())

    @property
    def state(self) -> TokenState | None:
        """The tokens that are left in a model of one stack; None before the forward."""
        return self.flow().state

    @property
    def auxiliary_loss(self) -> Tensor | None:
        """Sum of what the estimators add to the task's loss in training; None where none adds anything."""
        losses = [routing.auxiliary_loss for routing in self.routings.values() if routing.auxiliary_loss is not None]
        return torch.stack(losses).sum() if losses else None

    def decisions(self) -> dict[str, Decision]:
        """The decisions of this forward, to give to another trace as ``replay``."""
        return {name: routing.decision for name, routing in self.routings.items()}

    def rows_identity(self, rows: int, device: torch.device) -> Tensor:
        """(B,) int64 identity of each row."""
        if self.sample_ids is None:
            return torch.arange(rows, device=device)
        return self.sample_ids.to(device)
