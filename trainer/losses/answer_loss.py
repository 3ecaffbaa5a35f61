"""Cross-entropy of the answers of a chat or a prompt, with the head computed where something is learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from ...modules.backbones import adapter_of
from ...modules.backbones.multimodal import Multimodal
from ...modules.tokens.labels import IGNORE_TOKEN
from ..distributed import collective
from .token_loss import logits_of


@dataclass(frozen=True)
class AnswerLoss:
    """Loss and predictions of the P learned tokens of a batch.

    Attributes:
        total: scalar float32, sum of the tokens' negative log-likelihoods in nats, with gradient.
        logits: (P, vocabulary) answers of the model.
        right: (P,) bool, the token is the most likely one.
        row: (P,) int64, row of each token.
        turn: (P,) int64, number of its answer in the row.
        hidden_states: (P, C) what the head reads.
    """

    total: Tensor
    logits: Tensor
    right: Tensor
    row: Tensor
    turn: Tensor
    hidden_states: Tensor

    @property
    def mean(self) -> Tensor:
        """Scalar: mean loss of a token; 0 if no token is learned."""
        return self.total / max(1, len(self.right))


def answer_loss(model: PreTrainedModel, batch: Mapping[str, Any], **options: Any) -> AnswerLoss:
    """The loss of a vision-language model on the answers of chats.

    Args:
        model: dense or compressed model with a head on a base model.
        batch: ``input_ids``, ``labels``, ``turns``, and ``attention_mask``, or ``position_ids`` and ``documents`` of packed chats, each
            (B, N); and what a processor made of the images, if any.
        options: arguments of the base model's forward: ``trace`` of a compressed model.
    """
    labels = batch["labels"]
    trace = options.get("trace")
    if "pixel_values" not in batch and collective.world_size() > 1:
        batch = with_blank_image(model, batch)
        if trace is not None:
            trace.blank = True
    given = family_of(model).forward_inputs(model.config, batch)
    if "documents" in batch:
        given["position_ids"] = family_of(model).packed_positions(model.base_model, batch)
    if trace is not None:
        # As long as the rows, with a blank image behind them.
        trace.labels = functional.pad(labels, (0, given["input_ids"].shape[1] - labels.shape[1]), value=IGNORE_TOKEN)
        trace.documents = batch.get("documents")
    return learned_answers(model, given, labels, batch["turns"], **options)


def learned_answers(model: PreTrainedModel, given: Mapping[str, Any], labels: Tensor, turns: Tensor, **options: Any) -> AnswerLoss:
    """The loss of a language model where rows have labels.

    Args:
        model: dense or compressed model with a head on a base model.
        given: arguments of the base model's forward; rows may be longer than their labels.
        labels: (B, N) int64, each token's own id, IGNORE_TOKEN where it is not learned.
        turns: (B, N) int64, number of the answer that a learned token is of.
        options: further arguments of the forward: ``trace`` of a compressed model.
    """
    # Token i predicts token i + 1. Before the forward, whose end the host would wait for here.
    following = functional.pad(labels[:, 1:], (0, 1), value=IGNORE_TOKEN)
    row, place = (following != IGNORE_TOKEN).nonzero(as_tuple=True)
    base: Any = model.base_model
    hidden_states = base(**given, use_cache=False, **options).last_hidden_state[:, : labels.shape[1]]
    read = hidden_states[row, place]
    logits = logits_of(model, read)
    expected = following[row, place]
    total = functional.cross_entropy(logits, expected, reduction="sum")
    return AnswerLoss(total, logits, logits.argmax(-1) == expected, row, turns[row, place + 1], read)


def with_blank_image(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch without an image, with one blank image in padding behind the first row.

    The image has no effect and a gradient of 0. Where weights are sharded, all processes must call the same modules in the same order,
    and other processes have images.

    Args:
        model: dense or compressed vision-language model.
        batch: batch with ``input_ids`` and ``attention_mask``, or ``position_ids`` and ``documents``, each (B, N).
    """
    config: Any = model.config
    family, ids = family_of(model), batch["input_ids"]
    blank = family.plain_images(config, 1)
    padding = ids.new_zeros(len(ids), sum(tile.tokens for tile in family.pictures(config, blank)))
    padding[0] = config.image_token_id
    places = {
        name: functional.pad(batch[name], (0, padding.shape[1]), value=filler)
        for name, filler in (("attention_mask", 0), ("position_ids", 0), ("documents", -1))
        if name in batch
    }
    return {
        **batch,
        **places,
        "input_ids": torch.cat([ids, padding], 1),
        **{name: value.to(ids.device, model.dtype if value.is_floating_point() else None) for name, value in blank.items()},
    }


def family_of(model: PreTrainedModel) -> type[Multimodal]:
    """The adapter of a dense or compressed vision-language model."""
    family = adapter_of(model)
    assert issubclass(family, Multimodal)
    return family
