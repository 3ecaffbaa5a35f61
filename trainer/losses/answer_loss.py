"""Cross-entropy of the answers of a chat, with the head computed where something is learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from ...modules.tokens.labels import IGNORE_TOKEN
from .token_loss import logits_of


@dataclass(frozen=True)
class AnswerLoss:
    """Loss and predictions of the P learned tokens of a batch.

    Attributes:
        total: scalar float32, sum of the tokens' negative log-likelihoods in nats, with gradient.
        right: (P,) bool, the token is the most likely one.
        row: (P,) int64, row of each token.
        turn: (P,) int64, number of its answer in the row.
    """

    total: Tensor
    right: Tensor
    row: Tensor
    turn: Tensor

    @property
    def mean(self) -> Tensor:
        """Scalar: mean loss of a token; 0 if no token is learned."""
        return self.total / max(1, len(self.right))


def answer_loss(model: PreTrainedModel, batch: Mapping[str, Any], **options: Any) -> AnswerLoss:
    """The loss of a vision-language model on the answers of chats.

    Args:
        model: dense or compressed model with a head on a base model.
        batch: ``input_ids``, ``labels``, ``attention_mask`` and ``turns``, each (B, N), and ``pixel_values`` if a row has an image.
        options: arguments of the base model's forward: ``trace`` of a compressed model.
    """
    labels = batch["labels"]
    trace = options.get("trace")
    if trace is not None:
        trace.labels = labels
    pixels = batch.get("pixel_values")
    base: Any = model.base_model
    hidden_states = base(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        use_cache=False,
        **({} if pixels is None else {"pixel_values": pixels}),
        **options,
    ).last_hidden_state
    # Token i predicts token i + 1.
    following = functional.pad(labels[:, 1:], (0, 1), value=IGNORE_TOKEN)
    row, place = (following != IGNORE_TOKEN).nonzero(as_tuple=True)
    logits = logits_of(model, hidden_states[row, place])
    expected = following[row, place]
    total = functional.cross_entropy(logits, expected, reduction="sum")
    if pixels is None and torch.is_grad_enabled():
        total = total + _unused_tower(model, labels.device)
    return AnswerLoss(total, logits.argmax(-1) == expected, row, batch["turns"][row, place + 1])


def _unused_tower(model: PreTrainedModel, device: torch.device) -> Tensor:
    """0, with a gradient of 0 for tower and projector: where weights are sharded, ranks without an image must call them as others do."""
    config: Any = model.config.vision_config
    blank = torch.zeros(1, config.num_channels, config.image_size, config.image_size, device=device, dtype=model.dtype)
    inner: Any = model
    features = inner.get_image_features(pixel_values=blank)
    found = features.pooler_output if hasattr(features, "pooler_output") else features
    parts = found if isinstance(found, list | tuple) else [found]
    return torch.stack([part.sum() for part in parts]).sum() * 0
