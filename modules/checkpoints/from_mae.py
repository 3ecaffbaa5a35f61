"""Fine-tuning what masked-image pretraining learned: from a ViT-MAE's encoder to a ViT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel, ViTConfig, ViTMAEModel

from ..stage import stages_of
from .adapters import quietly
from .loading import from_pretrained
from .tensors import copy_all

# What both configs have, under one name and with one meaning.
ENCODER_SETTINGS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
    "image_size",
    "patch_size",
    "num_channels",
    "qkv_bias",
)


def encoder_config(name: str | Path, revision: str | None = None) -> ViTConfig:
    """The config of the ViT that a ViT-MAE's encoder is.

    Args:
        name: folder of a ViT-MAE's weights, compressed or of transformers, or hub name of one.
        revision: of a hub model.

    Raises:
        ValueError: there is no model, or it is no ViT-MAE.
    """
    config = _mae_config(name, revision)
    return ViTConfig(**{key: getattr(config, key) for key in ENCODER_SETTINGS})


def load_encoder(model: PreTrainedModel, name: str | Path, revision: str | None = None) -> None:
    """Gives a dense ViT the weights of a ViT-MAE's encoder, in place. Its head stays as it is; the decoder is left behind.

    The positions of the pretraining, sines that were frozen there, become the ViT's own, which learn on. A ViT and a ViT-MAE
    read patches in one order and have the same parameters under the same names, which is checked, each by its value.

    Args:
        model: ``ViTModel`` or ``ViTForImageClassification`` of the same sizes.
        name: as for ``encoder_config``.
        revision: of a hub model.

    Raises:
        ValueError: there is no ViT-MAE there, or it is of other sizes or has other parameters.
        RuntimeError: a weight is missing in it, or did not arrive.
    """
    config = _mae_config(name, revision)
    differing = [key for key in ENCODER_SETTINGS if key not in _FREE and getattr(config, key) != getattr(model.config, key)]
    if differing:
        told = ", ".join(f"{key} {getattr(config, key)} there and {getattr(model.config, key)} here" for key in differing)
        raise ValueError(f"the encoder of {name} does not fit: {told}")
    # A decoder and routers are left over.
    with quietly():
        loaded: Any = ViTMAEModel.from_pretrained(
            str(name), revision=revision or "main", config=config, dtype=torch.float32, output_loading_info=True
        )
    encoder, report = loaded
    wrong = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if wrong:
        raise RuntimeError(f"{name} lacks weights of its encoder: {', '.join(wrong[:5])}; it would be fine-tuned from noise")
    base = getattr(model, model.base_model_prefix, model)
    # A pooler of ViTModel is a head.
    ours = {key: value for key, value in base.named_parameters() if not key.startswith("pooler.")}
    copy_all(ours, dict(encoder.named_parameters()), f"the encoder of {name}")


def load_routers(model: PreTrainedModel, name: str | Path, revision: str | None = None) -> None:
    """Gives the stages of a compressed model the weights that they had in the pretraining, in place.

    Args:
        model: compressed; every stage must have been there too, under the same name and of the same parts.
        name: as for ``encoder_config``.
        revision: of a hub model.

    Raises:
        ValueError: the pretraining had no such stage, or one of other parts.
        RuntimeError: a weight is missing in it, or did not arrive.
    """
    config = _mae_config(name, revision)
    if getattr(config, "compression", None) is None:
        raise ValueError(f"{name} was pretrained without stages: there are no routers to take over")
    source = stages_of(from_pretrained(name, revision=revision))
    for key, stage in stages_of(model).items():
        if key not in source:
            raise ValueError(f"stage {key!r} was not there in the pretraining of {name}: its stages are {', '.join(source)}")
        was = source[key]
        parts = ("scorer", "merger", "selector")
        differing = [kind for kind in parts if was.config.part(kind) != stage.config.part(kind)] + ["layer"] * (
            was.config.layer != stage.config.layer
        )
        if differing:
            raise ValueError(f"stage {key!r}: its {' and '.join(differing)} differ from those of the pretraining of {name}")
        copy_all(stage.state_dict(), was.state_dict(), f"stage {key!r} of {name}")


# May differ between pretraining and fine-tuning: they have no weights.
_FREE = ("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range")


def _mae_config(name: str | Path, revision: str | None) -> Any:
    try:
        config: Any = AutoConfig.from_pretrained(str(name), revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} is no folder of weights here and cannot be loaded from the hub ({str(error).splitlines()[0]}): give a folder or hub name "
            "of a vit_mae"
        ) from None
    if config.model_type != "vit_mae":
        raise ValueError(
            f"{name} is a {config.model_type} model, and only a vit_mae has an encoder that was pretrained with masking: give a folder or hub "
            "name of one, or load the model as it is"
        )
    return config
