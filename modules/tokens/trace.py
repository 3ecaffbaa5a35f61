"""What a forward leaves behind: the Routing of each stage, and the Trace that holds them.

Shapes: B rows of a batch, N tokens before the first stage, M tokens now, K tokens after a stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .decision import Decision
from .state import TokenState

if TYPE_CHECKING:
    from .ragged import Packing


@dataclass(frozen=True)
class Routing:
    """What one stage did in one forward. Regularisers, meters, callbacks and pictures read it.

    Attributes:
        stage: name of the stage, the path of its site (``before_3``).
        scores: (B, M) float32 scores of the scorer, with gradient where it has any.
        probabilities: the sigmoid of a score is a keep probability, as of a scorer that is trained.
        decision: which slots stayed.
        state: TokenState before the stage.
        requested: keep that the config or the schedule asked for.
        present: routable tokens entering, one int for every row or int64 (B,).
        kept: routable tokens leaving, likewise.
        lookahead: the decision for a token depends on later tokens.
        adaptive: rows keep different numbers; only their mean is what was requested.
        bypass: tokens that were not chosen went around, not away; ``kept`` are those processed and ``requested`` is a capacity.
        auxiliary_loss: scalar that the stage's estimator and selector add to the task's loss in training; None without one.
        agreement: scalar, share of the routable tokens on which a causal predictor and the look-ahead decision agree; None where
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


@dataclass(frozen=True)
class Chunks:
    """What a restore by ``dechunk`` needs to know of the stage that made the chunks.

    Attributes:
        stage: index of the stage among the model's stages.
        made: (B, K, C) the chunks as they were made.
        decision: which tokens of those before it a chunk stands at.
        probability: (B, K) float32 in (0, 1), with gradient: how sure each of them was, ½ where it just came to be; None where
            nothing says so.
        confidence: (B, M) of value 1, for the router's gradient: a factor on what each token is given; None without it.
    """

    stage: int
    made: Tensor
    decision: Decision
    probability: Tensor | None
    confidence: Tensor | None


@dataclass(frozen=True)
class RowTokens:
    """Real tokens of each row that one layer processed, protected ones included.

    Attributes:
        present: at its input, one int for every row or int64 (B,).
        attention: in its attention half, likewise.
        mlp: in its MLP half, likewise.
    """

    present: int | Tensor
    attention: int | Tensor
    mlp: int | Tensor


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
        labels: for estimators that learn from them: (B,) int64 or (B, classes) probabilities of each row; (B, N, classes) of each
            original token, zeros for a token that has none; or (B, height, width) int64 of each pixel. A model that is called
            with ``labels`` puts them here itself.
        replay: decisions to repeat by stage name, those of an earlier trace; for tests and comparisons.
        lookahead: in evaluation too, a causal model may choose tokens by what comes after them, which ``generate`` never can.
        documents: (B, N) int64, the document of each token of rows that are packed, counted from 0 in each row, -1 for padding.
            A causal model that is called with ``position_ids`` that start again, and without a mask, notes it itself.
        prompt: (B, N) bool, tokens that selector ``prefix`` may take away; None takes those in front of the first label, or where a
            cache is filled all but the last of each row.

    What the forward leaves:

    Attributes:
        routings: the Routing of each stage that ran, by name, in order.
        prefix: protected tokens in front.
        state: the current TokenState, None before the first layer.
        original: routable tokens before the first stage, one int for every row or int64 (B,).
        layer_tokens: real tokens that each layer processed, by layer index.
        packed: how the rows lie in the one long row that layers see now; None while they lie side by side.
        side_by_side: rows of different lengths are not packed, since somebody wants the hidden states of layers.
        under_head: the base model runs inside a model with a head.
        left: hidden states (B, M, C) and TokenState before each shrinking stage, for a restore; empty without one.
        shortest: TokenState just before a restore; None without one.
        chunks: what a restore by ``dechunk`` needs to know; None where no stage makes chunks.
        pixel_values: (B, channels, height, width) the model's input, for scorers that look at it.
        grid: patches (down, across) of the input, None where there is no grid.
        places: (B, N) int64 place in the input that each original token comes from, counted like positions, protected tokens in
            front; None where it is the position itself. A model that shuffles its patches has others.
        valid: (B, N) bool, tokens of a text that are no padding; None where none is.
        seen: tokens that a cache holds in front of those of this forward.
        carry: (B, …) what stages remember of each row's earlier tokens, by name; it lies in the cache. None without a cache.
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
    routings: dict[str, Routing] = field(default_factory=dict)
    prefix: int = 0
    state: TokenState | None = None
    original: int | Tensor = 0
    layer_tokens: dict[int, RowTokens] = field(default_factory=dict)
    packed: Packing | None = None
    side_by_side: bool = False
    under_head: bool = False
    left: list[tuple[Tensor, TokenState]] = field(default_factory=list)
    shortest: TokenState | None = None
    chunks: Chunks | None = None
    pixel_values: Tensor | None = None
    grid: tuple[int, int] | None = None
    places: Tensor | None = None
    valid: Tensor | None = None
    seen: int = 0
    carry: dict[str, Tensor] | None = None

    def places_of(self, state: TokenState) -> Tensor:
        """(B, M) int64 place in the input of each token, counted like positions."""
        return state.position if self.places is None else self.places.gather(1, state.position)

    @property
    def auxiliary_loss(self) -> Tensor | None:
        """Sum of what the estimators add to the task's loss in training; None where none adds anything."""
        losses = [routing.auxiliary_loss for routing in self.routings.values() if routing.auxiliary_loss is not None]
        return torch.stack(losses).sum() if losses else None

    def decisions(self) -> dict[str, Decision]:
        """The decisions of this forward, to give to another trace as ``replay``."""
        return {name: routing.decision for name, routing in self.routings.items()}

    def begin(self, state: TokenState) -> None:
        """Called once, before the first layer."""
        self.state = state
        self.original = state.present

    def rows_identity(self, rows: int, device: torch.device) -> Tensor:
        """(B,) int64 identity of each row."""
        if self.sample_ids is None:
            return torch.arange(rows, device=device)
        return self.sample_ids.to(device)
