"""Which stages can have another keep than their own: in a training step, in a teacher, in evaluation, or from now on."""

from __future__ import annotations

from collections.abc import Iterable

from ..stage import Stage


def check_movable(stages: Iterable[Stage], key: str, least: float) -> None:
    """Raises ValueError if a stage cannot follow a keep other than its own.

    Args:
        stages: built stages.
        key: what requests the keep, for the message.
        least: lowest keep that is requested.
    """
    for stage in stages:
        where, selector, merger = f"stage {stage.config.key!r}", *(stage.config.part(kind).name for kind in ("selector", "merger"))
        if stage.selector.one_keep:
            raise ValueError(
                f"{where}: selector {selector!r} keeps what its router learned, and {key} requests other keeps: take top_k, threshold or "
                "predictor"
            )
        if stage.merger.outputs is not None:
            raise ValueError(f"{where}: merger {merger!r} makes one number of tokens, and {key} requests others: take another merger")
        check_halves([stage], key, least)


def check_halves(stages: Iterable[Stage], key: str, least: float) -> None:
    """Raises ValueError if a stage matches pairs of tokens, of which at least half stay, and a lower keep is requested.

    Args:
        stages: built stages.
        key: what requests the keep, for the message.
        least: lowest keep that is requested.
    """
    for stage in stages:
        if stage.scorer.matches and least < 0.5:
            raise ValueError(
                f"stage {stage.config.key!r}: scorer {stage.config.part('scorer').name!r} can remove at most half of the tokens, and {key} "
                f"requests a keep of {least:g}: give at least 0.5, or take another scorer with merger 'squeeze'"
            )
