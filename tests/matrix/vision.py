"""Images: every method × every family. A new method is one more line in METHODS; a new family one more in FAMILIES."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedModel
from transformers.models.dinov2.modeling_dinov2 import Dinov2Layer

from laconic import Trace, compress

from .case import Batch, Case, spread, stack_of, traced_outputs
from .masked import Reference, take, with_layers_replaced
from .method import Family, Method, outside

IMAGE, PATCH, CLASSES, LAYERS = 24, 4, 5, 4
PATCHES = (IMAGE // PATCH) ** 2

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
    Method("nearest", {**_LEARNED, "merger": "nearest"}, positional=True),
    Method("clusters", {"scorer": "density_peaks", "merger": "nearest"}, positional=True),
    Method("threshold", {**_LEARNED, "selector": "threshold"}, adaptive=True),
    Method("gumbel", {**_LEARNED, "selector": "gumbel"}, site="between", adaptive=True),
    Method("threshold_fuse", {**_LEARNED, "selector": "threshold", "merger": "fuse"}, adaptive=True),
    Method("threshold_squeeze", {**_LEARNED, "selector": "threshold", "merger": "squeeze"}, site="between", adaptive=True),
    Method("around", _LEARNED, site="around"),
    Method("around_attention", _LEARNED, site="around_attention"),
    Method("around_mlp", {"scorer": "evidence"}, site="around_mlp"),
    *outside(),
]

_COMMON = {"hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "image_size": IMAGE, "patch_size": PATCH}
_TEXT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 8}
_MLP = {"intermediate_size": 32}


def _classifier(name: str, settings: dict[str, Any], **about: Any) -> Family:
    return Family(settings, architecture=f"{name}ForImageClassification", **{"prefix": 1, **about})


_BEIT = {**_MLP, "use_relative_position_bias": True, "layer_scale_init_value": 0.7, "drop_path_rate": 0.0, "initializer_range": 0.3}
_REGISTERS = {"mlp_ratio": 2, "use_swiglu_ffn": True, "num_register_tokens": 3, "initializer_range": 0.3}
FAMILIES = {
    "vit": _classifier("ViT", {**_MLP, "initializer_range": 0.3}),
    "deit": _classifier("DeiT", {**_MLP, "initializer_range": 0.3}, prefix=2),
    "dinov2": _classifier("Dinov2", {"mlp_ratio": 2, "layerscale_value": 0.7, "initializer_range": 0.3}, averages=True),
    "dinov2_with_registers": _classifier("Dinov2WithRegisters", _REGISTERS, prefix=4, averages=True),
    # The towers of CLIP and SigLIP take no attention_mask, so that they cannot be given padded rows.
    "clip": _classifier("CLIP", {**_MLP, "initializer_factor": 3.0}, tower=True, averages=True, padded=False),
    "siglip": _classifier("Siglip", _MLP, tower=True, prefix=0, averages=True, padded=False, refuses=("evit",)),
    "beit": _classifier("Beit", _BEIT, averages=True),
    # A mask ratio of 0 leaves every patch, in random order.
    "vit_mae": Family({**_MLP, "mask_ratio": 0.0, "initializer_range": 0.3}, architecture="ViTMAEModel", prefix=1),
}
BACKBONES = list(FAMILIES)
# Versions of transformers differ in what can be compressed; the adapter says so.
if "attention_mask" not in inspect.signature(Dinov2Layer.forward).parameters:
    BACKBONES = [family for family in BACKBONES if not family.startswith("dinov2")]
PAIRS = [(family, method) for family in BACKBONES for method in METHODS if FAMILIES[family].tests(method)]


def dense(family: str, **settings: Any) -> PreTrainedModel:
    """A tiny random model in evaluation mode, a classifier where the family has one."""
    torch.manual_seed(1)
    attention, about = settings.pop("attn_implementation", "sdpa"), FAMILIES[family]
    inner = {**_COMMON, "num_channels": 3, **about.settings, **settings}
    outer: dict[str, Any] = {"vision_config": inner, "text_config": _TEXT} if about.tower else inner
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
    return spread(compress(dense(family, **settings), method.config(*keeps)))


def images(rows: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(rows, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(seed))


def labels(rows: int = 3) -> Tensor:
    return torch.arange(rows) % CLASSES


def inputs(model: PreTrainedModel, pixels: Tensor) -> dict[str, Tensor]:
    return inputs_of(model.config.model_type, pixels)


def inputs_of(family: str, pixels: Tensor) -> dict[str, Tensor]:
    """What a forward takes: the images and, for a model that shuffles its patches, an order that depends on the image alone."""
    if family != "vit_mae":
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
    outputs, trace = traced_outputs(model, inputs(model, pixels), kwargs, own=("labels",))
    return answer(outputs), trace


class _Reference(Reference):
    def own_bias(self, layer: nn.Module) -> Tensor | float:
        """Of BEiT: a bias by place."""
        make, shared = getattr(layer, "relative_position_bias", None), self.kwargs.get("attention_mask")
        if make is None and shared is None:
            return 0.0
        bias = torch.zeros(()) if shared is None else shared[0]
        if make is not None:
            height, width = self.kwargs["resolution"]
            down, across = height // PATCH, width // PATCH
            bias = bias + make((down, across), self.kwargs["interpolate_pos_encoding"], dim_size=down * across + 1)[0]
        return torch.stack([torch.stack([bias[:, i][:, row] for i in row.tolist()], 1) for row in self.place])


def masked_reference(plain: PreTrainedModel, family: str, pixels: Tensor, trace: Trace, **how: Any) -> Tensor:
    """Answer of a forward that computes every token in every layer."""
    twin, recorded = with_layers_replaced(plain)
    twin(**inputs(plain, pixels), **how)
    assert trace.state is not None
    stack = stack_of(plain)
    kept = _Reference(recorded.given, stack.adapter, recorded.kwargs, trace.state.proportional).run(stack.layers, trace)
    if FAMILIES[family].averages and trace.state.proportional:
        # A head that averages counts a merged token as all that it stands for.
        kept = take(kept, trace.state.source)
    return answer(with_layers_replaced(plain, kept)[0](**inputs(plain, pixels), **how))


class ImageCase(Case):
    """Rows are images; padded ones have a mask over their patches, since images have one size."""

    close: ClassVar[dict[str, float]] = {"atol": 1e-5, "rtol": 1e-4}
    close_gradients: ClassVar[dict[str, float]] = {"atol": 1e-5, "rtol": 1e-3}

    @property
    def about(self) -> Family:
        return FAMILIES[self.family]

    def dense(self, **settings: Any) -> PreTrainedModel:
        return dense(self.family, **settings)

    def inputs(self, layout: str = "", seed: int = 0) -> dict[str, Tensor]:
        return inputs_of(self.family, images(seed=seed))

    def lengths(self) -> Tensor:
        return torch.full((3,), self.about.prefix + PATCHES)

    def batches(self) -> list[Batch]:
        whole = self.inputs()
        padded = {**whole, "attention_mask": torch.ones(3, self.about.prefix + PATCHES, dtype=torch.long)}
        padded["attention_mask"][1, -13:] = 0
        padded["attention_mask"][2, -20:] = 0
        layouts = [whole, padded] if self.about.padded else [whole]
        return [Batch(one, [{key: value[row : row + 1] for key, value in one.items()} for row in range(3)]) for one in layouts]

    def tied(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value * torch.tensor([1, 0, 1]).reshape(-1, *[1] * (value.ndim - 1)) for key, value in inputs.items()}

    def answer(self, outputs: Any) -> Tensor:
        return answer(outputs)

    def loss(self, model: PreTrainedModel, inputs: dict[str, Tensor], trace: Trace | None = None) -> Tensor:
        return loss_of(model, inputs["pixel_values"], **({} if trace is None else {"trace": trace}))

    def reference(self, model: PreTrainedModel, plain: PreTrainedModel, trace: Trace) -> Tensor:
        return masked_reference(plain, self.family, images(), trace)

    def exact(self, training: bool, padded: bool) -> bool:
        return self.method.same_kernel or not training


CASES = [ImageCase(*pair) for pair in PAIRS]
