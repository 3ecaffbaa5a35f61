"""Stages around neighbouring layers: one decision for several of them (``share``), or decisions that differ (``spread``)."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import StageConfig
from .candidate import Candidate

# What stages with one decision have in common.
_ALIKE = ("keep", "tokens", "scope", "protect", "scorer", "selector", "count")


def read_by(stage: StageConfig, own: Sequence[StageConfig]) -> StageConfig | None:
    """The stage whose decision another one reads: takes over, or prefers the tokens that it left out. None if it reads none.

    Args:
        stage: a stage.
        own: all stages of its stack, in running order.
    """
    if stage.follows is not None:
        return next((one for one in own if (one.site, one.layer) == (stage.site, stage.follows) and one.follows is None), None)
    if not stage.spread:
        return None
    earlier = [one for one in own[: own.index(stage)] if one.bypass and not one.left_out]
    return earlier[-1] if earlier else None


def decided_by_neighbours(candidate: Candidate) -> None:
    for stage in candidate.config.stages:
        if stage.follows is None and not stage.spread:
            continue
        own = candidate.config.of_stack(stage.stack)
        where, key = f"stage {stage.key!r}", f"follows = {stage.follows}" if stage.follows is not None else f"spread = {stage.spread}"
        if not stage.bypass or stage.left_out:
            raise ValueError(f"{where}: {key} is for stages around layers with keep above 0: remove it")
        other = read_by(stage, own)
        if other is None or own.index(other) >= own.index(stage):
            cure = (
                f"give the layer of an earlier stage {stage.site} it, which decides by itself"
                if stage.follows is not None
                else "there is no earlier stage around a layer, so remove it"
            )
            raise ValueError(f"{where}: {key}: {cure}")
        if shorter := [one.key for one in own[own.index(other) : own.index(stage)] if not one.bypass]:
            raise ValueError(f"{where}: {key}: stages {', '.join(shorter)} remove tokens since {other.key!r} has decided: remove {key}")
        if stage.follows is None:
            continue
        if stage.spread:
            raise ValueError(f"{where}: {key}: spread = {stage.spread} has no effect on a decision of another stage: remove one of them")
        if differing := [name for name in _ALIKE if getattr(stage, name) != getattr(other, name)]:
            name = differing[0]
            raise ValueError(
                f"{where}: {key}: {name} = {getattr(stage, name)!r} differs from {getattr(other, name)!r} of {other.key!r}, which decides "
                "for both: make them alike"
            )


def spread_by_scores(candidate: Candidate) -> None:
    for stage in candidate.stages:
        if stage.config.spread and not stage.selector.by_scores:
            raise ValueError(
                f"stage {stage.config.key!r}: spread = {stage.config.spread} changes scores, and selector "
                f"{stage.config.part('selector').name!r} decides without them when deployed: take 'threshold', or 'top_k' if the model is not causal"
            )
