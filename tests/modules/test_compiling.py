"""torch.compile of training steps: one graph for each shape, with the losses and gradients of eager steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import PreTrainedModel

from laconic import CompressionConfig, StageConfig, Trace, compress
from laconic.modules.compress import checkpoint_activations
from laconic.trainer.tasks.base import task_named
from tests import matrix
from tests.matrix import decoders

pytestmark = pytest.mark.skipif(
    transformers.__version__ < "5.18",
    reason="while it is traced, transformers 5.17 makes a mask that hides nothing, and a count is then the device's",
)


def _image_model(method: str) -> PreTrainedModel:
    model = matrix.compressed("vit", next(it for it in matrix.METHODS if it.name == method), 0.5, 0.6)
    # As tasks set it: otherwise the first forward does, which would be another graph.
    model.config.problem_type = "single_label_classification"
    return model


def _text_model() -> PreTrainedModel:
    stage = StageConfig(layer=1, site="around", keep=0.5, scorer="linear", selector="threshold", estimator="gate", protect={"first": 1})
    model = compress(decoders.dense("llama"), CompressionConfig([stage]))
    checkpoint_activations(model)
    return model


def _images(rows: int) -> dict[str, Tensor]:
    return {"pixel_values": matrix.images(rows), "labels": matrix.labels(rows)}


def _text(rows: int) -> dict[str, Any]:
    ids = decoders.tokens(rows)
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def _step(model: PreTrainedModel, inputs: dict[str, Any], step: int) -> Tensor:
    """The loss of a training step, after its backward: step, noise and progress are other numbers each time."""
    model.zero_grad()
    trace = Trace(step=step, noise=1 / (2 + step), progress=step / 10, labels=inputs["labels"])
    loss: Tensor = model(**inputs, trace=trace).loss
    loss = loss if trace.auxiliary_loss is None else loss + trace.auxiliary_loss
    loss.backward()
    assert trace.step == step
    return loss.detach()


CASES: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[int], dict[str, Any]]]] = {
    "learned": (lambda: _image_model("learned"), _images),
    "tome": (lambda: _image_model("tome"), _images),
    # Without gradient checkpointing, with top_k, the test of scripts/gpu_check has the same.
    "text": (_text_model, _text),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_steps_of_one_shape_are_one_graph_with_the_gradients_of_eager_steps(name: str) -> None:
    make, inputs = CASES[name]
    eager = make().train()
    model = copy.deepcopy(eager)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model.compile(backend=counter, fullgraph=True)
    for step in range(3):
        torch.testing.assert_close(_step(model, inputs(3), step), _step(eager, inputs(3), step))
        for (key, ours), theirs in zip(model.named_parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda text, key=key: f"{key}: {text}")
    assert counter.frame_count == 1


def _masks(step: Callable[[], Any], compiled: Any) -> set[tuple[bool, bool]]:
    """Of each attention in the graph of a step: whether it has a mask, and whether it is causal by itself."""
    found = set()

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        # Recomputed layers are graphs inside the graph.
        graphs = [module.graph for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]
        attention = torch.nn.functional.scaled_dot_product_attention
        calls = [node for inner in graphs for node in inner.nodes if node.target is attention]
        found.update((call.kwargs["attn_mask"] is not None, call.kwargs["is_causal"]) for call in calls)
        return graph.forward

    torch._dynamo.reset()
    compiled.compile(backend=backend, fullgraph=True)
    step()
    return found


@pytest.mark.slow
def test_a_compiled_decoder_whose_rows_are_whole_has_sdpa_s_own_mask() -> None:
    model, inputs = _text_model().train(), _text(2)
    assert _masks(lambda: _step(model, inputs, 0), model) == {(False, True)}
    # As a task trains it, with the positions and documents of its rows.
    rows, tokens = inputs["input_ids"].shape
    model, places = _text_model().train(), torch.arange(tokens).expand(rows, -1)
    batch = {**inputs, "position_ids": places, "documents": torch.zeros_like(places)}
    task: Any = task_named("causal_lm")
    assert _masks(lambda: task.loss(model, batch, trace=Trace(labels=inputs["labels"])), model.base_model) == {(False, True)}


@pytest.mark.slow
@pytest.mark.parametrize("layer_types", [None, ["full_attention"] * 4])
def test_a_window_shorter_than_the_row_stays_in_a_compiled_graph(layer_types: list[str] | None) -> None:
    config = transformers.MistralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2,
        sliding_window=4, layer_types=layer_types,
    )  # fmt: skip
    stage = StageConfig(layer=1, site="around", keep=0.5, scorer="linear", selector="threshold", protect={"first": 1})
    model = compress(transformers.MistralForCausalLM._from_config(config, attn_implementation="sdpa"), CompressionConfig([stage])).train()
    ids = torch.arange(12)[None]
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    assert _masks(lambda: _step(model, inputs, 0), model) == {(True, False)}
