"""Rules for estimators: where their gradient comes from, and which values they change."""

from __future__ import annotations

from ..stage import Stage
from .candidate import Candidate


def estimator_for_its_scorer(candidate: Candidate) -> None:
    """An estimator trains a trained scorer, at a site where its gradient comes from."""
    for stage in candidate.stages:
        where, scorer, part = f"stage {stage.config.key!r}", stage.config.part("scorer").name, stage.estimator
        if stage.scorer.estimator is None and stage.config.estimator is not None:
            raise ValueError(f"{where}: scorer {scorer!r} is not trained: leave estimator out")
        if part is None:
            continue
        name = _name(stage)
        if part.needs_chunks and not stage.chunks:
            raise ValueError(f"{where}: estimator {name!r} needs a causal model's chunks and a restore by 'dechunk': leave estimator out")
        if part.bypass_only and not stage.bypass:
            raise ValueError(f"{where}: estimator {name!r} scales a layer's output at bypass sites: give site = 'around', or leave it out")
        if part.needs_answers != stage.scorer.answers_task:
            raise ValueError(f"{where}: estimator {name!r} cannot train scorer {scorer!r}; take {stage.scorer.estimator!r}")
        if part.needs_attention:
            layer, site, last = stage.config.place, stage.config.site, candidate.last_layer(stage)
            attends = layer + 1 < last if site == "between" else site != "around_mlp"
            if not attends:
                raise ValueError(f"{where}: estimator {name!r} learns from attention, and no attention follows: take straight_through")


def weights_without_merging(candidate: Candidate) -> None:
    """A merger would average tokens by weights that are there in training alone, so that its means in use are others."""
    for stage in candidate.stages:
        if stage.estimator is None or not stage.estimator.weighs_training or stage.merger.drops:
            continue
        merger, name = stage.config.part("merger").name, _name(stage)
        raise ValueError(
            f"stage {stage.config.key!r}: estimator {name!r} multiplies tokens by weights in training alone, and merger {merger!r} would average "
            f"them by these weights: give estimator = {name!r} without weighted, or merger = 'drop'"
        )


def _name(stage: Stage) -> str:
    """Name of the stage's estimator, its own or its scorer's."""
    return stage.config.part("estimator").name if stage.config.estimator is not None else str(stage.scorer.estimator)
