"""Dechunk: adds the layers' update of each chunk to the tokens of that chunk."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..precision import full_precision
from .flow import Flow
from .gather import look_up
from .state import TokenState

# Chunks per block in ``smooth``: one matrix product per block, and a sequential pass over blocks.
BLOCK = 32


def dechunk(hidden_states: Tensor, flow: Flow) -> Tensor:
    """(B, K, C) chunks -> (B, N, C) tokens: each token's hidden state from before the stage, plus the layers' update of the newest chunk
    at or before it (H-Net, arXiv 2507.07955).

    The updates are smoothed over the chunks by their probabilities, see ``smooth``. A token gets the layers' *update*, not the chunk
    itself, so that with one chunk per token the result is that of the dense model. Tokens before the first chunk get no update. With a
    cache, the newest update of each row is carried in the cache for later tokens.
    """
    chunks, state = flow.chunks, flow.tokens
    assert chunks is not None
    full, entering = flow.left[0]
    added = hidden_states.float() - chunks.made.float()
    name = f"{chunks.stage}.newest"
    carried = None if flow.carry is None else flow.carry.get(name)
    if chunks.probability is not None:
        added = smooth(added, chunks.probability, _first_of_documents(state), carried)
    kept = chunks.decision.kept_mask(entering.tokens)
    places = torch.arange(entering.tokens, device=kept.device)
    newest = torch.where(kept, places, -1).cummax(1).values
    some, at = newest >= 0, newest.clamp(min=0)
    if entering.document is not None:
        some = some & (entering.document.gather(1, at) == entering.document)
    given = look_up(added, state.source.gather(1, at).clamp(min=0))
    none = torch.zeros_like(given[:, :1]) if carried is None else carried[:, None]
    given = torch.where(some.unsqueeze(-1), given, none)
    if flow.carry is not None:
        flow.carry[name] = given[:, -1]
    if chunks.confidence is not None:
        given = given * chunks.confidence.unsqueeze(-1)
    return full + given.to(full.dtype)


def smooth(values: Tensor, probability: Tensor, first: Tensor | None = None, carried: Tensor | None = None) -> Tensor:
    """The running mean z̄_k = P_k·z_k + (1 − P_k)·z̄_{k−1}, from 0.

    Args:
        values: (B, K, C) float32 z.
        probability: (B, K) float32 P, above 0 and below 1.
        first: (B, K) bool, chunks at which a document begins and z̄ restarts from 0; None if a row is one document.
        carried: (B, C) z̄ before the first chunk; None for 0.

    Returns:
        (B, K, C) float32.
    """
    rows, number, width = values.shape
    block = min(BLOCK, number)
    fill = -number % block
    log_decay = torch.log1p(-probability)
    if first is not None:
        log_decay = log_decay.masked_fill(first, float("-inf"))
    with full_precision(values.device):
        # Padding after the last chunk has P = 0: z̄ is unchanged there.
        z, p, r = (functional.pad(part, (0, 0) * (part.ndim - 2) + (0, fill)) for part in (values, probability, log_decay))
        z, p, r = z.view(rows, -1, block, width), p.view(rows, -1, block), r.view(rows, -1, block)
        # Log of the weight of step j in step k: the sum over j + 1 to k, computed without subtracting long sums.
        later = torch.ones(block, block, dtype=torch.bool, device=z.device).tril()
        left = r.unsqueeze(-1).expand(-1, -1, -1, block).masked_fill(~later.tril(-1), 0.0).cumsum(2).masked_fill(~later, float("-inf"))
        within = (left.exp() * p.unsqueeze(2)) @ z
        of_earlier = r.cumsum(2).exp().unsqueeze(-1)
        means, mean = [], torch.zeros_like(z[:, 0, 0]) if carried is None else carried.float()
        for index in range(z.shape[1]):
            means.append(within[:, index] + of_earlier[:, index] * mean[:, None])
            mean = means[-1][:, -1]
    return torch.cat(means, 1)[:, :number]


def smoothing_macs(kept: int, hidden: int) -> int:
    """MACs of ``smooth`` for one row."""
    return kept * BLOCK * hidden


def _first_of_documents(state: TokenState) -> Tensor | None:
    """(B, K) bool: the first chunk of each document; None if a row is one document."""
    if state.document is None:
        return None
    return state.document.diff(dim=1, prepend=state.document[:, :1] - 1) != 0
