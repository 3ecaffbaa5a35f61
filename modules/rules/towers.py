"""Rules for stages in towers whose layers take no mask, or whose patches are joined behind them."""

from __future__ import annotations

from .candidate import Candidate


def layers_without_mask(candidate: Candidate) -> None:
    """Layers of some towers take no mask of their tokens."""
    for stage in candidate.stages:
        where, adapter = f"stage {stage.config.key!r}", stage.adapter
        if adapter.no_key_bias is not None and stage.estimator is not None and stage.estimator.needs_attention:
            raise ValueError(
                f"{where}: estimator = {stage.config.part('estimator').name!r} weighs keys, and {adapter.no_key_bias}: leave it out"
            )
        if adapter.no_key_bias is not None and stage.merger.proportional:
            raise ValueError(f"{where}: merger with proportional = true weighs keys, and {adapter.no_key_bias}: give proportional = false")
        if adapter.no_padding is not None and stage.selector.adaptive:
            name = stage.config.part("selector").name
            raise ValueError(f"{where}: selector {name!r} makes rows of different lengths, and {adapter.no_padding}: take 'top_k'")


def whole_units(candidate: Candidate) -> None:
    """Where a later layer joins squares of patches, they stay or leave together."""
    for stage in candidate.stages:
        scorer, merger = (stage.config.part(kind).name for kind in ("scorer", "merger"))
        if stage.unit == 1:
            continue
        where = f"stage {stage.config.key!r}: {stage.unit} patches are joined into one token behind the tower, and"
        if stage.scorer.matches:
            raise ValueError(f"{where} scorer {scorer!r} merges single ones: take another scorer, with merger 'squeeze' or 'nearest'")
        if stage.merger.extra or stage.merger.outputs is not None:
            raise ValueError(f"{where} merger {merger!r} makes tokens that are no patches: take 'drop', 'squeeze' or 'nearest'")
