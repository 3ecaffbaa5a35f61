"""Flow: what the forward of one stack of layers needs while it runs.

Shapes: B rows of a batch, N tokens before the first stage, M tokens now, K tokens after a stage.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import functional

from .decision import Decision
from .ragged import Packing
from .state import TokenState


@dataclass(frozen=True)
class Chunks:
    """What a restore by ``dechunk`` needs to know of the stage that made the chunks.

    Attributes:
        stage: index of the stage among the model's stages.
        made: (B, K, C) the chunks as they were made.
        decision: which tokens of those before it a chunk stands at.
        probability: (B, K) float32 in (0, 1), with gradient: boundary probability, 0.5 exactly at the threshold; None where the
            scores are no probabilities.
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
class Flow:
    """One forward of one stack. The model's adapter notes its inputs here, the stack's layers and stages the rest.

    Noted before the first layer:

    Attributes:
        leading: protected tokens at the start of each row.
        protected: (B, N) bool, further tokens that no stage may touch; None without any.
        valid: (B, N) bool, tokens that are no padding; None where none is, or where the layers' mask says which.
        documents: (B, N) int64, the document of each token of packed rows, -1 for padding; None where a row is one document.
        visual: (B, N) bool, tokens that come from images or video; None in a model without them.
        pixel_values: (B, channels, height, width) the model's input, for parts that read it.
        grid: patches (down, across) of the input; None where there is no grid.
        places: (B, N) int64 place in the grid, counted behind the leading tokens, that each original token comes from; None where it
            is its position. A model that shuffles its patches has others.
        seen: tokens that a cache holds in front of those of this forward.
        carry: (B, …) what stages remember of each row's earlier tokens, by name; it lies in the cache. None without a cache.
        keep_padded: rows of different lengths stay padded, not packed: the hidden states of layers were requested.
        under_head: the base model runs inside a model with a head.

    Changed by layers and stages:

    Attributes:
        state: of the current tokens; None before the first layer.
        original: routable tokens before the first stage, one int for every row or int64 (B,).
        layer_tokens: real tokens that each layer processed, by layer index.
        packed: how the rows are packed into one that layers see now; None while they are padded.
        left: hidden states (B, M, C) and TokenState before each shrinking stage, for a restore; empty without one.
        shortest: TokenState just before a restore; None without one.
        chunks: what a restore by ``dechunk`` needs to know; None where no stage makes chunks.
    """

    leading: int = 0
    protected: Tensor | None = None
    valid: Tensor | None = None
    documents: Tensor | None = None
    visual: Tensor | None = None
    pixel_values: Tensor | None = None
    grid: tuple[int, int] | None = None
    places: Tensor | None = None
    seen: int = 0
    carry: dict[str, Tensor] | None = None
    keep_padded: bool = False
    under_head: bool = False
    state: TokenState | None = None
    original: int | Tensor = 0
    layer_tokens: dict[int, RowTokens] = field(default_factory=dict)
    packed: Packing | None = None
    left: list[tuple[Tensor, TokenState]] = field(default_factory=list)
    shortest: TokenState | None = None
    chunks: Chunks | None = None

    @property
    def tokens(self) -> TokenState:
        """The state of the current tokens, once the first layer has begun."""
        assert self.state is not None
        return self.state

    def begin(self, state: TokenState) -> None:
        """Called once, before the first layer."""
        if self.protected is not None:
            state = TokenState.initial(
                state.rows, state.tokens, state.protected | self.protected, state.valid, state.position.device, state.document
            )
        self.state = state
        self.original = state.present

    def cells(self, state: TokenState) -> Tensor:
        """(B, M) int64 cell of the grid that each token comes from; below 0 for the leading tokens, which come from none."""
        return self._places(state) - self.leading

    def of_cells(self, values: Tensor, state: TokenState) -> Tensor:
        """Values of the grid's cells as values of the tokens.

        Args:
            values: (B, cells, D), row by row.
            state: of the tokens.

        Returns:
            (B, M, D), zeros for the leading tokens.
        """
        of_places = functional.pad(values, (0, 0, self.leading, 0))
        if self.places is None and state.tokens == state.source.shape[1]:
            return of_places
        return of_places.gather(1, self._places(state).unsqueeze(-1).expand(-1, -1, values.shape[-1]))

    def _places(self, state: TokenState) -> Tensor:
        return state.position if self.places is None else self.places.gather(1, state.position)
