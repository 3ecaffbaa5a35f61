"""Adapters for DINOv2 with registers."""

from __future__ import annotations

from typing import Any, ClassVar

from .dinov2 import Dinov2, Dinov2Layers


class Dinov2WithRegistersLayers(Dinov2Layers):
    """DINOv2 layers whose sequence is CLS, the registers, the patches; CLS and registers are protected."""

    @classmethod
    def leading(cls, config: Any) -> int:
        return 1 + int(config.num_register_tokens)


class Dinov2WithRegisters(Dinov2):
    """DINOv2 models with registers."""

    model_type = "dinov2_with_registers"
    layer_adapter = Dinov2WithRegistersLayers
    classes: ClassVar[tuple[str, ...]] = ("Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification")
