"""``merged``: one folder of safetensors and config, routers included, for machines with Laconic."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from ..base import ANSWER, Format, auto_class, compressed
from ..source import ExportSource, Settings


class Merged(Format):
    """Loads with ``laconic.from_pretrained``; a dense model loads with its Auto class."""

    program = f"""
import json, os
from laconic.modules.checkpoints.loading import from_pretrained, saved_class
{ANSWER}
def load(folder):
    with open(os.path.join(folder, "config.json")) as file:
        stages = "compression" in json.load(file)
    if stages:
        model = from_pretrained(folder)
    else:
        model = whole(saved_class(folder).from_pretrained(folder, output_loading_info=True, use_safetensors=True, trust_remote_code=False))
    return lambda batch: answer(model, batch)
"""

    @classmethod
    def write(cls, source: ExportSource, settings: Settings, folder: Path) -> None:
        source.model.save_pretrained(folder, max_shard_size=settings.shard_size)

    @classmethod
    def usage(cls, model: PreTrainedModel) -> str:
        if not compressed(model):
            return f"from transformers import {auto_class(model)}\n\nmodel = {auto_class(model)}.from_pretrained(folder)"
        return "import laconic\n\nmodel = laconic.from_pretrained(folder)"
