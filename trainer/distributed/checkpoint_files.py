"""Single-file checkpoints that are whole or absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ...modules.checkpoints.whole_files import write_file
from ..errors import NotSaved


class WholeCheckpoints(TorchCheckpointIO):
    """Writes beside the target and renames. Lightning itself writes to TMPDIR and moves the file, which copies between file systems: a kill
    then leaves a truncated checkpoint."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        try:
            write_file(Path(path), lambda file: torch.save(checkpoint, file))
        except (OSError, RuntimeError) as error:
            # torch's writer turns a full disk into a RuntimeError.
            raise NotSaved(
                f"{path} could not be written: {error}; checkpoints before it are kept: free space, then --resume auto"
            ) from None
