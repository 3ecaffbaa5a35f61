"""What a compressed forward costs, from token counts alone: no forward is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from .backbones import backbone_for
from .backbones.base import Backbone
from .compress import CompressedModel, build_stages, stages_of
from .config import CompressionConfig
from .counting import BackboneShape, LayerTokens
from .stage import Stage


@dataclass(frozen=True)
class Cost:
    """Cost of one row's forward.

    Attributes:
        layers: tokens of each layer, protected ones included.
        dense_tokens: tokens of every layer of the dense model.
        macs: multiply-accumulates, routers, mergers, embedding and head included.
        dense_macs: the same of the dense model.
        stage_macs: of routers and mergers alone, by stage name.
        kept: routable tokens leaving each stage, by stage name.
        activation_bytes: estimate of what a training step holds for backward, at 4 bytes a value.
        dense_activation_bytes: the same of the dense model.
    """

    layers: tuple[LayerTokens, ...]
    dense_tokens: int
    macs: int
    dense_macs: int
    stage_macs: Mapping[str, int]
    kept: Mapping[str, int]
    activation_bytes: int
    dense_activation_bytes: int

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
        image_size: height and width in pixels of the input; None takes the configured size.
    """

    def __init__(self, model: PreTrainedModel, config: CompressionConfig | None = None, image_size: tuple[int, int] | None = None) -> None:
        if isinstance(model, CompressedModel):
            backbone: type[Backbone] = model.backbone
            self.stages: list[tuple[int, Stage]] = list(stages_of(model).values())
        else:
            backbone = backbone_for(model.config.model_type, type(model).__name__)
            if config is None:
                self.stages = []
            else:
                filled = config.with_keep({stage.key: 1.0 if stage.keep is None else stage.keep for stage in config.stages})
                self.stages = [(stage.config.layer, stage) for stage in build_stages(model, filled, backbone)]
        self.shape: BackboneShape = backbone.shape(model, image_size)

    def __call__(self, keep: Mapping[str, float] | None = None) -> Cost:
        """Cost with the given keep by stage name, over the stages' own."""
        shape, wanted = self.shape, keep or {}
        present, counts = shape.patches, {}
        before = dict(self.stages)
        layers: list[LayerTokens] = []
        stage_macs: dict[str, int] = {}
        for index in range(shape.layers):
            if index in before:
                stage = before[index]
                key, own = stage.config.key, stage.config.keep
                assert own is not None
                kept = stage.count(present, wanted.get(key, own), shape.patches)
                assert isinstance(kept, int)
                stage_macs[key] = stage.macs(shape, shape.prefix + present, shape.prefix + kept)
                counts[key] = present = kept
            layers.append(LayerTokens(shape.prefix + present, shape.prefix + present))
        dense = shape.dense_layers()
        return Cost(
            layers=tuple(layers),
            dense_tokens=shape.prefix + shape.patches,
            macs=shape.model_macs(layers) + sum(stage_macs.values()),
            dense_macs=shape.model_macs(dense),
            stage_macs=stage_macs,
            kept=counts,
            activation_bytes=shape.activation_bytes(layers),
            dense_activation_bytes=shape.activation_bytes(dense),
        )

    def soft_macs_ratio(self, keep: Mapping[str, Tensor]) -> Tensor:
        """``macs_ratio`` for keeps that are tensors, with gradient; token counts are real numbers here.

        Args:
            keep: scalar tensor by stage name; stages that are not named use their own number.
        """
        shape, before = self.shape, dict(self.stages)
        present: Tensor | float = float(shape.patches)
        total: Tensor | float = float(shape.embed_macs + shape.head_macs)
        for index in range(shape.layers):
            if index in before:
                stage = before[index]
                own = stage.config.keep
                assert own is not None
                entering = present
                present = present * keep.get(stage.config.key, own)
                total = total + stage.macs(shape, shape.prefix + entering, shape.prefix + present)  # type: ignore[arg-type]
            tokens = LayerTokens(shape.prefix + present, shape.prefix + present)  # type: ignore[arg-type]
            total = total + shape.layer_macs(tokens)
        total = total + shape.head_macs_per_token * (shape.prefix + present)
        ratio = total / shape.model_macs(shape.dense_layers())
        assert isinstance(ratio, Tensor)
        return ratio
