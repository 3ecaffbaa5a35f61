"""What a compressed forward costs, from token counts alone: no forward is run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..backbones import backbone_for
from ..backbones.base import Backbone
from ..compress import CompressedModel, build_stages, stages_of
from ..config import CompressionConfig
from ..stage import Stage
from ..tokens.trace import Trace
from .shape import BackboneShape, LayerTokens


@dataclass(frozen=True)
class Cost:
    """Cost of one row's forward.

    Attributes:
        layers: tokens of each layer, protected ones included.
        dense_tokens: tokens of every layer of the dense model.
        macs: multiply-accumulates, routers, mergers, embedding and head included.
        dense_macs: the same of the dense model.
        stage_macs: of routers and mergers alone, by stage name.
        keep: requested keep of each stage, or capacity where it is a bypass, by stage name.
        kept: routable tokens leaving each stage, or going through where it is a bypass, by stage name; a mean where rows differ.
        activation_bytes: estimate of what a training step holds for backward, at 4 bytes a value.
        dense_activation_bytes: the same of the dense model.
        kv_bytes: that a row leaves in a causal model's cache, at 4 bytes a value; 0 for other models.
        dense_kv_bytes: the same of the dense model.
    """

    layers: tuple[LayerTokens, ...]
    dense_tokens: int
    macs: int
    dense_macs: int
    stage_macs: Mapping[str, int]
    keep: Mapping[str, float]
    kept: Mapping[str, float]
    activation_bytes: int
    dense_activation_bytes: int
    kv_bytes: int = 0
    dense_kv_bytes: int = 0

    @property
    def macs_ratio(self) -> float:
        """MACs of the compressed forward ÷ MACs dense: the compression ratio."""
        return self.macs / self.dense_macs

    @property
    def mean_token_fraction(self) -> float:
        """Mean over layers of tokens processed ÷ tokens processed dense."""
        return sum(tokens.attention + tokens.mlp for tokens in self.layers) / (2 * self.dense_tokens * len(self.layers))


class CostModel:
    """Cost as a function of the keeps of a model's stages.

    Args:
        model: dense or compressed.
        config: stages for a dense model; a compressed one brings its own.
        size: of the input, height and width in pixels or tokens of a text; None takes the configured size, and 1024 tokens.
    """

    def __init__(self, model: PreTrainedModel, config: CompressionConfig | None = None, size: tuple[int, int] | int | None = None) -> None:
        self.restore_layer: int | None = None
        self.stages: list[Stage] = []
        if isinstance(model, CompressedModel):
            backbone: type[Backbone] = model.backbone
            config = CompressionConfig.from_dict(model.config.compression)
            self.stages = [stage for _, stage in stages_of(model).values()]
        else:
            backbone = backbone_for(model.config.model_type, type(model).__name__)
            if config is not None:
                # A budget decides these later; until then they keep everything.
                filled = config.with_keep({stage.key: 1.0 for stage in config.stages if stage.free})
                self.stages = build_stages(model, filled, backbone)
        if config is not None and config.restore is not None:
            self.restore_layer = config.restore.layer
        self.backbone = backbone
        self.shape: BackboneShape = backbone.shape(model, size)

    def __call__(self, keep: Mapping[str, float] | None = None) -> Cost:
        """Cost with the given keep (or capacity) by stage name, over the stages' own."""
        shape, wanted = self.shape, keep or {}

        def kept(stage: Stage, present: float) -> float:
            return stage.expected(present, shape.patches, wanted.get(stage.config.key))

        walk = self._walk(kept)
        layers = tuple(LayerTokens(shape.prefix + attention, shape.prefix + mlp) for attention, mlp in walk.layers)
        dense = shape.dense_layers()
        return Cost(
            layers=layers,
            dense_tokens=shape.prefix + shape.patches,
            macs=round(shape.model_macs(layers, shape.prefix + walk.leaving) + sum(walk.stage_macs.values())),
            dense_macs=round(shape.model_macs(dense)),
            stage_macs={name: round(macs) for name, macs in walk.stage_macs.items()},
            keep={
                stage.config.key: walk.kept[stage.config.key] / walk.present[stage.config.key]
                if stage.config.fraction is None
                else wanted.get(stage.config.key, stage.config.fraction)
                for stage in self.stages
            },
            kept=walk.kept,
            activation_bytes=round(shape.activation_bytes(layers)),
            dense_activation_bytes=round(shape.activation_bytes(dense)),
            kv_bytes=round(shape.kv_bytes(layers)) if self.backbone.causal else 0,
            dense_kv_bytes=round(shape.kv_bytes(dense)) if self.backbone.causal else 0,
        )

    def soft_macs_ratio(self, keep: Mapping[str, Tensor]) -> Tensor:
        """``macs_ratio`` for keeps that are tensors, with gradient; token counts are real numbers here.

        Args:
            keep: scalar tensor by stage name; stages that are not named use their own number.
        """
        shape = self.shape

        def kept(stage: Stage, present: Any) -> Any:
            given = keep.get(stage.config.key)
            return stage.expected(float(present), shape.patches) if given is None else present * given

        walk = self._walk(kept)
        layers = [LayerTokens(shape.prefix + attention, shape.prefix + mlp) for attention, mlp in walk.layers]
        macs = shape.model_macs(layers, shape.prefix + walk.leaving) + sum(walk.stage_macs.values())
        ratio = macs / shape.model_macs(shape.dense_layers())
        assert isinstance(ratio, Tensor)
        return ratio

    def achieved(self, trace: Trace) -> float:
        """``macs_ratio`` of what a forward did: MACs of its rows, each with its own token counts, ÷ their MACs dense."""
        assert trace.state is not None
        shape = replace(self.shape, patches=max(1, round(_mean(trace.original))))
        layers = [LayerTokens(tokens.attention, tokens.mlp) for _, tokens in sorted(trace.layer_tokens.items())]  # type: ignore[arg-type]
        total: Any = shape.model_macs(layers, trace.state.tokens_per_row)  # type: ignore[arg-type]
        # Of the input that was given, which need not have the configured size.
        whole: Any = shape.prefix + trace.original
        dense: Any = shape.model_macs([LayerTokens(whole, whole)] * shape.layers)
        embedding = shape.embed_macs * (trace.original / self.shape.patches - 1)
        total, dense = total + embedding, dense + embedding
        for stage in self.stages:
            routing = trace.routings[stage.config.key]
            total = total + stage.macs(shape, shape.prefix + routing.present, shape.prefix + routing.kept)  # type: ignore[arg-type]
        return _mean(total) / _mean(dense)

    def _walk(self, kept: Callable[[Stage, Any], Any]) -> _Walk:
        """Goes through the sites in order; ``kept`` says how many of the routable tokens present a stage keeps or processes."""
        shape = self.shape
        at = {(stage.config.layer, stage.config.site): stage for stage in self.stages}
        present: Any = shape.patches
        walk = _Walk([], {}, {}, {}, present)

        def meet(layer: int, site: str, entering: Any) -> Any:
            stage = at.get((layer, site))
            if stage is None:
                return entering
            leaving = kept(stage, entering)
            walk.stage_macs[stage.config.key] = stage.macs(shape, shape.prefix + entering, shape.prefix + leaving)
            walk.present[stage.config.key], walk.kept[stage.config.key] = entering, leaving
            return leaving

        for layer in range(shape.layers):
            if layer == self.restore_layer:
                present = shape.patches
            present = meet(layer, "before", present)
            through = meet(layer, "around", present)
            attention = meet(layer, "around_attention", through)
            if (layer, "between") in at:
                present = through = meet(layer, "between", present)
            walk.layers.append((attention, meet(layer, "around_mlp", through)))
        walk.leaving = shape.patches if self.restore_layer == shape.layers else present
        return walk


def _mean(macs: float | Tensor) -> float:
    return float(macs.double().mean()) if isinstance(macs, Tensor) else float(macs)


@dataclass
class _Walk:
    """Routable tokens in the attention and the MLP of every layer; MACs, tokens present and tokens kept of every stage;
    tokens that leave the last layer."""

    layers: list[tuple[Any, Any]]
    stage_macs: dict[str, Any]
    present: dict[str, Any]
    kept: dict[str, Any]
    leaving: Any
