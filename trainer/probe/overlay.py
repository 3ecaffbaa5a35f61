"""The overlay of a plan: stages and model of a recipe, as YAML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from ...modules.config import StageConfig
from .part import Part
from .plan import Step


def planned(steps: Sequence[Step]) -> list[Part]:
    """The parts of a plan: of each layer the last one chosen."""
    return sorted({step.part.layer: step.part for step in steps}.values())


def overlay(base: str, blocks: dict[str, Any], stages: Sequence[StageConfig], remark: str) -> str:
    """The YAML of a recipe over a base.

    Args:
        base: name of the recipe below.
        blocks: further blocks, ``model`` and ``data``.
        stages: stages of the plan; those that differ in their layer alone are written together.
        remark: first line, a comment.
    """
    groups: dict[str, dict[str, Any]] = {}
    for stage in stages:
        settings = _settings(stage)
        group = groups.setdefault(repr(settings), {"layer": [], **settings})
        group["layer"].append(int(stage.layer))
    # The keeps of the plan are what is trained, whatever the base draws or schedules.
    nothing = dict.fromkeys(("budget", "training_keep", "phases"))
    data = {"base": base, **blocks, "compression": {"stages": list(groups.values()), "restore": None}, **nothing, "baselines": []}
    text: str = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=140, allow_unicode=True)
    return f"# {remark}\n{text}"


def _settings(stage: StageConfig) -> dict[str, Any]:
    """What a recipe says of a stage, without its layer."""
    settings: dict[str, Any] = {"site": stage.site, "keep": stage.keep}
    if not stage.left_out:
        settings |= {kind: part.name for kind in ("scorer", "selector", "estimator") if (part := getattr(stage, kind)) is not None}
    if stage.shortcut is not None:
        settings["shortcut"] = stage.shortcut.name
    if stage.scope != "all":
        settings["scope"] = stage.scope
    if stage.stack:
        settings["stack"] = stage.stack
    return settings
