"""``onnx``: a graph for onnxruntime and other runtimes that read ONNX."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.onnx import OnnxExporterError
from transformers import PreTrainedModel

from ...errors import RecipeError
from ...run_folder import GRAPHS
from ..base import Format
from ..capture import captured, check_static
from ..source import ExportSource, Settings

FILE = GRAPHS["onnx"]
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class Onnx(Format):
    """Needs onnxruntime only. The number of rows is free; all other sizes are fixed."""

    # The runtime fuses operations and sums in another order.
    tolerance = 1e-4
    dtypes: ClassVar[tuple[str, ...]] = ("fp32",)
    hugging_face = False
    without: ClassVar[tuple[str, ...]] = ("laconic", "transformers", "torch")
    tensors = "numpy"
    program = f"""
import onnxruntime, os
def load(folder):
    session = onnxruntime.InferenceSession(os.path.join(folder, "{FILE}"), providers=["CPUExecutionProvider"])
    return lambda batch: {{"logits": session.run(["logits"], batch)[0]}}
"""

    @classmethod
    def requirements(cls) -> None:
        missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            raise RecipeError(f"--format onnx needs {', '.join(missing)}: pip install 'laconic[onnx]'")

    @classmethod
    def check(cls, source: ExportSource) -> None:
        check_static(source.model, source.batches()[0], "onnx")

    @classmethod
    def write(cls, source: ExportSource, settings: Settings, folder: Path) -> None:
        converted(source.backbone(), source.batches()[0]).save(folder / FILE, external_data=True)
        source.model.config.save_pretrained(folder)

    @classmethod
    def usage(cls, model: PreTrainedModel) -> str:
        return f'import onnxruntime\n\nmodel = onnxruntime.InferenceSession(f"{{folder}}/{FILE}")'


def converted(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Any:
    """The forward as an ``ONNXProgram``, from the inputs to ``logits``, for any number of rows. Arguments and errors as in ``captured``;
    also RecipeError if torch's converter fails."""
    program = captured(model, inputs)
    with warnings.catch_warnings():
        # The converter's warnings are about its internals; users can do nothing about them.
        warnings.simplefilter("ignore")
        try:
            made: Any = torch.onnx.export(
                program,
                (),
                kwargs=dict(inputs),
                output_names=["logits"],
                dynamo=True,
                verbose=False,
                custom_translation_table={torch.ops.aten.sort.stable: _stable_sort()},
            )
        except OnnxExporterError as error:
            detail = str(error.__cause__ or error).strip().splitlines()[0]
            raise RecipeError(f"--format onnx: torch cannot convert {type(model).__name__}: {detail}; use torch-export") from error
    if reducing := sorted({node.op_type for node in _nodes(made.model) if _reduces(node)}):
        raise RuntimeError(f"the ONNX graph has a scatter with a reduction: {', '.join(reducing)}")
    return made


def _stable_sort() -> Any:
    """ONNX translation of a stable sort, which torch's converter lacks: TopK of all elements, in which ties go to the lower index."""
    import onnx_ir
    from onnxscript import opset18

    narrow = (onnx_ir.DataType.BOOL, onnx_ir.DataType.INT8, onnx_ir.DataType.UINT8)

    def sort(values: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
        # Runtimes have no TopK of bytes.
        wide = opset18.Cast(values, to=int(onnx_ir.DataType.INT32)) if values.dtype in narrow else values
        axis = dim % len(values.shape)
        number = opset18.Shape(values, start=axis, end=axis + 1)
        ordered, indices = opset18.TopK(wide, number, axis=axis, largest=int(descending), sorted=1)
        return opset18.CastLike(ordered, values) if values.dtype in narrow else ordered, indices

    return sort


def _nodes(model: Any) -> Iterator[Any]:
    """Every node of the graph and of its functions."""
    for graph in (model.graph, *model.functions.values()):
        yield from graph.all_nodes() if hasattr(graph, "all_nodes") else graph


def _reduces(node: Any) -> bool:
    reduction = node.attributes.get("reduction")
    return node.op_type.startswith("Scatter") and reduction is not None and reduction.value != "none"
