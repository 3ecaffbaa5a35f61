"""LoRA beside routers on weights in 4 bits."""

from __future__ import annotations

import importlib.util
import tempfile
from typing import Any

import torch
from torch import nn

from laconic import CompressionConfig, compress
from laconic.modules.checkpoints.lora import add_lora

from .measuring import measured
from .models import DEVICE, around, flash, llm, tokens
from .part import NotHereError, Setting


def lora_4bit(setting: Setting) -> dict[str, Any]:
    """Training step of LoRA and routers on a Llama in 4 bits (QLoRA, 2305.14314), against LoRA alone and the oracle."""
    from peft import LoraConfig
    from transformers import LlamaForCausalLM

    packed = importlib.util.find_spec("bitsandbytes") is not None and DEVICE == "cuda"
    if not packed and not setting.rehearsal:
        raise NotHereError("the package bitsandbytes is not installed: pip install bitsandbytes")
    size = setting.sizes["llm"]
    with tempfile.TemporaryDirectory() as folder:
        llm(size).save_pretrained(folder)

        def loaded(stages: bool) -> nn.Module:
            options: dict[str, Any] = _four_bits() if packed else {}
            model = LlamaForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16, attn_implementation="sdpa", trust_remote_code=False, **options
            )
            model = compress(model, CompressionConfig(around(size))) if stages else model
            return add_lora(model, LoraConfig(r=16, lora_alpha=32)).to(DEVICE)

        with flash():
            found = measured(setting, loaded(False), {"around": loaded(True)}, tokens(size), size["length"])
    return found | {"quantized": packed}


def _four_bits() -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device()}}


PARTS = (lora_4bit,)
