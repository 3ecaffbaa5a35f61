"""Losses of tiny models with every kind of part, as they were before the code was rebuilt around stacks, flows and scopes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from laconic import Trace, compress
from tests import matrix
from tests.matrix import decoders, encoders

GOLDENS: dict[str, Any] = json.loads((Path(__file__).parent / "goldens.json").read_text())


def _loss(key: str, trace: Trace) -> Tensor:
    family, _, name = key.partition("/")
    if family == "vit":
        model = matrix.compressed("vit", next(method for method in matrix.METHODS if method.name == name), 0.5, 0.6).train()
        trace.labels = matrix.labels()
        return model(pixel_values=matrix.images(), labels=matrix.labels(), trace=trace).loss
    if family == "bert":
        method = next(method for _, method in encoders.PAIRS if method.name == name)
        config = encoders.dense("bert").config
        torch.manual_seed(1)
        # With the LayerNorms that transformers makes: those of encoders.dense vary.
        plain = AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa").eval()
        model = encoders.spread(compress(plain, method.config(0.5, 0.6))).train()
        trace.labels = encoders.labels()
        return model(input_ids=encoders.tokens(), labels=encoders.labels(), trace=trace).loss
    row = next(method for _, method in decoders.PAIRS if method.name == name)
    ids = trace.labels = decoders.tokens()
    return decoders.compressed("llama", row, 0.5, 0.6).train()(input_ids=ids, labels=ids, use_cache=False, trace=trace).loss


@pytest.mark.parametrize("key", GOLDENS)
def test_losses_and_counts_are_those_of_before(key: str) -> None:
    trace = Trace(step=3, seed=5, noise=0.5)
    loss = _loss(key, trace)
    if trace.auxiliary_loss is not None:
        loss = loss + trace.auxiliary_loss
    # Bit for bit on the machine that wrote them; kernels of other processors round otherwise.
    assert float(loss.detach()) == pytest.approx(GOLDENS[key]["loss"], rel=1e-4)
    assert {name: routing.counts()[0] for name, routing in trace.routings.items()} == GOLDENS[key]["kept"]


def test_every_kind_of_part_has_a_golden() -> None:
    rows = {f"vit/{method.name}" for method in matrix.METHODS}
    rows |= {f"bert/{method.name}" for family, method in encoders.PAIRS if family == "bert"}
    rows |= {f"llama/{method.name}" for family, method in decoders.PAIRS if family == "llama"}
    # A part of another package is none of Laconic's.
    assert {row for row in rows if not row.endswith("/norm")} == GOLDENS.keys()
