"""The matrix that every invariant runs over. A new method is one more line in METHODS; a new family one more in BACKBONES."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel

from laconic import CompressionConfig, StageConfig, Trace, compress

IMAGE, PATCH, CLASSES, LAYERS = 24, 4, 5, 4


@dataclass(frozen=True)
class Method:
    """A row of parts.

    Attributes:
        detached: the scorer sends no gradient into the backbone.
        positional: scores depend on where a token stands, so that moving padding changes them.
        same_kernel: training runs the same attention kernel as the dense model; a bias with gradient does not.
    """

    name: str
    parts: dict[str, Any]
    detached: bool = True
    positional: bool = False
    same_kernel: bool = True

    def config(self, *keeps: float, layers: tuple[int, ...] = (1, 2)) -> CompressionConfig:
        return CompressionConfig(StageConfig(layer=layer, keep=keep, **self.parts) for layer, keep in zip(layers, keeps, strict=False))


METHODS = [
    Method("learned", {"scorer": {"name": "learned", "detach": True}}),
    Method("learned_attached", {"scorer": "learned"}, detached=False),
    Method("learned_key_bias", {"scorer": {"name": "learned", "detach": True}, "estimator": "key_bias"}, same_kernel=False),
    Method("learned_fuse", {"scorer": {"name": "learned", "detach": True}, "merger": "fuse"}),
    Method("evidence", {"scorer": "evidence", "estimator": "token_labels"}),
    Method("evidence_pixels", {"scorer": {"name": "evidence", "reads": "pixels"}, "estimator": "token_labels"}, positional=True),
    Method("evidence_fuse", {"scorer": "evidence", "estimator": "token_labels", "merger": "fuse"}),
    Method("dynamicvit", {"scorer": {"name": "learned", "detach": True}, "count": "dynamicvit"}),
    Method("evit", {"scorer": "cls_attention", "merger": "fuse", "count": "evit"}),
    Method("random", {"scorer": "random"}, positional=True),
    Method("uniform_grid", {"scorer": "uniform_grid"}, positional=True),
    Method("patch_energy", {"scorer": "patch_energy"}, positional=True),
]
BACKBONES = ["vit", "deit"]


def dense(family: str, **settings: Any) -> PreTrainedModel:
    """A tiny random classifier in evaluation mode."""
    torch.manual_seed(1)
    attention = settings.pop("attn_implementation", "sdpa")
    config = AutoConfig.for_model(
        family,
        hidden_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=IMAGE,
        patch_size=PATCH,
        num_channels=3,
        num_labels=CLASSES,
        initializer_range=0.3,
        architectures=[{"vit": "ViTForImageClassification", "deit": "DeiTForImageClassification"}[family]],
        **settings,
    )
    model = AutoModelForImageClassification.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        # DeiT starts from zero tokens and positions, which would make all patches of one image alike.
        for name, parameter in model.named_parameters():
            if "embeddings" in name:
                parameter.normal_(0, 0.5)
    return model


def compressed(family: str, method: Method, *keeps: float, **settings: Any) -> PreTrainedModel:
    model = compress(dense(family, **settings), method.config(*keeps))
    torch.manual_seed(2)
    with torch.no_grad():
        # Scores of fresh parts are nearly equal; spread them, so that decisions mean something.
        for name, parameter in model.named_parameters():
            if ".stages." in name and parameter.ndim > 1:
                parameter.normal_(0, 0.5)
    return model


def images(rows: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(rows, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(seed))


def labels(rows: int = 3) -> Tensor:
    return torch.arange(rows) % CLASSES


def traced(model: PreTrainedModel, pixels: Tensor, **kwargs: Any) -> tuple[Tensor, Trace]:
    """Logits and trace of one forward; keyword arguments that Trace knows go to it."""
    known = Trace.__dataclass_fields__
    trace = Trace(**{key: kwargs.pop(key) for key in list(kwargs) if key in known and key != "labels"})
    return model(pixel_values=pixels, trace=trace, **kwargs).logits, trace
