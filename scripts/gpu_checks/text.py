"""Training steps of language and vision-language models."""

from __future__ import annotations

from typing import Any

from .measuring import each_measured, measured
from .models import fastv, flash, llm, pyramid, tokens, vlm, vlm_batch
from .part import Setting


def llm_step(setting: Setting) -> dict[str, Any]:
    """Training step of a decoder with routers around every other layer."""
    size = setting.sizes["llm"]
    return measured(setting, llm(size), {"around": llm(size, True)}, tokens(size), size["length"])


def llm_4k(setting: Setting) -> dict[str, Any]:
    """The same at 4,096 tokens a row."""
    size = setting.sizes["llm_4k"]
    with flash():
        return measured(setting, llm(size), {"around": llm(size, True)}, tokens(size), size["length"])


def llm_16k(setting: Setting) -> dict[str, Any]:
    """The same at 16,384 tokens a row, with gradient checkpointing in all arms."""
    size = setting.sizes["llm_16k"]
    with flash():
        return measured(setting, llm(size), {"around": llm(size, True)}, tokens(size), size["length"])


def vlm_step(setting: Setting) -> dict[str, Any]:
    """Training step of a LLaVA whose language model goes on with a quarter of the visual tokens."""
    size, tower = setting.sizes["llm"], setting.sizes["vlm"]
    arms = {"fastv": lambda: vlm(size, tower, fastv(size)), "pyramiddrop": lambda: vlm(size, tower, pyramid(size))}
    return each_measured(setting, lambda: vlm(size, tower), arms, vlm_batch(size, tower, tower["rows"]), tower["text"])


PARTS = (llm_step, llm_4k, llm_16k, vlm_step)
