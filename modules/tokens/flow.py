"""Flow: the state of one stack's forward.

Shapes: B rows of a batch, N tokens before the first stage, M tokens now, K tokens after a stage.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from .decision import Decision
from .gather import Compact, compact, take
from .ragged import Packing
from .state import TokenState


@dataclass(frozen=True)
class Chunks:
    """The data of a stage that makes chunks, for the restore by ``dechunk``.

    Attributes:
        stage: index of the stage among the model's stages.
        made: (B, K, C) hidden states of the chunks directly after the stage.
        decision: the kept tokens, one per chunk.
        probability: (B, K) float32 in (0, 1), with gradient: boundary probability, 0.5 exactly at the threshold; None if the scores
            are not probabilities.
        confidence: (B, M) factor of value 1 on each token's update, for the router's gradient; None without one.
    """

    stage: int
    made: Tensor
    decision: Decision
    probability: Tensor | None
    confidence: Tensor | None

    @staticmethod
    def of(stage: int, made: Tensor, decision: Decision, state: TokenState, scores: Tensor | None, confidence: Tensor | None) -> Chunks:
        """
        Args:
            stage, made, decision, confidence: as the attributes.
            state: TokenState before the stage; tokens outside its scope are protected.
            scores: (B, M) float32 log-odds of a boundary, for a decision by a threshold; None if they are none.
        """
        probability = None
        if scores is not None and decision.cut is not None:
            # The threshold is where a chunk has probability 0.5. A protected token is always kept.
            probability = torch.sigmoid(scores - decision.cut).masked_fill(state.protected, 1.0)
            probability = probability.clamp(1e-4, 1 - 1e-4).gather(1, decision.index)
        return Chunks(stage, made, decision, probability, confidence)


@dataclass(frozen=True)
class RowTokens:
    """Real tokens per row that one layer processed, protected tokens included.

    Attributes:
        present: tokens at the layer's input, one int for every row or int64 (B,).
        attention: tokens in its attention half, likewise.
        mlp: tokens in its MLP half, likewise.
    """

    present: int | Tensor
    attention: int | Tensor
    mlp: int | Tensor


@dataclass
class Flow:
    """State of the forward of one stack. The model adapter sets the inputs; the stack's layers and stages set the rest.

    Set before the first layer:

    Attributes:
        leading: number of protected tokens at the start of each row.
        protected: (B, N) bool, further tokens that no stage may touch; None without any.
        valid: (B, N) bool, False for padding; None if there is no padding, or if the layers' mask marks it.
        documents: (B, N) int64, document of each token in packed rows, -1 for padding; None if a row is one document.
        special: (B, N) bool, tokens that begin or end a text, by the model's config; None if the config names none, or without ids.
        causal_only: a graph is compiled in which a token sees all earlier ones of its row: a mask of the model says no more than SDPA's own.
        visual: (B, N) bool, tokens that come from images or video; None in a model without them.
        absent: (B, N) bool, tokens that an earlier stack removed: no layer of this stack processes them; None if none was removed.
        pixel_values: (B, channels, height, width) the model's input, for parts that read pixels; None otherwise.
        grid: number of patches (down, across) of the input; None if there is no grid.
        places: (B, N) int64, for each original token its place in the grid plus ``leading``; None if the place is the token's position.
            Models that shuffle their patches set it.
        units: (B or 1, N) int64, unit of each original token, counted from 0, -1 for leading tokens; None if tokens are not joined later.
        rows: number of rows of the stack, for the cost; images or tiles in a tower, 0 without an image.
        seen: number of tokens in the cache before those of this forward.
        earlier: number of real tokens in the cache, without padding, one int for every row or int64 (B,).
        carry: (B, …) tensors by name, data of stages about each row's earlier tokens, stored in the cache; None without a cache.
        blank: the rows stand for nothing: no stage touches their tokens.
        keep_padded: rows of different lengths stay padded and are not packed, because the layers' hidden states were requested.
        under_head: the base model runs inside a model with a head.

    Changed by layers and stages:

    Attributes:
        state: TokenState of the current tokens; None before the first layer.
        original: routable tokens before the first stage, without absent ones, one int for every row or int64 (B,).
        original_by_document: (B, N) int64, the same of each document; None if a row is one document.
        gone: number of absent tokens, likewise.
        dense: real tokens of the dense model, protected and absent ones included, likewise.
        present: slots of the tokens that are not absent; None if no token is absent.
        places_kept: (B, N, C) hidden states with the places of absent tokens, of which a layer processes the others.
        layer_tokens: real tokens that each layer processed, by layer index.
        packed: the current packing of the rows; None while rows are padded.
        left: hidden states (B, M, C) and TokenState before each shrinking stage, for a restore; empty without one.
        shortest: TokenState directly before a restore; None without one.
        chunks: data for a restore by ``dechunk``; None if no stage makes chunks.
    """

    leading: int = 0
    protected: Tensor | None = None
    valid: Tensor | None = None
    documents: Tensor | None = None
    special: Tensor | None = None
    causal_only: bool = False
    visual: Tensor | None = None
    absent: Tensor | None = None
    pixel_values: Tensor | None = None
    grid: tuple[int, int] | None = None
    places: Tensor | None = None
    units: Tensor | None = None
    rows: int = 0
    seen: int = 0
    earlier: int | Tensor = 0
    carry: dict[str, Tensor] | None = None
    blank: bool = False
    keep_padded: bool = False
    under_head: bool = False
    state: TokenState | None = None
    original: int | Tensor = 0
    original_by_document: Tensor | None = None
    gone: int | Tensor = 0
    dense: int | Tensor = 0
    present: Compact | None = None
    places_kept: Tensor | None = None
    layer_tokens: dict[int, RowTokens] = field(default_factory=dict)
    packed: Packing | None = None
    left: list[tuple[Tensor, TokenState]] = field(default_factory=list)
    shortest: TokenState | None = None
    chunks: Chunks | None = None

    @property
    def tokens(self) -> TokenState:
        """TokenState of the current tokens; only valid after the first layer has begun."""
        assert self.state is not None
        return self.state

    def begin(self, state: TokenState, hidden_states: Tensor) -> Tensor:
        """Sets the initial TokenState; called once, before the first layer.

        Args:
            state: TokenState of all tokens.
            hidden_states: (B, N, C) input of the first layer.

        Returns:
            (B, M, C), the tokens that are not absent.
        """
        if self.protected is not None:
            state = TokenState.initial(
                state.rows, state.tokens, state.protected | self.protected, state.valid, state.position.device, state.document
            )
        if self.blank:
            state = TokenState.initial(state.rows, state.tokens, state.tokens, state.valid, state.position.device, state.document)
        self.dense = state.tokens_per_row
        if self.absent is not None:
            gone = self.absent if state.valid is None else self.absent & state.valid
            present = compact(~gone if state.valid is None else ~gone & state.valid)
            self.gone = gone.sum(-1)
            # A later restore gives these tokens their places again.
            self.left.append((hidden_states, state))
            self.present, state = present, state.select(present.index, present.valid)
            hidden_states = self.take_present(hidden_states)
        self.state, self.original = state, state.present
        self.original_by_document = None if state.document is None else state.present_by_document
        return hidden_states

    def take_present(self, hidden_states: Tensor) -> Tensor:
        """(B, N, C) hidden states of all tokens -> (B, M, C) of those that are not absent."""
        if self.present is None:
            return hidden_states
        self.places_kept = hidden_states
        return take(hidden_states, self.present.index)

    def give_absent(self, hidden_states: Tensor) -> Tensor:
        """(B, M, C) output of a layer -> (B, N, C) with what absent tokens had at its input."""
        if self.present is None:
            return hidden_states
        assert self.places_kept is not None
        index = self.present.index
        real = torch.where(self.present.valid.unsqueeze(-1), hidden_states, take(self.places_kept, index).to(hidden_states.dtype))
        return self.places_kept.to(real.dtype).scatter(1, index.unsqueeze(-1).expand_as(real), real)

    def cells(self, state: TokenState) -> Tensor:
        """(B, M) int64 grid cell of each token; negative for the leading tokens, which have none."""
        return self._places(state) - self.leading

    def squares(self, state: TokenState, side: int = 1) -> tuple[Tensor, Tensor]:
        """(B, M) int64 row and column of the square of side * side cells that each token is in, without a meaning for leading tokens."""
        assert self.grid is not None
        cells = self.cells(state)
        return cells // self.grid[1] // side, cells % self.grid[1] // side

    def of_cells(self, values: Tensor, state: TokenState) -> Tensor:
        """Converts values per grid cell to values per token.

        Args:
            values: (B, cells, D), cells in reading order.
            state: TokenState of the tokens.

        Returns:
            (B, M, D), zeros for the leading tokens.
        """
        of_places = functional.pad(values, (0, 0, self.leading, 0))
        if self.places is None and state.tokens == state.source.shape[1]:
            return of_places
        return of_places.gather(1, self._places(state).unsqueeze(-1).expand(-1, -1, values.shape[-1]))

    def _places(self, state: TokenState) -> Tensor:
        return state.position if self.places is None else self.places.gather(1, state.position)
