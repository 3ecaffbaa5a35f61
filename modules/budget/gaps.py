"""The gaps that a controller closes: what the deployed decisions achieve, less what is requested."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..cost.cost import CostModel
from ..tokens.trace import Routing, Trace
from .regularizers.base import mean_over


def gaps_of(
    trace: Trace,
    held: Sequence[str],
    measure: str,
    target: float,
    cost: CostModel,
    over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Gaps of one forward by constraint, float32 scalars over all processes, with the gradient of the keep probabilities.

    With the measure ``keep`` every stage that the budget holds is a constraint. With another one the model is a single constraint, named
    as the measure: its stages may share the tokens out among themselves, so that each learns a keep of its own.

    Args:
        trace: Trace of the forward.
        held: names of the stages whose selectors leave the count to the budget.
        measure: the budget's measure.
        target: its requested value at this step.
        cost: CostModel of the model.
        over_ranks: mean of a scalar over processes, with this process's gradient; None with one process.
    """
    routings = {name: routing for name, routing in trace.routings.items() if name in held and routing.soft is not None}
    if not routings:
        return {}
    if measure == "keep":
        return {name: mean_over(deployed(it), it.routable, over_ranks) - it.requested for name, it in routings.items()}
    counted = {name: routing.routable.sum(-1) for name, routing in routings.items()}
    keep: dict[str, Tensor] = {
        name: (deployed(routing) * routing.routable).sum(-1) / counted[name].clamp(min=1) for name, routing in routings.items()
    }
    ratio = cost.soft(_requested(trace.routings, keep), measure)
    # A row of more tokens counts for more, as in the MACs of a whole data set.
    weight = next(iter(counted.values())).to(ratio.dtype)
    return {measure: mean_over(ratio, weight, over_ranks) - target}


def deployed(routing: Routing) -> Tensor:
    """(B, M) 1 for tokens that the stage keeps when it is used, without exploration noise, and 0 otherwise; the gradient is that of the
    keep probabilities."""
    soft, cut = routing.soft, routing.decision.cut
    assert soft is not None
    hard = routing.kept_mask if cut is None else routing.scores > cut
    return hard.to(soft.dtype) + soft - soft.detach()


def _requested(routings: Mapping[str, Routing], keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The keeps of the held stages, and the requested ones of all others, which a schedule may have moved."""
    device = next(iter(keep.values())).device
    others = {
        name: torch.tensor(routing.requested, device=device) for name, routing in routings.items() if name not in keep and routing.requested
    }
    return {**others, **keep}
