"""``torch-export``: the graph of ``torch.export`` with its weights, in one ``.pt2`` archive."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from ...run_folder import GRAPHS
from ..base import Format
from ..capture import captured, check_static
from ..source import ExportSource, Settings

FILE = GRAPHS["torch-export"]


class TorchExport(Format):
    """Needs torch only: ``torch.export.load``. The number of rows is free; all other sizes are fixed."""

    hugging_face = False
    without: ClassVar[tuple[str, ...]] = ("laconic", "transformers")
    program = f"""
import torch, os
def load(folder):
    model = torch.export.load(os.path.join(folder, "{FILE}")).module()
    def answer(batch):
        with torch.no_grad():
            return {{"logits": model(**batch).float().contiguous()}}
    return answer
"""

    @classmethod
    def check(cls, source: ExportSource) -> None:
        check_static(source.model, source.batches()[0], "torch-export")

    @classmethod
    def write(cls, source: ExportSource, settings: Settings, folder: Path) -> None:
        program = captured(source.backbone(), source.batches()[0])
        # Example inputs are the only part that torch writes with pickle.
        program.example_inputs = None
        torch.export.save(program, folder / FILE)
        source.model.config.save_pretrained(folder)
        with zipfile.ZipFile(folder / FILE) as archive:
            pickled = [name for name in archive.namelist() if name.endswith((".pt", ".pkl")) and archive.getinfo(name).file_size]
            configs = [archive.read(name).decode() for name in archive.namelist() if name.endswith("_config.json")]
        if pickled or any('"use_pickle": true' in config for config in configs):
            raise RuntimeError(f"{folder / FILE} holds pickled objects, which loading would run: {', '.join(pickled) or 'weights'}")

    @classmethod
    def usage(cls, model: PreTrainedModel) -> str:
        return f'import torch\n\nmodel = torch.export.load(f"{{folder}}/{FILE}").module()'
