"""Cross-entropy of the answers of a chat, with the head computed where something is learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from ...modules.backbones.llava import Llava
from ...modules.tokens.labels import IGNORE_TOKEN
from ..distributed import collective
from .token_loss import logits_of


@dataclass(frozen=True)
class AnswerLoss:
    """Loss and predictions of the P learned tokens of a batch.

    Attributes:
        total: scalar float32, sum of the tokens' negative log-likelihoods in nats, with gradient.
        hidden_states: (P, C) what the head reads.
        logits: (P, vocabulary) answers of the model.
        right: (P,) bool, the token is the most likely one.
        row: (P,) int64, row of each token.
        turn: (P,) int64, number of its answer in the row.
    """

    total: Tensor
    hidden_states: Tensor
    logits: Tensor
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
    given = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values") if key in batch}
    if "pixel_values" not in given and collective.world_size() > 1:
        given = with_blank_image(model, given)
        if trace is not None:
            trace.blank = True
    # Token i predicts token i + 1. Before the forward, whose end the host would wait for here.
    following = functional.pad(labels[:, 1:], (0, 1), value=IGNORE_TOKEN)
    row, place = (following != IGNORE_TOKEN).nonzero(as_tuple=True)
    base: Any = model.base_model
    hidden_states = base(**given, use_cache=False, **options).last_hidden_state[:, : labels.shape[1]]
    read = hidden_states[row, place]
    logits = logits_of(model, read)
    expected = following[row, place]
    total = functional.cross_entropy(logits, expected, reduction="sum")
    return AnswerLoss(total, read, logits, logits.argmax(-1) == expected, row, batch["turns"][row, place + 1])


def with_blank_image(model: PreTrainedModel, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of a batch without an image, with one blank image in padding behind the first row.

    The image has no effect and a gradient of 0. Where weights are sharded, all processes must call the same modules in the same order,
    and other processes have images.

    Args:
        model: dense or compressed LLaVA.
        given: ``input_ids`` and ``attention_mask``, each (B, N).
    """
    config: Any = model.config
    tower, ids = config.vision_config, given["input_ids"]
    padding = ids.new_zeros(len(ids), Llava.image_tokens(config))
    padding[0] = config.image_token_id
    blank = torch.zeros(1, tower.num_channels, tower.image_size, tower.image_size, device=ids.device, dtype=model.dtype)
    return {
        "input_ids": torch.cat([ids, padding], 1),
        "attention_mask": torch.cat([given["attention_mask"], torch.zeros_like(padding)], 1),
        "pixel_values": blank,
    }
