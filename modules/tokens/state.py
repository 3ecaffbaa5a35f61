"""TokenState: sizes, sources, positions and kinds of the current tokens.

Shapes: B rows of a batch, N tokens before the first stage, M tokens now, K tokens after a stage.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .gather import sum_into


@dataclass(frozen=True)
class Counts:
    """Tokens per row if every row has the same numbers and protected tokens come first. Known on the host, without synchronisation.

    Attributes:
        routable: number of tokens that a stage may touch.
        protected: number of tokens that no stage may touch.
    """

    routable: int
    protected: int


@dataclass(frozen=True)
class TokenState:
    """Origin and kind of each current token. Immutable: a stage returns a new TokenState.

    Attributes:
        size: (B, M) float32, number of source tokens that each token represents.
        source: (B, N) int64, current slot of each original token, -1 if it was dropped.
        position: (B, M) int64, original position of each token; a merged token has the position of its target.
        protected: (B, M) bool, tokens that no stage may touch; anywhere in a row, any number per row.
        valid: (B, M) bool, False for padding; None if no row has padding.
        counts: Counts if all rows have the same numbers and their protected tokens come first; None otherwise, and if there is padding.
        document: (B, M) int64, document of each token, counted from 0 in each row; None if a row is one document.
        whole: these are all tokens of the forward, in their original places.
        empty: no row has a token; all slots are padding.
        key_bias: (B, M) float32 that every later layer adds to the attention logits of each key; None for no bias.
        proportional: later layers add log(size) to the attention logits of each key, so that a merged token gets the attention of all
            its source tokens.
        batch_rows: (B,) int64, indices of these rows in the forward's batch if others were left out; None if all rows are here.
    """

    size: Tensor
    source: Tensor
    position: Tensor
    protected: Tensor
    valid: Tensor | None
    counts: Counts | None = None
    document: Tensor | None = None
    whole: bool = True
    empty: bool = False
    key_bias: Tensor | None = None
    proportional: bool = False
    batch_rows: Tensor | None = None

    @staticmethod
    def initial(
        rows: int, tokens: int, protected: int | Tensor, valid: Tensor | None, device: torch.device, document: Tensor | None = None
    ) -> TokenState:
        """TokenState before the first stage: every token represents itself.

        Args:
            rows: number B of rows.
            tokens: number N of tokens per row.
            protected: number of protected tokens at the start of each row, or (B, N) bool mask of protected tokens.
            valid: (B, N) bool, False for padding; None without padding.
            device: device of the state's tensors.
            document: (B, N) int64, document of each token; None if a row is one document.
        """
        counts = Counts(tokens - protected, protected) if valid is None and isinstance(protected, int) else None
        index = torch.arange(tokens, device=device).expand(rows, tokens)
        size = torch.ones(rows, tokens, device=device)
        return TokenState(
            size=size if valid is None else size * valid,
            source=index if valid is None else index.masked_fill(~valid, -1),
            position=index,
            protected=index < protected if isinstance(protected, int) else protected,
            valid=valid,
            counts=counts,
            document=document,
        )

    @property
    def rows(self) -> int:
        return self.position.shape[0]

    @property
    def tokens(self) -> int:
        return self.position.shape[1]

    @property
    def routable(self) -> Tensor:
        """(B, M) bool: real tokens that a stage may touch."""
        return ~self.protected if self.valid is None else ~self.protected & self.valid

    @property
    def present(self) -> int | Tensor:
        """Routable tokens per row: one int if all rows have the same number, else int64 (B,)."""
        return self.routable.sum(-1) if self.counts is None else self.counts.routable

    @property
    def protected_real(self) -> int | Tensor:
        """Protected tokens per row, without padding: one int if all rows have the same number, else int64 (B,)."""
        if self.counts is not None:
            return self.counts.protected
        return (self.protected if self.valid is None else self.protected & self.valid).sum(-1)

    @property
    def present_by_document(self) -> Tensor:
        """(B, D) int64: routable tokens of each document; D is 1 if a row is one document."""
        routable = self.routable.long()
        if self.document is None:
            return routable.sum(-1, keepdim=True)
        # D is N, the largest possible number of documents: the real number is only known on the device.
        return routable.new_zeros(self.rows, self.source.shape[1]).scatter_add_(1, self.document, routable)

    def select(self, index: Tensor, valid: Tensor | None) -> TokenState:
        """TokenState after keeping only the tokens at ``index``.

        Args:
            index: (B, K) int64, sorted slots of the kept tokens.
            valid: (B, K) bool, False for padding of ``index``; None without padding.
        """
        slots = torch.arange(index.shape[1], device=index.device).expand_as(index)
        # An extra slot receives the writes of padding; tokens that were dropped before read from it.
        moved = self.source.new_full((self.rows, self.tokens + 1), -1)
        target = index if valid is None else index.masked_fill(~valid, self.tokens)
        moved.scatter_(1, target, slots)
        moved[:, -1] = -1
        gone = self.source < 0
        source = moved.gather(1, self.source.masked_fill(gone, self.tokens))
        size = self.size.gather(1, index)
        protected = self.protected.gather(1, index)
        return replace(
            self,
            size=size if valid is None else size * valid,
            source=source,
            position=self.position.gather(1, index),
            protected=protected if valid is None else protected & valid,
            valid=valid,
            counts=None
            if valid is not None or self.counts is None
            else replace(self.counts, routable=index.shape[1] - self.counts.protected),
            document=None if self.document is None else self.document.gather(1, index),
            whole=False,
            key_bias=None if self.key_bias is None else self.key_bias.gather(1, index),
        )

    def restart(self, device: torch.device) -> TokenState:
        """TokenState before the first stage, of the same rows: every token represents itself."""
        protected = self.protected if self.counts is None else self.counts.protected
        return TokenState.initial(self.rows, self.tokens, protected, self.valid, device, self.document)

    def protect_first(self, number: int) -> TokenState:
        """TokenState of whole rows without padding in which the first tokens are protected, so that ``counts`` stay known on the host."""
        assert self.counts is not None
        number = max(self.counts.protected, min(number, self.tokens))
        first = torch.arange(self.tokens, device=self.position.device) < number
        return replace(self, protected=first.expand(self.rows, -1), counts=Counts(self.tokens - number, number))

    def restrict(self, scope: Tensor) -> TokenState:
        """TokenState in which only routable tokens inside a (B, M) bool mask stay routable; the others become protected.

        Rows may then have different numbers, so ``counts`` is None and ``valid`` is set.
        """
        return replace(
            self,
            protected=~(scope & self.routable),
            valid=torch.ones_like(self.protected) if self.valid is None else self.valid,
            counts=None,
        )

    def select_rows(self, rows: Tensor) -> TokenState:
        """TokenState of the (R,) rows only, with all of their tokens."""

        def pick(part: Tensor | None) -> Any:
            return None if part is None else part.index_select(0, rows)

        return replace(
            self,
            size=pick(self.size),
            source=pick(self.source),
            position=pick(self.position),
            protected=pick(self.protected),
            valid=pick(self.valid),
            document=pick(self.document),
            key_bias=pick(self.key_bias),
            batch_rows=rows if self.batch_rows is None else self.batch_rows.index_select(0, rows),
        )

    def absorb(self, into: Tensor) -> TokenState:
        """TokenState after merging every token into its target slot; all slots remain.

        Args:
            into: (B, M) int64, target slot of each token; a kept token has its own slot.
        """
        gone = self.source < 0
        source = into.gather(1, self.source.clamp(min=0)).masked_fill(gone, -1)
        size = sum_into(self.size.unsqueeze(-1), into).squeeze(-1)
        return replace(self, size=size, source=source)

    @property
    def logit_bias(self) -> Tensor | None:
        """(B, M) float32 that a layer adds to the attention logits of each key; None for no bias."""
        if not self.proportional:
            return self.key_bias
        # Padding has size 0; the clamp keeps its log finite, and attention masks it.
        bias = self.size.clamp(min=1e-6).log()
        return bias if self.key_bias is None else bias + self.key_bias

    @property
    def tokens_per_row(self) -> int | Tensor:
        """Real tokens per row, protected tokens included: one int if there is no padding, else int64 (B,)."""
        return self.tokens if self.valid is None else self.valid.sum(-1)

    def add_key_bias(self, bias: Tensor) -> TokenState:
        """TokenState with (B, M) ``bias`` added to its key bias."""
        return replace(self, key_bias=bias if self.key_bias is None else self.key_bias + bias)
