"""DINOv2 with registers of transformers."""

from __future__ import annotations

from typing import Any, ClassVar

from .dinov2 import Dinov2Backbone


class Dinov2WithRegistersBackbone(Dinov2Backbone):
    """The sequence is CLS, the registers, the patches; the first two are protected. Otherwise a DINOv2."""

    model_type = "dinov2_with_registers"
    classes: ClassVar[tuple[str, ...]] = ("Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification")

    @classmethod
    def prefix(cls, config: Any) -> int:
        return 1 + int(config.num_register_tokens)
