"""What a part of the checks gets and gives."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class NotHereError(Exception):
    """A part cannot run on this machine; the message is the reason."""


@dataclass(frozen=True)
class Setting:
    """How a part runs.

    Attributes:
        sizes: sizes of models and batches by name.
        rounds: paired rounds of a timed step.
        ends: ``time.perf_counter()`` after which no further round begins, once there are eight.
        rehearsal: tiny sizes, on any device.
    """

    sizes: dict[str, dict[str, Any]]
    rounds: int
    ends: float
    rehearsal: bool = False

    def seconds(self, share: float = 1.0) -> float:
        """Share of the seconds that are left."""
        return max(0.0, share * (self.ends - time.perf_counter()))


Part = Callable[[Setting], dict[str, Any]]

# Sizes of the models and batches.
REAL: dict[str, dict[str, Any]] = {
    "vit": {"width": 384, "heads": 6, "depth": 12, "image": 224, "rows": 1024},
    "vit_base_224": {"width": 768, "heads": 12, "depth": 12, "image": 224, "rows": 256},
    "vit_base_448": {"width": 768, "heads": 12, "depth": 12, "image": 448, "rows": 64},
    "vit_large": {"width": 1024, "heads": 16, "depth": 24, "image": 384, "rows": 32},
    "vit_large_224": {"width": 1024, "heads": 16, "depth": 24, "image": 224, "rows": 128},
    "vit_large_448": {"width": 1024, "heads": 16, "depth": 24, "image": 448, "rows": 32},
    # 1.1 billion parameters.
    "llm": {"width": 2048, "heads": 32, "kv_heads": 4, "mlp": 5632, "depth": 22, "vocab": 32000, "rows": 4, "length": 2048},
    "llm_4k": {"width": 2048, "heads": 32, "kv_heads": 4, "mlp": 5632, "depth": 22, "vocab": 32000, "rows": 2, "length": 4096},
    # Four models and the activations of one would not fit beside each other: layers are recomputed.
    "llm_16k": {
        "width": 2048,
        "heads": 32,
        "kv_heads": 4,
        "mlp": 5632,
        "depth": 22,
        "vocab": 32000,
        "rows": 1,
        "length": 16384,
        "recompute": True,
    },
    # Half a billion parameters, in float32 with an optimizer for each of three models.
    "zero": {"width": 2048, "heads": 32, "kv_heads": 4, "mlp": 5632, "depth": 8, "vocab": 32000, "rows": 4, "length": 2048},
    # The tower of LLaVA 1.5 and a language model of 1.1 billion parameters.
    "vlm": {"tower": (1024, 24, 16, 336, 14), "rows": 8, "text": 64},
    # The shape of LLaVA 1.5 7B.
    "vlm_7b": {"width": 4096, "heads": 32, "kv_heads": 32, "mlp": 11008, "depth": 32, "vocab": 32064, "rows": 8},
    "decoding": {"prompt": 1024, "new": 32, "rows": (1, 8)},
}
_VIT = {"width": 32, "heads": 2, "depth": 4, "image": 32, "rows": 4}
_LLM = {"width": 32, "heads": 4, "kv_heads": 2, "mlp": 48, "depth": 4, "vocab": 64, "rows": 2, "length": 48}
TINY: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("vit", "vit_base_224", "vit_large", "vit_large_224"), _VIT),
    **{key: {**_VIT, "image": 48} for key in ("vit_base_448", "vit_large_448")},
    **dict.fromkeys(("llm", "zero"), _LLM),
    "llm_4k": {**_LLM, "length": 64},
    "llm_16k": {**_LLM, "rows": 1, "length": 96, "recompute": True},
    "vlm": {"tower": (16, 2, 2, 56, 14), "rows": 2, "text": 8},
    "vlm_7b": {"width": 32, "heads": 4, "kv_heads": 4, "mlp": 48, "depth": 4, "vocab": 64, "rows": 2},
    "decoding": {"prompt": 24, "new": 4, "rows": (1, 2)},
}
