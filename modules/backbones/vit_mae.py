"""Adapters for ViT-MAE: the encoder alone, or with its decoder for masked-image pretraining."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel

from ..cost.shape import StackShape
from ..tokens.draws import masking_order
from ..tokens.trace import Trace
from .stack import Stack
from .vision import pair
from .vit import ViT, ViTLayers

PRETRAINING = "ViTMAEForPreTraining"
DECODER = "decoder"


class ViTMaeDecoderLayers(ViTLayers):
    """Decoder layers do not support stages: transformers passes them only the hidden states."""

    sites = ()


class ViTMae(ViT):
    """ViT models whose layers get a random subset of the patches, in random order (arXiv 2111.06377). The pretraining model has a second
    stack, ``decoder``, which predicts all patches.

    The random order of patches is set by ``noise``. The adapter computes it from (seed, step, sample id) if there is a trace, and passes
    it to the model. The flow then knows the grid place of each token, and scorers read the right pixels.
    """

    model_type = "vit_mae"
    classes: ClassVar[tuple[str, ...]] = ("ViTMAEModel", PRETRAINING)

    @classmethod
    def stacks(cls, model: PreTrainedModel) -> tuple[Stack, ...]:
        encoder = super().stacks(model)
        if not hasattr(model, "decoder"):
            return encoder
        decoder: Any = model.decoder
        return (*encoder, Stack(DECODER, decoder.decoder_layers, ViTMaeDecoderLayers, decoder.config))

    @classmethod
    def set_attention(cls, model: PreTrainedModel, stack: Stack, implementation: str) -> None:
        if stack.name == DECODER:
            stack.config._attn_implementation = implementation
        else:
            super().set_attention(model, stack, implementation)

    @classmethod
    def every_token(cls, model: PreTrainedModel, stack: Stack) -> str | None:
        if stack.name == "" and hasattr(model, "decoder"):
            return f"the decoder of {PRETRAINING} needs a token for every unmasked patch (or compress the encoder alone, model.vit)"
        return None

    @classmethod
    def shapes(cls, model: PreTrainedModel, size: tuple[int, int] | int | None = None) -> dict[str, StackShape]:
        config: Any = model.config
        shape = super().shapes(model, size)[""]
        # All patches are embedded before the model masks.
        shapes = {"": replace(shape, routable=visible(config, shape.routable), head_macs=0)}
        if hasattr(model, "decoder"):
            width, tokens = config.decoder_hidden_size, shape.protected + shape.routable
            shapes[DECODER] = StackShape(
                hidden=width,
                intermediate=config.decoder_intermediate_size,
                layers=config.decoder_num_hidden_layers,
                heads=config.decoder_num_attention_heads,
                protected=shape.protected,
                routable=shape.routable,
                # Only the encoder's tokens are embedded; all other patches are one learned mask token.
                embed_macs=(shape.protected + visible(config, shape.routable)) * config.hidden_size * width,
                head_macs=tokens * width * config.patch_size**2 * config.num_channels,
            )
        return shapes

    @classmethod
    def added_inputs(cls, model: PreTrainedModel, trace: Trace | None, inputs: Mapping[str, Any]) -> dict[str, Any]:
        pixel_values = inputs.get("pixel_values")
        if inputs.get("noise") is not None or not isinstance(pixel_values, Tensor):
            return {}
        rows, patches = pixel_values.shape[0], _patches(model.config, pixel_values)
        if trace is None:
            # As the model itself does. Without a trace the step is unknown, and seeded noise would repeat the same mask in training.
            return {"noise": torch.rand(rows, patches, device=pixel_values.device)}
        return {"noise": masking_order(trace.seed, trace.step, trace.rows_identity(rows, pixel_values.device), patches)}

    @classmethod
    def bind_inputs(cls, model: PreTrainedModel, trace: Trace, inputs: Mapping[str, Any]) -> None:
        super().bind_inputs(model, trace, inputs)
        noise, flow = inputs.get("noise"), trace.flow()
        if isinstance(noise, Tensor):
            # The same sort as in the model, on the same noise.
            kept = torch.argsort(noise, dim=1)[:, : visible(model.config, noise.shape[1])]
            flow.places = functional.pad(kept + flow.leading, (flow.leading, 0))


def visible(config: Any, patches: int) -> int:
    """Number of patches that the model's masking leaves to its encoder, by the model's own rounding."""
    return int(patches * (1 - config.mask_ratio))


def _patches(config: PretrainedConfig, pixel_values: Tensor) -> int:
    down, across = pair(config.patch_size)
    return (pixel_values.shape[-2] // down) * (pixel_values.shape[-1] // across)


def fill_positions(model: PreTrainedModel) -> None:
    """Gives a fresh ViT-MAE its frozen sine and cosine positions, in the encoder and in the decoder.

    transformers (5.17 and 5.23) leaves both at zero in a model made from a config: it skips the encoder's positions, because another
    parameter of the embeddings is already initialised, and overwrites the decoder's. They are frozen, so training would not correct
    them, and the decoder could not distinguish missing patches.
    """
    parts: Any = model
    encoder = getattr(parts, "vit", parts)
    with torch.no_grad():
        for positions in (
            encoder.embeddings.position_embeddings,
            *([parts.decoder.decoder_pos_embed] if hasattr(parts, "decoder") else []),
        ):
            side = round((positions.shape[1] - 1) ** 0.5)
            positions[0].copy_(sine_positions(side, positions.shape[2]))


def sine_positions(side: int, width: int) -> Tensor:
    """(1 + side², width) float32: zeros for CLS, then for each patch the sines and cosines of its column and of its row."""
    if width % 4:
        raise ValueError(f"a width of {width} cannot hold two-dimensional sine positions: it must be a multiple of 4")
    frequency = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    place = torch.arange(side, dtype=torch.float64)
    row, column = place.repeat_interleave(side), place.repeat(side)
    angles = [column.outer(frequency), row.outer(frequency)]
    table = torch.cat([half for angle in angles for half in (angle.sin(), angle.cos())], 1)
    return functional.pad(table, (0, 0, 1, 0)).float()
