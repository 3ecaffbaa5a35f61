"""The matrix that every invariant runs over. A new method is one more line in METHODS; a new family one more in FAMILIES."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedModel
from transformers.models.dinov2.modeling_dinov2 import Dinov2Layer

from laconic import CompressionConfig, StageConfig, Trace, compress
from laconic.modules.backbones import adapter_of
from laconic.modules.backbones.stack import Stack

IMAGE, PATCH, CLASSES, LAYERS = 24, 4, 5, 4


@dataclass(frozen=True)
class Method:
    """A row of parts.

    Attributes:
        detached: the scorer sends no gradient into the backbone.
        positional: scores depend on where a token stands, so that moving padding changes them.
        same_kernel: training runs the same attention kernel as the dense model; a bias with gradient does not.
        site: where its stages sit.
        adaptive: rows keep as many tokens as they like.
    """

    name: str
    parts: dict[str, Any]
    detached: bool = True
    positional: bool = False
    same_kernel: bool = True
    site: str = "before"
    adaptive: bool = False

    @property
    def bypass(self) -> bool:
        return self.site.startswith("around")

    @property
    def merges(self) -> bool:
        return self.parts.get("merger", "drop") != "drop"

    def config(self, *keeps: float, layers: tuple[int, ...] = (1, 2)) -> CompressionConfig:
        least = 0.5 if self.parts.get("merger") == "bipartite" else 0.0
        return CompressionConfig(
            StageConfig(layer=layer, site=self.site, keep=max(keep, least), **self.parts)
            for layer, keep in zip(layers, keeps, strict=False)
        )


_LEARNED = {"scorer": {"name": "learned", "detach": True}}


METHODS = [
    Method("learned", _LEARNED),
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
    Method("tome", {"scorer": "bipartite", "merger": "bipartite"}, site="between"),
    Method("bipartite_tokens", {"scorer": {"name": "bipartite", "metric": "tokens"}, "merger": "bipartite"}),
    Method("squeeze", {**_LEARNED, "merger": {"name": "squeeze", "proportional": True}}),
    Method("threshold", {**_LEARNED, "selector": "threshold"}, adaptive=True),
    Method("gumbel", {**_LEARNED, "selector": "gumbel"}, site="between", adaptive=True),
    Method("threshold_fuse", {**_LEARNED, "selector": "threshold", "merger": "fuse"}, adaptive=True),
    Method("threshold_squeeze", {**_LEARNED, "selector": "threshold", "merger": "squeeze"}, site="between", adaptive=True),
    Method("around", _LEARNED, site="around"),
    Method("around_attention", _LEARNED, site="around_attention"),
    Method("around_mlp", {"scorer": "evidence"}, site="around_mlp"),
]


@dataclass(frozen=True)
class Family:
    """A tiny model of a family.

    Attributes:
        architecture: class of the model.
        settings: beside the common ones.
        vision: the settings belong to the vision tower of an image-text model.
        refuses: methods that the family cannot have; each is tested to be refused.
    """

    architecture: str
    settings: dict[str, Any]
    vision: bool = False
    refuses: tuple[str, ...] = ()


_COMMON = {"hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "image_size": IMAGE, "patch_size": PATCH}
_TEXT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 8}
_MLP = {"intermediate_size": 32}
FAMILIES = {
    "vit": Family("ViTForImageClassification", {**_MLP, "initializer_range": 0.3}),
    "deit": Family("DeiTForImageClassification", {**_MLP, "initializer_range": 0.3}),
    "dinov2": Family("Dinov2ForImageClassification", {"mlp_ratio": 2, "layerscale_value": 0.7, "initializer_range": 0.3}),
    "dinov2_with_registers": Family(
        "Dinov2WithRegistersForImageClassification",
        {"mlp_ratio": 2, "use_swiglu_ffn": True, "num_register_tokens": 3, "initializer_range": 0.3},
    ),
    "clip": Family("CLIPForImageClassification", {**_MLP, "initializer_factor": 3.0}, vision=True),
    "siglip": Family("SiglipForImageClassification", _MLP, vision=True, refuses=("evit",)),
    "beit": Family(
        "BeitForImageClassification",
        {**_MLP, "use_relative_position_bias": True, "layer_scale_init_value": 0.7, "drop_path_rate": 0.0, "initializer_range": 0.3},
    ),
    # A mask ratio of 0 leaves every patch, in random order.
    "vit_mae": Family(
        "ViTMAEModel",
        {**_MLP, "mask_ratio": 0.0, "initializer_range": 0.3},
    ),
}
BACKBONES = list(FAMILIES)
# Versions of transformers differ in what can be compressed; the adapter says so.
if "attention_mask" not in inspect.signature(Dinov2Layer.forward).parameters:
    BACKBONES = [family for family in BACKBONES if not family.startswith("dinov2")]
PAIRS = [(family, method) for family in BACKBONES for method in METHODS if method.name not in FAMILIES[family].refuses]


def dense(family: str, **settings: Any) -> PreTrainedModel:
    """A tiny random model in evaluation mode, a classifier where the family has one."""
    torch.manual_seed(1)
    attention, about = settings.pop("attn_implementation", "sdpa"), FAMILIES[family]
    inner = {**_COMMON, "num_channels": 3, **about.settings, **settings}
    outer: dict[str, Any] = {"vision_config": inner, "text_config": _TEXT} if about.vision else inner
    config = AutoConfig.for_model(family, **outer, num_labels=CLASSES, architectures=[about.architecture])
    auto = AutoModelForImageClassification if about.architecture.endswith("ForImageClassification") else AutoModel
    model = auto.from_config(config, attn_implementation=attention).eval()
    assert type(model).__name__ == about.architecture
    with torch.no_grad():
        # Fresh tokens, positions and biases may be zero, which would make all patches of one image alike.
        for name, parameter in model.named_parameters():
            if "embeddings" in name or "relative_position_bias" in name or name.startswith("classifier"):
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
        settle(model)
    return model


def settle(model: PreTrainedModel) -> None:
    """Thresholds as if they had followed the scores to 0; one that has seen none lets the top k stay."""
    for name, buffer in model.named_buffers():
        if name.endswith("selector.batches"):
            buffer.fill_(1)


def stack_of(model: PreTrainedModel) -> Stack:
    """The first stack of a model, dense or compressed: its layers and their adapter."""
    return adapter_of(model).stacks(model)[0]


def images(rows: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(rows, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(seed))


def labels(rows: int = 3) -> Tensor:
    return torch.arange(rows) % CLASSES


def inputs(model: PreTrainedModel, pixels: Tensor) -> dict[str, Tensor]:
    """What a forward takes: the images and, for a model that shuffles its patches, an order that hangs on the image alone."""
    if model.config.model_type != "vit_mae":
        return {"pixel_values": pixels}
    return {"pixel_values": pixels, "noise": functional.avg_pool2d(pixels.float().mean(1), PATCH).flatten(1)}


def answer(outputs: Any) -> Tensor:
    """Logits, or the first token of a model without a head."""
    return outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state[:, 0]


def loss_of(model: PreTrainedModel, pixels: Tensor, rows: int = 3, **kwargs: Any) -> Tensor:
    """Loss of a training forward; that of a model without a head pulls on every number of its answer."""
    if "trace" in kwargs:
        kwargs["trace"].labels = labels(rows)
    if model.config.model_type != "vit_mae":
        return model(**inputs(model, pixels), labels=labels(rows), **kwargs).loss
    return answer(model(**inputs(model, pixels), **kwargs)).pow(3).mean()


def traced(model: PreTrainedModel, pixels: Tensor, **kwargs: Any) -> tuple[Tensor, Trace]:
    """Answer and trace of one forward; keyword arguments that Trace knows go to it."""
    known = Trace.__dataclass_fields__
    trace = Trace(**{key: kwargs.pop(key) for key in list(kwargs) if key in known and key != "labels"})
    return answer(model(**inputs(model, pixels), trace=trace, **kwargs)), trace
