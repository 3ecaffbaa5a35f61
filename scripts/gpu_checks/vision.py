"""Training steps of ViTs."""

from __future__ import annotations

from typing import Any

from .measuring import each_measured, measured
from .models import flash, images, merged_in_every_layer, vit, vit_stages
from .part import Setting


def vit_step(setting: Setting) -> dict[str, Any]:
    """Training step of a ViT-S/16: chosen, merged and adaptive counts against dense and oracle."""
    size = setting.sizes["vit"]
    arms = {
        "evidence": vit(size, vit_stages(size["depth"])),
        "tome": vit(size, vit_stages(size["depth"], scorer="bipartite", merger="bipartite")),
        "threshold": vit(size, vit_stages(size["depth"], scorer="learned", selector="threshold")),
    }
    return measured(setting, vit(size), arms, images(size))


def vit_large_step(setting: Setting) -> dict[str, Any]:
    """Training step of a ViT-L/16 at 384 pixels."""
    size = setting.sizes["vit_large"]
    return measured(setting, vit(size), {"evidence": vit(size, vit_stages(size["depth"]))}, images(size))


def _at(setting: Setting, name: str) -> dict[str, Any]:
    size = setting.sizes[name]
    arms = {
        "evidence": lambda: vit(size, vit_stages(size["depth"])),
        "learned": lambda: vit(size, vit_stages(size["depth"], scorer="learned")),
    }
    with flash():
        return each_measured(setting, lambda: vit(size), arms, images(size))


def vit_base_224(setting: Setting) -> dict[str, Any]:
    """Training step of a ViT-B/16 at 224 pixels, .7 of the tokens before layers 3, 6 and 9."""
    return _at(setting, "vit_base_224")


def vit_base_448(setting: Setting) -> dict[str, Any]:
    """The same at 448 pixels."""
    return _at(setting, "vit_base_448")


def vit_large_224(setting: Setting) -> dict[str, Any]:
    """Training step of a ViT-L/16 at 224 pixels, .7 of the tokens before layers 6, 12 and 18."""
    return _at(setting, "vit_large_224")


def vit_large_448(setting: Setting) -> dict[str, Any]:
    """The same at 448 pixels."""
    return _at(setting, "vit_large_448")


def tome(setting: Setting) -> dict[str, Any]:
    """ToMe in every layer of a ViT-S/16 and of a ViT-B/16, 13 merges each."""
    found, size = {}, setting.sizes["vit"]
    with flash():
        for name, size in (("small", setting.sizes["vit"]), ("base", setting.sizes["vit_base_224"])):
            arms = {"tome": lambda size=size: vit(size, merged_in_every_layer(size))}
            found[name] = each_measured(setting, lambda size=size: vit(size), arms, images(size))
    return found


def adaptive_packing(setting: Setting) -> dict[str, Any]:
    """A number of tokens for each image: rows of a ViT-B/16 that are packed without padding."""
    size = setting.sizes["vit_base_224"]
    arms = {
        "threshold": lambda: vit(size, vit_stages(size["depth"], scorer="learned", selector="threshold")),
        "gumbel": lambda: vit(size, vit_stages(size["depth"], scorer="learned", selector="gumbel")),
    }
    with flash():
        return each_measured(setting, lambda: vit(size), arms, images(size))


PARTS = (vit_step, vit_large_step, vit_base_224, vit_base_448, vit_large_224, vit_large_448, tome, adaptive_packing)
