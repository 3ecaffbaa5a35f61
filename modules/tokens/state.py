"""What is known of the tokens: TokenState, and the Decision of a stage about them.

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
    """Tokens of a row, where every row has as many and the protected ones come first: known on the host, so that no device is asked.

    Attributes:
        routable: that a stage may touch.
        protected: that no stage may touch.
    """

    routable: int
    protected: int


@dataclass(frozen=True)
class TokenState:
    """Where the tokens of a row came from. Immutable: a stage returns a new one.

    Attributes:
        size: (B, M) float32, source tokens that each token stands for.
        source: (B, N) int64, current slot of each original token, -1 if it is gone.
        position: (B, M) int64, original position of each token; of a merged token, that of the one it was merged into.
        protected: (B, M) bool, tokens that no stage may touch; anywhere in a row, any number of them.
        valid: (B, M) bool, False for padding; None when no row has padding.
        counts: where all rows agree and their protected tokens come first; None elsewhere, and where there is padding.
        document: (B, M) int64, which document of the row a token belongs to, counted from 0; None where a row is one document.
        whole: these are all tokens of the forward, each in its place.
        empty: no row has a token, and all slots are padding.
        key_bias: (B, M) float32 that every later layer adds to the attention logits of each key; None adds nothing.
        proportional: later layers add log(size) to the attention logits of each key, so that a merged token is attended to as
            its sources together would be.
        batch_rows: (B,) int64, which rows of the forward these are, where others were left out; None where all are there.
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
        """State before the first stage: every token stands for itself.

        Args:
            rows: B.
            tokens: N of each row.
            protected: how many tokens at the start of each row are protected, or (B, N) bool which tokens are.
            valid: (B, N) bool, False for padding; None without any.
            device: of the state.
            document: (B, N) int64, the document of each token; None where a row is one document.
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
        """Routable tokens of a row: one int when all rows have the same, else int64 (B,)."""
        return self.routable.sum(-1) if self.counts is None else self.counts.routable

    @property
    def protected_real(self) -> int | Tensor:
        """Protected tokens of a row, padding not counted: one int when all rows have the same, else int64 (B,)."""
        if self.counts is not None:
            return self.counts.protected
        return (self.protected if self.valid is None else self.protected & self.valid).sum(-1)

    @property
    def present_by_document(self) -> Tensor:
        """(B, D) int64: routable tokens of each document; where a row is one document, D is 1."""
        routable = self.routable.long()
        if self.document is None:
            return routable.sum(-1, keepdim=True)
        # As wide as a row could need: the number of documents is known on the device only.
        return routable.new_zeros(self.rows, self.source.shape[1]).scatter_add_(1, self.document, routable)

    def select(self, index: Tensor, valid: Tensor | None) -> TokenState:
        """State after keeping only the tokens at ``index``.

        Args:
            index: (B, K) int64, sorted slots that stay.
            valid: (B, K) bool, False where ``index`` is padding; None when all are real.
        """
        slots = torch.arange(index.shape[1], device=index.device).expand_as(index)
        # One slot more than there are tokens takes the writes of padding and the reads of tokens that were gone before.
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
        """The state before the first stage again: of the same rows, every token standing for itself."""
        protected = self.protected if self.counts is None else self.counts.protected
        return TokenState.initial(self.rows, self.tokens, protected, self.valid, device, self.document)

    def restrict(self, scope: Tensor) -> TokenState:
        """State in which only the tokens of a (B, M) bool mask are routable, of those that were.

        Rows have different numbers of them, so that counts are those of each row.
        """
        return replace(
            self,
            protected=~(scope & self.routable),
            valid=torch.ones_like(self.protected) if self.valid is None else self.valid,
            counts=None,
        )

    def select_rows(self, rows: Tensor) -> TokenState:
        """State of the rows at (R,) alone, with all of their tokens."""

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
        """State after every token whose target is another slot has been merged into it; the slots all stay.

        Args:
            into: (B, M) int64, slot that each token is merged into; its own for a token that stays.
        """
        gone = self.source < 0
        source = into.gather(1, self.source.clamp(min=0)).masked_fill(gone, -1)
        size = sum_into(self.size.unsqueeze(-1), into).squeeze(-1)
        return replace(self, size=size, source=source)

    @property
    def logit_bias(self) -> Tensor | None:
        """(B, M) float32 that a layer adds to the attention logits of each key; None adds nothing."""
        if not self.proportional:
            return self.key_bias
        # Padding has size 0 and is masked out anyway.
        bias = self.size.clamp(min=1e-6).log()
        return bias if self.key_bias is None else bias + self.key_bias

    @property
    def tokens_per_row(self) -> int | Tensor:
        """Real tokens of a row, protected ones included: one int when all rows have the same, else int64 (B,)."""
        return self.tokens if self.valid is None else self.valid.sum(-1)

    def add_key_bias(self, bias: Tensor) -> TokenState:
        """State with (B, M) added to the bias of its keys."""
        return replace(self, key_bias=bias if self.key_bias is None else self.key_bias + bias)
