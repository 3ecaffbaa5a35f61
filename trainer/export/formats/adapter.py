"""``adapter``: PEFT's two files with the routers beside them, for users who have the base model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from ....modules.checkpoints.adapter_folder import read_adapter, write_adapter
from ....modules.checkpoints.loading import from_pretrained
from ...errors import RecipeError
from ..base import ANSWER, Format
from ..source import ExportSource, Settings


class AdapterFormat(Format):
    """Loads with ``laconic.from_pretrained``; plain PEFT loads its LoRA onto the plain base."""

    dtypes = ("fp32",)
    with_code = False
    # In the clean process, plain PEFT must load every tensor of its file into the plain base, with equal values.
    program = f"""
import json, os
from laconic.modules.checkpoints.loading import from_pretrained
{ANSWER}
def load(folder):
    with open(os.path.join(folder, "manifest.json")) as file:
        lora = json.load(file)["lora"]
    if lora:
        import torch
        from peft import PeftModel, get_peft_model_state_dict
        from safetensors.torch import load_file
        from laconic.modules.checkpoints.adapter_folder import read_adapter
        from laconic.modules.checkpoints.adapters import load_base
        plain = PeftModel.from_pretrained(load_base(read_adapter(folder), folder), folder)
        expected = load_file(os.path.join(folder, "adapter_model.safetensors"))
        loaded = get_peft_model_state_dict(plain, save_embedding_layers=False)
        wrong = [name for name, value in expected.items() if name not in loaded or not torch.equal(loaded[name], value)]
        if wrong:
            raise SystemExit(f"plain PEFT does not load {{wrong[:3]}} into the plain base")
    model = from_pretrained(folder)
    return lambda batch: answer(model, batch)
"""

    @classmethod
    def check(cls, source: ExportSource) -> None:
        if source.run.adapter is None:
            raise RecipeError(f"{source.run.path} trained all weights, or has no adapter: use --format merged")

    @classmethod
    def reference(cls, source: ExportSource) -> PreTrainedModel:
        # Its LoRA is not merged: merging rounds the weights, and so gives other answers.
        return source.model if source.run.adapter is None else from_pretrained(source.run.adapter, keep=source.keep)

    @classmethod
    def write(cls, source: ExportSource, settings: Settings, folder: Path) -> None:
        assert source.run.adapter is not None
        adapter = read_adapter(source.run.adapter)
        if source.keep is not None:
            # Thresholds move with the keep, and the run's figures are of its own.
            state = source.model.state_dict()
            stages = {name: state[name] for name in adapter.stages}
            adapter = replace(adapter, compression=source.model.config.compression, stages=stages, ratio={})
        write_adapter(adapter, folder)

    @classmethod
    def usage(cls, model: PreTrainedModel) -> str:
        return "import laconic\n\nmodel = laconic.from_pretrained(folder)"
