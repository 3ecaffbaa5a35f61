"""Models with random weights, dense and compressed, and batches of random numbers, on the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from laconic import CompressionConfig, StageConfig, Trace, compress
from laconic.modules.compress import checkpoint_activations

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def autocast() -> AbstractContextManager[object]:
    """Weights in float32, computed in bf16: what ``trainer.precision: bf16`` does."""
    return torch.autocast(DEVICE, torch.bfloat16)


def flash() -> AbstractContextManager[object]:
    """On a GPU attention by the flash kernel, and by the memory-efficient one where a bias on keys or a mask excludes it."""
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]) if DEVICE == "cuda" else nullcontext()


def synchronise() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@contextmanager
def made_there(dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Models are made on the device, in a dtype, with the same weights each time."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(DEVICE):
            yield
    finally:
        torch.set_default_dtype(before)


def vit(size: dict[str, Any], stages: list[StageConfig] | None = None) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=size["width"],
        num_attention_heads=size["heads"],
        intermediate_size=4 * size["width"],
        num_hidden_layers=size["depth"],
        image_size=size["image"],
        patch_size=16 if size["image"] > 100 else 8,
        num_labels=100,
    )
    with made_there():
        model = ViTForImageClassification._from_config(config, attn_implementation="sdpa")
        return compress(model, CompressionConfig(stages)) if stages else model


def vit_stages(depth: int, **parts: Any) -> list[StageConfig]:
    """.7 of the tokens before a quarter, half and three quarters of the layers."""
    parts = parts or {"scorer": "evidence", "estimator": "token_labels"}
    return [StageConfig(layer=depth * part // 4, keep=0.7, **parts) for part in (1, 2, 3)]


def merged_in_every_layer(size: dict[str, Any]) -> list[StageConfig]:
    """ToMe with as many merges in each layer, 13 for 196 patches and 12 layers."""
    patches = (size["image"] // (16 if size["image"] > 100 else 8)) ** 2
    each = patches * 13 // 196 * 12 // size["depth"]
    parts = {"scorer": "bipartite", "merger": "bipartite", "site": "between"}
    return [StageConfig(layer=layer, tokens=patches - each * (layer + 1), **parts) for layer in range(size["depth"])]


def images(size: dict[str, Any]) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(size["rows"], 3, size["image"], size["image"], device=DEVICE),
        "labels": torch.randint(0, 100, (size["rows"],), device=DEVICE),
    }


def text_config(size: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": size["width"],
        "num_attention_heads": size["heads"],
        "num_key_value_heads": size["kv_heads"],
        "intermediate_size": size["mlp"],
        "num_hidden_layers": size["depth"],
        "vocab_size": size["vocab"],
        "max_position_embeddings": max(4096, size.get("length", 0)),
        **more,
    }


def llm(
    size: dict[str, Any],
    compressed: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    deployed: bool = False,
    protect: dict[str, int] | None = None,
) -> nn.Module:
    """A Llama, with routers around every other layer if ``compressed``, whose decisions are causal if ``deployed``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with made_there(dtype):
        model = LlamaForCausalLM._from_config(LlamaConfig(**text_config(size)), attn_implementation="sdpa")
        model = compress(model, CompressionConfig(around(size, deployed, protect))) if compressed else model
    if size.get("recompute"):
        checkpoint_activations(model)
    return model


def around(size: dict[str, Any], deployed: bool = False, protect: dict[str, int] | None = None) -> list[StageConfig]:
    """Half of the tokens in every other layer. Without ``protect`` rows protect the tokens that begin or end a text, in any number."""
    parts: dict[str, Any] = {"scorer": "linear", "selector": "threshold" if deployed else "top_k", "estimator": "gate", "protect": protect}
    return [StageConfig(layer=layer, site="around", keep=0.5, **parts) for layer in range(1, size["depth"], 2)]


def tokens(size: dict[str, Any]) -> dict[str, Tensor]:
    ids = torch.randint(0, size["vocab"], (size["rows"], size["length"]), device=DEVICE)
    return {"input_ids": ids, "labels": ids}


def vlm(size: dict[str, Any], tower: dict[str, Any], stages: list[StageConfig] | None = None) -> nn.Module:
    from transformers import AutoConfig, LlavaForConditionalGeneration

    width, depth, heads, image, patch = tower["tower"]
    config = AutoConfig.for_model(
        "llava",
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": depth,
            "num_attention_heads": heads,
            "image_size": image,
            "patch_size": patch,
        },
        text_config={"model_type": "llama", **text_config(size)},
        image_token_id=size["vocab"] - 1,
    )
    with made_there(torch.bfloat16):
        model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa")
        return compress(model, CompressionConfig(stages, {"text": {"layer": size["depth"], "by": "rejoin"}})) if stages else model


def vlm_batch(size: dict[str, Any], tower: dict[str, Any], rows: int) -> dict[str, Tensor]:
    _, _, _, image, patch = tower["tower"]
    visual, text = (image // patch) ** 2, tower["text"]
    ids = torch.randint(0, size["vocab"] - 1, (rows, visual + text), device=DEVICE)
    ids[:, 1 : 1 + visual] = size["vocab"] - 1
    labels = ids.masked_fill(torch.arange(visual + text, device=DEVICE) < visual + text // 2, -100)
    pixels = torch.randn(rows, 3, image, image, device=DEVICE, dtype=torch.bfloat16)
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels}


# Visual tokens of a quarter, chosen by the last token of the prompt, from layer 2 on (FastV's place) or halved three times (PyramidDrop's).
def fastv(size: dict[str, Any]) -> list[StageConfig]:
    return [StageConfig(layer=2, keep=0.25, scorer="last_query", stack="text", scope="visual")]


def pyramid(size: dict[str, Any]) -> list[StageConfig]:
    layers = [size["depth"] * part // 4 for part in (1, 2, 3)]
    return [StageConfig(layer=layer, keep=0.5, scorer="last_query", stack="text", scope="visual") for layer in layers]


def loss_of(model: Any, batch: dict[str, Tensor], traced: bool) -> Tensor:
    """The loss of a training step; ``traced`` for a compressed model."""
    if not traced:
        dense: Tensor = model(**batch).loss
        return dense
    trace = Trace(labels=batch["labels"], lookahead=True)
    loss: Tensor = model(**batch, trace=trace).loss
    return loss if trace.auxiliary_loss is None else loss + trace.auxiliary_loss
