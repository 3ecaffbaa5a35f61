"""Cross-entropy of a language model's tokens without all of its logits at once.

Logits of a large vocabulary are most of what a step of a small model holds: rows × tokens × entries, in float32, and their gradient.
Here the head sees a part of the tokens at a time, and backward computes that part's logits again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ...modules.tokens.labels import IGNORE_TOKEN

# In values of float32, of which softmax and gradient need as many again: up to 128 MiB nothing is computed twice, else parts of 32 MiB.
WHOLE, PART = 2**25, 2**23


@dataclass(frozen=True)
class TokenLoss:
    """Of the tokens of a batch that are predicted.

    Attributes:
        total: scalar float32, sum of the tokens' negative log-likelihoods, in nats, with gradient.
        count: scalar int64, predicted tokens.
    """

    total: Tensor
    count: Tensor

    @property
    def mean(self) -> Tensor:
        """Scalar: the loss a token, 0 where none is predicted."""
        return self.total / self.count.clamp(min=1)


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
    """What a causal language model's own loss sums up, without its logits as a whole.

    Args:
        model: dense or compressed, with a head on a base model.
        input_ids: (B, N) int64.
        labels: (B, N) int64, each token's own id and not that of the next, IGNORE_TOKEN where it is not predicted.
        position_ids: (B, N) int64, from 0 in each document; None for rows of one document.
        documents: (B, N) int64, the document of each token, -1 for filler, which a compressed model must not count; None where every
            row is one document.
        whole: most logits that are held all at once, in values.
        part: where there are more, those that are held at a time.
        options: of the base model's forward: ``trace`` of a compressed model.
    """
    trace = options.get("trace")
    if trace is not None:
        trace.labels, trace.documents = labels, documents
    base: Any = model.base_model
    hidden_states = base(input_ids=input_ids, position_ids=position_ids, use_cache=False, **options).last_hidden_state
    # Token i predicts token i + 1. Moving the labels copies less than moving the states would.
    following = functional.pad(labels[:, 1:], (0, 1), value=IGNORE_TOKEN).flatten()
    flat = hidden_states.flatten(0, 1)
    # By shapes alone, so that every rank calls the head as often.
    entries = model.config.get_text_config().vocab_size
    fits = len(flat) * entries <= whole
    step = len(flat) if fits else max(1, part // entries)
    losses = []
    for start in range(0, len(flat), step):
        given = model, flat[start : start + step], following[start : start + step]
        again = not fits and torch.is_grad_enabled()
        losses.append(checkpoint(_part, *given, use_reentrant=False) if again else _part(*given))
    return TokenLoss(torch.stack(losses).sum(), (following != IGNORE_TOKEN).sum())


def _part(model: PreTrainedModel, hidden_states: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits_of(model, hidden_states), labels, ignore_index=IGNORE_TOKEN, reduction="sum")


def logits_of(model: PreTrainedModel, hidden_states: Tensor) -> Tensor:
    """(…, entries) float32 logits of a base model's last hidden states (…, C)."""
    head: nn.Module | None = model.get_output_embeddings()
    assert head is not None, type(model)
    # The module and not its weight: hooks gather what is spread over ranks, and adapters may sit on it.
    logits = head(hidden_states).float()
    config: Any = model.config.get_text_config()
    for name, apply in _AFTER_THE_HEAD.items():
        value = getattr(config, name, None)
        if value is not None:
            logits = apply(logits, value)
    return logits


# What families do with logits behind the head, by the name of the setting. Who does more is found out by ``check_model``.
_AFTER_THE_HEAD: dict[str, Any] = {
    "final_logit_softcapping": lambda logits, cap: cap * torch.tanh(logits / cap),
    "logit_scale": lambda logits, scale: logits * scale,
    "logits_scaling": lambda logits, scale: logits / scale,
    "lm_head_multiplier": lambda logits, scale: logits * scale,
}


@torch.no_grad()
def check_model(model: PreTrainedModel) -> None:
    """Raises ValueError unless a dense model's loss can be computed here: its logits are the head's, and documents in a row are apart.

    Runs two forwards of 16 tokens, in evaluation mode.
    """
    training, name = model.training, type(model).__name__
    model.eval()
    ids = torch.arange(32, device=model.device).view(2, 16) % model.config.get_text_config().vocab_size
    # The second rows end alike and begin otherwise, in another document.
    ids[1, 8:] = ids[0, 8:]
    positions = torch.arange(16, device=model.device).remainder(8).expand(2, -1)
    own = model(input_ids=ids, position_ids=positions, use_cache=False).logits.float()
    ours = logits_of(model, model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state)
    model.train(training)
    tolerance = 1e-2 * float(own.abs().max())
    if own.shape != ours.shape or (own - ours).abs().max() > tolerance:
        raise ValueError(
            f"{name} makes its logits in a way that is not known here (not its head on its base model, with one of "
            f"{', '.join(_AFTER_THE_HEAD)}): task causal_lm cannot train it"
        )
    if (own[0, 8:] - own[1, 8:]).abs().max() > tolerance:
        raise ValueError(
            f"{name} lets documents that are packed into one row see each other, whatever position_ids say: task causal_lm cannot train it "
            "on packed rows; with attention 'sdpa' or 'eager' transformers keeps them apart for most families"
        )
