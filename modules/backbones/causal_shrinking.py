"""Which stages may shorten the sequence of a causal model: no adapter by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..config import RestoreConfig
    from ..stage import Stage


def check_shrinking(stages: Sequence[Stage], restore: RestoreConfig | None, layers: int) -> None:
    """Raises ValueError, with the cure, unless every place of the text gets an answer that hangs on nothing behind it.

    Args:
        stages: those that shorten the sequence, in order.
        restore: where it gets its length back; None leaves it short.
        layers: of the model.
    """
    by = None if restore is None else restore.by
    for stage in stages:
        where, selector, merger = f"stage {stage.config.key!r}", stage.config.part("selector").name, stage.config.part("merger").name
        if not stage.merger.causal:
            raise ValueError(
                f"{where}: merger {merger!r} may mix later tokens into earlier ones; of a causal model take drop or chunk_mean"
            )
        if stage.selector.prompt_only:
            if merger != "drop":
                raise ValueError(f"{where}: selector {selector!r} goes with merger 'drop', not {merger!r}")
            if restore is None or by != "rejoin" or restore.layer != layers:
                raise ValueError(
                    f"{where}: selector {selector!r} takes tokens away, and the head answers at every place: give compression.restore = "
                    f"{{layer: {layers}, by: rejoin}}"
                )
        elif stage.lookahead:
            raise ValueError(
                f"{where}: scorer {stage.config.part('scorer').name!r} with selector {selector!r} looks ahead, and what is shortened by "
                "it lets earlier tokens know of later ones: take scorer 'boundary' or 'linear' with selector 'threshold' or 'gumbel', or "
                "selector 'prefix', which shortens the prompt alone"
            )
        elif by != "dechunk":
            raise ValueError(
                f"{where}: the head of a causal model answers at every place: give compression.restore = {{layer: j, by: dechunk}} with j "
                f"up to {layers}, which gives every token what layers added to its chunk; or take selector 'prefix' with "
                f"{{layer: {layers}, by: rejoin}}"
            )
        elif len(stages) > 1:
            raise ValueError(f"{where}: one stage makes chunks, and {len(stages)} were given: leave one of them")
