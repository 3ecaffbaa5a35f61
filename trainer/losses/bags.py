"""Bags of tokens: the forward and the check of a model that reads several consecutive tokens as one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from ...modules.tokens.labels import IGNORE_TOKEN
from .token_loss import Read


def read_bags(model: PreTrainedModel, input_ids: Tensor, labels: Tensor, position_ids: Tensor) -> Read:
    """The forward of a dense base model on bags: a bag enters as the mean of its tokens' embeddings, and predicts the tokens of the next bag
    (token superposition, arXiv 2605.06546; patch-level training, arXiv 2407.12665).

    The layers run on N tokens for N · s of text.

    Args:
        model: dense model with a head on a base model.
        input_ids: (B, N, s) int64; where the last bag of a document has fewer than s tokens, padding.
        labels: (B, N, s) int64, each token's own id, IGNORE_TOKEN where it is not predicted.
        position_ids: (B, N) int64, bags from 0 in each document, from which the model derives the documents' borders.
    """
    base: Any = model.base_model
    embedded = bag_embeddings(model, input_ids)
    hidden_states = base(inputs_embeds=embedded, position_ids=position_ids, use_cache=False).last_hidden_state
    following = functional.pad(labels[:, 1:], (0, 0, 0, 1), value=IGNORE_TOKEN)
    return Read(hidden_states.flatten(0, 1), following.flatten(0, 1))


def bag_embeddings(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """(B, N, C) mean embedding of the tokens of each bag of (B, N, s) token ids.

    Padding counts in the mean: only the last bag of a document has some, and nothing reads that place.
    """
    embed: nn.Module | None = model.get_input_embeddings()
    assert embed is not None, type(model)
    # One call of the module: its hooks gather a partitioned weight. Some families scale inside it, and a mean of scaled tokens is a scaled mean.
    tokens: Tensor = embed(input_ids.flatten(1))
    return tokens.unflatten(1, input_ids.shape[1:]).mean(2)


@torch.no_grad()
def check_reads_embeddings(model: PreTrainedModel) -> None:
    """Runs two forwards of 16 tokens. Raises ValueError if a model's layers read more of its tokens than their embeddings."""
    training = model.training
    model.eval()
    ids = torch.arange(32, device=model.device).view(2, 16) % model.config.get_text_config().vocab_size
    base: Any = model.base_model
    expected = base(input_ids=ids, use_cache=False).last_hidden_state
    found = base(inputs_embeds=bag_embeddings(model, ids.unsqueeze(-1)), use_cache=False).last_hidden_state
    model.train(training)
    if (expected - found).abs().max() > 1e-2 * expected.abs().max():
        raise ValueError(
            f"{type(model).__name__} reads more of its tokens than their embeddings, so that bags of them cannot enter: remove superposition "
            "and patch_level from phases"
        )
