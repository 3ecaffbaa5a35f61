"""The graph of a model's forward, for formats that contain a graph instead of Python."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ...modules.backbones import families
from ...modules.backbones.vision import VisionModel
from ...modules.stage import stages_of
from ...modules.tokens.trace import Trace
from ..errors import RecipeError

# In tracing, transformers makes full masks that hide nothing, as if rows had padding, unless the attention implementation has no mask
# function. This name has none. Only for models in which all tokens attend to each other.
ATTENTION = "laconic_export"


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Any:
    """transformers' SDPA with an output whose memory layout is contiguous even under a mask.

    Under a mask, torch's ONNX converter would otherwise use a layout that differs from the graph's.
    """
    output, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return (output if attention_mask is None else output.clone(memory_format=torch.contiguous_format)), weights


AttentionInterface.register(ATTENTION, _attention)

_REDUCING = ("scatter_reduce", "scatter_add", "index_add", "index_reduce")


@torch.no_grad()
def check_static(model: PreTrainedModel, inputs: Mapping[str, Tensor], name: str) -> None:
    """Raises RecipeError if rows can keep different numbers of tokens: a graph has fixed tensor sizes.

    Args:
        model: model in evaluation mode.
        inputs: inputs of the forward that is checked.
        name: name of the format, for the message.
    """
    stages, trace = stages_of(model), Trace()
    if not stages:
        return
    model(**inputs, trace=trace)
    uneven = [
        f"{key} (selector {stages[key].config.part('selector').name!r})"
        for key, routing in trace.routings.items()
        if isinstance(routing.kept, Tensor)
    ]
    if uneven:
        raise RecipeError(
            f"--format {name}: in stage {', '.join(uneven)} the number of kept tokens differs between rows, and a graph needs a fixed "
            "number; use merged or standalone, or, for images, train with selector top_k"
        )


class _Logits(nn.Module):
    """A model as a function of named tensors to its logits."""

    def __init__(self, model: PreTrainedModel, names: list[str]) -> None:
        super().__init__()
        self.model = model

        # A graph has no use for a cache.
        options = {"use_cache": False} if model.can_generate() else {}

        def forward(*args: Tensor, **kwargs: Tensor) -> Any:
            return model(**dict(zip(names, args, strict=False)), **kwargs, **options).logits

        # torch.export takes the names of the graph's inputs from the signature.
        forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        )
        self.forward = forward


@torch.no_grad()
def captured(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> ExportedProgram:
    """The forward as a graph from the inputs to ``logits``, for any number of rows.

    Args:
        model: model in evaluation mode with static counts; its attention implementation is changed.
        inputs: inputs of two or more rows.

    Raises:
        RecipeError: torch.export fails on the model.
        RuntimeError: the graph has a scatter with a reduction, which is slow or missing in runtimes.
    """
    adapter = families().get(model.config.model_type)
    if adapter is not None and issubclass(adapter, VisionModel):
        model.set_attn_implementation(ATTENTION)
    rows = Dim("batch", min=1)
    function, shapes = _Logits(model, list(inputs)).eval(), {name: {0: rows} for name in inputs}
    try:
        program = torch.export.export(function, (), dict(inputs), dynamic_shapes=shapes, strict=False)
    except (UserError, GuardOnDataDependentSymNode) as error:
        # A size depends on values or on the number of rows.
        detail = str(error).strip().splitlines()[0]
        raise RecipeError(f"torch.export cannot trace {type(model).__name__}: {detail}; use merged or standalone") from error
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    if reducing := sorted(target for target in targets if any(name in target for name in _REDUCING)):
        raise RuntimeError(f"the model's graph has a scatter with a reduction: {', '.join(reducing)}")
    return program
