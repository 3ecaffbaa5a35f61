"""Cross-entropy of a language model's tokens without all logits in memory at once.

For a small model with a large vocabulary, the logits need most of a step's memory: rows × tokens × entries in float32, and their
gradient. Here the head processes a part of the tokens at a time, and backward recomputes the logits of that part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ...modules.tokens.labels import IGNORE_TOKEN

# In float32 values; softmax and gradient need as many again. Up to 128 MiB nothing is recomputed; above, parts have 32 MiB.
WHOLE, PART = 2**25, 2**23


@dataclass(frozen=True)
class TokenLoss:
    """Loss of the predicted tokens of a batch.

    Attributes:
        total: scalar float32, sum of the tokens' negative log-likelihoods in nats, with gradient.
        count: scalar int64, number of predicted tokens.
        apart: scalar float32, sum of the tokens' divergences from a teacher, with gradient; None without a teacher.
        found: what the head read; None if the loss was computed by other means.
    """

    total: Tensor
    count: Tensor
    apart: Tensor | None = None
    found: Read | None = None

    @property
    def mean(self) -> Tensor:
        """Scalar: mean loss of a token; 0 if no token is predicted."""
        return self.total / self.count.clamp(min=1)


@dataclass(frozen=True)
class Read:
    """What the head of a language model reads, and what it is to predict there.

    Attributes:
        hidden_states: (B · N, C) last hidden states of the base model.
        following: (B · N,) int64 next tokens, IGNORE_TOKEN where none is predicted; (B · N, s) if several are predicted at once.
    """

    hidden_states: Tensor
    following: Tensor


# (P, entries) logits of student and teacher -> (P,) how far they are apart.
Divergence = Callable[[Tensor, Tensor], Tensor]


def token_loss(
    model: PreTrainedModel,
    input_ids: Tensor,
    labels: Tensor,
    position_ids: Tensor | None = None,
    documents: Tensor | None = None,
    whole: int = WHOLE,
    part: int = PART,
    **options: Any,
) -> TokenLoss:
    """The loss of a causal language model, without all of its logits in memory at once.

    Args:
        model: dense or compressed model with a head on a base model.
        input_ids: (B, N) int64.
        labels: (B, N) int64, each token's own id (not that of the next token), IGNORE_TOKEN where it is not predicted.
        position_ids: (B, N) int64, from 0 in each document; None for rows of one document.
        documents: (B, N) int64, document of each token, -1 for padding, which a compressed model must not count; None if every row is
            one document.
        whole: largest number of logits in memory at once.
        part: number of logits in memory at once if the total exceeds ``whole``.
        options: arguments of the base model's forward: ``trace`` of a compressed model.
    """
    return loss_of(model, read(model, input_ids, labels, position_ids, documents, **options), whole=whole, part=part)


def read(
    model: PreTrainedModel,
    input_ids: Tensor,
    labels: Tensor,
    position_ids: Tensor | None = None,
    documents: Tensor | None = None,
    **options: Any,
) -> Read:
    """The forward of the base model. Arguments as of ``token_loss``."""
    trace = options.get("trace")
    if trace is not None:
        trace.labels, trace.documents = labels, documents
    base: Any = model.base_model
    hidden_states = base(input_ids=input_ids, position_ids=position_ids, use_cache=False, **options).last_hidden_state
    # Token i predicts token i + 1. Shifting the labels copies less than shifting the hidden states.
    return Read(hidden_states.flatten(0, 1), functional.pad(labels[:, 1:], (0, 1), value=IGNORE_TOKEN).flatten())


def loss_of(
    model: PreTrainedModel,
    found: Read,
    taught: Tensor | None = None,
    divergence: Divergence | None = None,
    whole: int = WHOLE,
    part: int = PART,
) -> TokenLoss:
    """The loss of what a base model gave, and how far its answers are from a teacher's.

    Args:
        model: model with the head.
        found: output of its base model.
        taught: (B · N, C) what the head of the same model read in the teacher's forward; None without a teacher.
        divergence: of the answers, if there is a teacher.
        whole: largest number of logits in memory at once.
        part: number of logits in memory at once if the total exceeds ``whole``.
    """
    flat, following = found.hidden_states, found.following
    # From shapes alone, so that every rank calls the head equally often.
    entries = model.config.get_text_config().vocab_size * (1 if taught is None else 2)
    fits = len(flat) * entries <= whole
    step = len(flat) if fits else max(1, part // entries)
    losses = []
    for start in range(0, len(flat), step):
        at = slice(start, start + step)
        given = model, flat[at], following[at], None if taught is None else taught[at], divergence
        again = not fits and torch.is_grad_enabled()
        losses.append(checkpoint(_part, *given, use_reentrant=False) if again else _part(*given))
    total, apart = torch.stack(losses).sum(0)
    return TokenLoss(total, (following != IGNORE_TOKEN).sum(), None if taught is None else apart, found)


def _part(model: PreTrainedModel, hidden_states: Tensor, labels: Tensor, taught: Tensor | None, divergence: Divergence | None) -> Tensor:
    """(2,) loss and divergence of a part, summed over its tokens."""
    logits = logits_of(model, hidden_states)
    loss = _cross_entropy(logits, labels)
    if taught is None or divergence is None:
        return torch.stack([loss, torch.zeros_like(loss)])
    with torch.no_grad():
        expected = logits_of(model, taught)
    return torch.stack([loss, divergence(logits, expected).masked_fill(labels == IGNORE_TOKEN, 0.0).sum()])


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Scalar: negative log-likelihoods of the labels (P,) or (P, s) by logits (P, entries), summed."""
    likelihoods = logits.log_softmax(-1)
    sets = labels.unbind(1) if labels.ndim == 2 else [labels]
    losses = [functional.nll_loss(likelihoods, each, ignore_index=IGNORE_TOKEN, reduction="sum") for each in sets]
    return sum(losses[1:], losses[0])


def logits_of(model: PreTrainedModel, hidden_states: Tensor) -> Tensor:
    """(…, entries) float32 logits of the base model's last hidden states (…, C)."""
    head: nn.Module | None = model.get_output_embeddings()
    assert head is not None, type(model)
    # Called as a module: hooks gather its partitioned weights, and an adapter may wrap it.
    logits = head(hidden_states).float()
    config: Any = model.config.get_text_config()
    for name, apply in _AFTER_THE_HEAD.items():
        value = getattr(config, name, None)
        if value is not None:
            logits = apply(logits, value)
    return logits


# Operations of families on the head's logits, by the name of the setting. ``check_model`` detects families with other operations.
_AFTER_THE_HEAD: dict[str, Any] = {
    "final_logit_softcapping": lambda logits, cap: cap * torch.tanh(logits / cap),
    "logit_scale": lambda logits, scale: logits * scale,
    "logits_scaling": lambda logits, scale: logits / scale,
    "lm_head_multiplier": lambda logits, scale: logits * scale,
}


@torch.no_grad()
def check_model(model: PreTrainedModel) -> None:
    """Checks that a dense model's loss can be computed here. Runs two forwards of 16 tokens in evaluation mode.

    Raises:
        ValueError: the logits are not those of the head, or packed documents attend to each other.
    """
    training, name = model.training, type(model).__name__
    model.eval()
    ids = torch.arange(32, device=model.device).view(2, 16) % model.config.get_text_config().vocab_size
    # The second documents of the two rows are equal, the first ones differ.
    ids[1, 8:] = ids[0, 8:]
    positions = torch.arange(16, device=model.device).remainder(8).expand(2, -1)
    expected = model(input_ids=ids, position_ids=positions, use_cache=False).logits.float()
    found = logits_of(model, model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state)
    model.train(training)
    tolerance = 1e-2 * float(expected.abs().max())
    if expected.shape != found.shape or (expected - found).abs().max() > tolerance:
        raise ValueError(
            f"{name} computes its logits in an unsupported way (not its head on its base model with one of "
            f"{', '.join(_AFTER_THE_HEAD)}): task causal_lm cannot train it"
        )
    if (expected[0, 8:] - expected[1, 8:]).abs().max() > tolerance:
        raise ValueError(
            f"{name} lets documents packed into one row attend to each other, whatever position_ids are: task causal_lm cannot train it "
            "on packed rows; for most families attention 'sdpa' or 'eager' separates documents"
        )
