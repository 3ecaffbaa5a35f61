"""Initialises a ViT for fine-tuning from the encoder of a pretrained ViT-MAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, ViTConfig, ViTMAEModel

from ..stage import stages_of
from .adapters import quietly
from .base_weights import check_weights
from .foreign_config import load_config
from .loading import from_pretrained
from .tensors import copy_all

# Settings with the same name and meaning in both configs.
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
    """The ViTConfig of a ViT-MAE's encoder.

    Args:
        name: folder of a ViT-MAE's weights, dense or compressed, or hub name.
        revision: revision of a hub model.

    Raises:
        ValueError: there is no model, or it is not a ViT-MAE.
    """
    config = _mae_config(name, revision)
    return ViTConfig(**{key: getattr(config, key) for key in ENCODER_SETTINGS})


def load_encoder(model: PreTrainedModel, name: str | Path, revision: str | None = None) -> None:
    """Copies the weights of a ViT-MAE's encoder into a dense ViT, in place. The ViT's head is unchanged; the decoder is not used.

    The fixed sine positions of the pretraining become the ViT's positions, which are trained further. A ViT and a ViT-MAE read patches
    in the same order and have the same parameter names; names, shapes and copied values are checked.

    Args:
        model: ``ViTModel`` or ``ViTForImageClassification`` of the same sizes.
        name: as in ``encoder_config``.
        revision: revision of a hub model.

    Raises:
        ValueError: there is no ViT-MAE, or its sizes or parameters differ.
        RuntimeError: the ViT-MAE lacks a weight, or a copied value differs.
    """
    config = _mae_config(name, revision)
    differing = [key for key in ENCODER_SETTINGS if key not in _FREE and getattr(config, key) != getattr(model.config, key)]
    if differing:
        sizes = ", ".join(f"{key} {getattr(config, key)} there and {getattr(model.config, key)} here" for key in differing)
        raise ValueError(f"the encoder of {name} does not fit: {sizes}")
    # Decoder and routers are left over, without a warning.
    with quietly():
        loaded: Any = ViTMAEModel.from_pretrained(
            str(name), revision=revision or "main", config=config, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    encoder, report = loaded
    wrong = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if wrong:
        raise RuntimeError(f"{name} lacks weights of its encoder: {', '.join(wrong[:5])}; they would be initialised at random")
    base = getattr(model, model.base_model_prefix, model)
    # The pooler of ViTModel belongs to the head.
    own = {key: value for key, value in base.named_parameters() if not key.startswith("pooler.")}
    copy_all(own, dict(encoder.named_parameters()), f"the encoder of {name}")


def load_routers(model: PreTrainedModel, name: str | Path, revision: str | None = None) -> None:
    """Copies the stage weights of the pretraining into the stages of a compressed model, in place.

    Args:
        model: compressed model; the pretraining must have had every stage, with the same name and parts.
        name: as in ``encoder_config``.
        revision: revision of a hub model.

    Raises:
        ValueError: the pretraining had no such stage, or its parts differ.
        RuntimeError: the ViT-MAE lacks a weight, or a copied value differs.
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


# Settings that may differ between pretraining and fine-tuning, since no weight depends on them.
_FREE = ("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range")


def _mae_config(name: str | Path, revision: str | None) -> Any:
    check_weights(name, revision)
    try:
        config: Any = load_config(name, revision)
    except ValueError as error:
        raise ValueError(
            f"{name} is no folder of weights here and cannot be loaded from the hub ({str(error).splitlines()[0]}): give a folder or hub "
            "name of a vit_mae"
        ) from None
    if config.model_type != "vit_mae":
        raise ValueError(
            f"{name} is a {config.model_type} model, and only a vit_mae has an encoder that was pretrained with masking: give a folder or "
            "hub name of one, or load the model as it is"
        )
    return config
