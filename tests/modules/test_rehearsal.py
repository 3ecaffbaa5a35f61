"""A GPU's rehearsal without a GPU: training steps on the ``meta`` device, which raises where the host would wait for a device, and where
tensors of two devices meet."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, masking_utils
from transformers.models.beit import modeling_beit

from laconic import CompressionConfig, StageConfig, Trace, compress
from laconic import modules as package
from laconic.modules.tokens.ragged import Packing
from tests import matrix
from tests.matrix import decoders, encoders
from tests.thin import pairs, thinned

ROOT = Path(package.__file__ or "").resolve().parent


def _step(model: PreTrainedModel, inputs: dict[str, Tensor], labels: Tensor) -> None:
    """Forward and backward of a training step, exploration and auxiliary losses included."""
    model.train()
    trace = Trace(step=3, noise=0.5, labels=labels)
    outputs: Any = model(**inputs, trace=trace)
    answer: Tensor = outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state
    loss = answer.float().square().mean()
    if trace.auxiliary_loss is not None:
        loss = loss + trace.auxiliary_loss
    loss.backward()


# Rows that keep different numbers have numbers that the host must know to lay out the next tensor.
VISION = [(family, method) for family, method in matrix.PAIRS if not method.adaptive]


@pairs(VISION, often=thinned(VISION, ["vit"], ["learned", "tome"]))
def test_a_training_step_on_images_asks_no_device(family: str, method: matrix.Method, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers keeps the index of a window for all models of a process; one of this device would give others garbage.
    uncached = modeling_beit.BeitRelativePositionBias.generate_relative_position_index.__wrapped__
    monkeypatch.setattr(modeling_beit.BeitRelativePositionBias, "generate_relative_position_index", staticmethod(uncached))
    with torch.device("meta"):
        model = compress(matrix.dense(family), method.config(0.5, 0.6))
        pixels = torch.zeros(3, 3, matrix.IMAGE, matrix.IMAGE)
        _step(model, matrix.inputs(model, pixels), torch.zeros(3, dtype=torch.int64))


TEXT = [(family, method) for family, method in encoders.PAIRS if not method.adaptive]


@pairs(TEXT, often=thinned(TEXT, ["bert"], ["learned"]))
def test_a_training_step_on_texts_asks_no_device(family: str, method: matrix.Method) -> None:
    with torch.device("meta"):
        model = compress(encoders.dense(family), method.config(0.5, 0.6))
        ids = torch.zeros(3, encoders.LENGTH, dtype=torch.int64)
        _step(model, {"input_ids": ids}, torch.zeros(3, dtype=torch.int64))


CAUSAL = [(family, method) for family, method in decoders.PAIRS if not method.adaptive]


@pairs(CAUSAL, often=thinned(CAUSAL, ["llama"], ["threshold", "gate_predictor_mlp"]))
def test_a_training_step_of_a_language_model_asks_no_device(family: str, method: matrix.Method, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers asks once a forward whether rows are packed, and whether they are padded, in dense models too.
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    monkeypatch.setattr(PreTrainedModel, "warn_if_padding_and_no_attention_mask", lambda *args: None)
    with torch.device("meta"):
        model = compress(decoders.dense(family), method.config(0.5, 0.6))
        ids = torch.zeros(3, 24, dtype=torch.int64)
        _step(model, {"input_ids": ids, "use_cache": False}, ids)  # type: ignore[dict-item]


@pytest.mark.parametrize("selector", ["top_k", "threshold"])
def test_first_tokens_that_pass_every_layer_ask_no_device(selector: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    monkeypatch.setattr(PreTrainedModel, "warn_if_padding_and_no_attention_mask", lambda *args: None)
    with torch.device("meta"):
        stage = StageConfig(layer=1, site="around", keep=0.5, scorer="linear", selector=selector, estimator="gate", protect={"first": 2})
        model = compress(decoders.dense("llama"), CompressionConfig([stage]))
        ids = torch.zeros(3, 24, dtype=torch.int64)
        _step(model, {"input_ids": ids, "use_cache": False}, ids)  # type: ignore[dict-item]


class _Synchronisations(TorchDispatchMode):
    """Counts where the host reads a value of a tensor, by file and function of Laconic."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            self.note()
        return func(*args, **(kwargs or {}))

    def note(self) -> None:
        own = [frame for frame in traceback.extract_stack() if Path(frame.filename).resolve().is_relative_to(ROOT)]
        if own:
            self.places[f"{Path(own[-1].filename).resolve().relative_to(ROOT)}:{own[-1].name}"] += 1


def _synchronisations(step: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    counted = _Synchronisations()
    plain: Any = Tensor.tolist

    def tolist(values: Tensor) -> Any:
        # A CPU's tensor is read without any operator.
        counted.note()
        return plain(values)

    monkeypatch.setattr(Tensor, "tolist", tolist)
    with counted:
        step()
    return dict(counted.places)


# One row of adaptive counts costs what is listed here, for each of its two stages; docs/architecture.md has the same list.
PACKS = "tokens/ragged.py:packing"
PER_STAGE = {
    "threshold": {"tokens/gather.py:compact": 2, PACKS: 2},
    # Between the halves of layers: after the second stage no whole layer follows that rows would be packed for anew.
    "gumbel": {"tokens/gather.py:compact": 2, PACKS: 1},
    "threshold_fuse": {"tokens/gather.py:compact": 2, "stage.py:_request": 1, PACKS: 2},
}


@pytest.mark.parametrize("gpu", [False, True], ids=["groups", "spans"])
@pytest.mark.parametrize("name", PER_STAGE)
def test_adaptive_counts_ask_the_device_only_where_it_is_listed(name: str, gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if gpu:
        monkeypatch.setattr(Packing, "of", staticmethod(lambda state, hidden_states: Packing.in_spans(state)))
    method = next(method for method in matrix.METHODS if method.name == name)
    model = matrix.compressed("vit", method, 0.5, 0.6)
    found = _synchronisations(lambda: _step(model, {"pixel_values": matrix.images()}, matrix.labels()), monkeypatch)
    assert {place.replace("in_spans" if gpu else "in_groups", "packing"): number for place, number in found.items()} == PER_STAGE[name]


def test_static_counts_ask_nothing_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model = matrix.compressed("vit", matrix.METHODS[0], 0.5, 0.6)
    assert _synchronisations(lambda: _step(model, {"pixel_values": matrix.images()}, matrix.labels()), monkeypatch) == {}
