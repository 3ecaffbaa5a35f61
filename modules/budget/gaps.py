"""The gaps that a controller closes: what the decisions of a step achieve, less what is requested."""

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
    """Gaps of one forward by constraint, float32 scalars over all processes, with gradient.

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
    routings = {name: routing for name, routing in trace.routings.items() if name in held and routing.probabilities}
    if not routings:
        return {}
    if measure == "keep":
        return {name: mean_over(kept(it, trace.noise), it.routable, over_ranks) - it.requested for name, it in routings.items()}
    counted = {name: routing.routable.sum(-1) for name, routing in routings.items()}
    keep: dict[str, Tensor] = {
        name: (kept(routing, trace.noise) * routing.routable).sum(-1) / counted[name].clamp(min=1) for name, routing in routings.items()
    }
    ratio = cost.soft(_requested(trace.routings, keep), measure)
    # A row of more tokens counts for more, as in the MACs of a whole data set.
    weight = next(iter(counted.values())).to(ratio.dtype)
    return {measure: mean_over(ratio, weight, over_ranks) - target}


def kept(routing: Routing, noise: float | Tensor) -> Tensor:
    """(B, M) 1 for tokens that the stage keeps and 0 otherwise, with a gradient that says how the count moves with the scores.

    The derivative of a hard count is the density of scores at the cut. It is estimated by logistic kernels as wide as the exploration
    noise, under which it is exact on average, or without noise as half the spread of the scores. The derivative of the keep probability
    would not do: where all scores are near the cut it hardly moves while the count jumps, so that the count would swing without end.

    Args:
        routing: of a stage whose scores are keep log-odds.
        noise: exploration noise of the forward.
    """
    scores, routable = routing.scores, routing.routable
    inside = scores.detach()[routable]
    spread = inside.std() if inside.numel() > 1 else inside.new_zeros(())
    width = torch.maximum(0.5 * spread.nan_to_num(), torch.as_tensor(noise, dtype=scores.dtype, device=scores.device)).clamp(min=0.05)
    soft = (scores / width).sigmoid()
    return routing.kept_mask.to(soft.dtype) + soft - soft.detach()


def narrowness(trace: Trace, held: Sequence[str], least: float, over_ranks: Callable[[Tensor], Tensor] | None = None) -> Tensor | None:
    """Sum over the held stages of max(0, least - standard deviation of the scores)²; None if none of them ran.

    Where all scores are near the cut, one optimizer step moves the count by many tokens, and no controller can hold it. The task tells
    tokens apart only slowly, and under annealed noise the scores that keep a share constant shrink with the noise.

    Args:
        trace: Trace of the forward.
        held: names of the stages whose selectors leave the count to the budget.
        least: standard deviation in log-odds below which scores are pushed apart.
        over_ranks: mean of a scalar over processes, with this process's gradient; None with one process.
    """
    terms = []
    for name, routing in trace.routings.items():
        if name in held and routing.probabilities:
            scores, routable = routing.scores, routing.routable
            mean = mean_over(scores, routable, over_ranks).detach()
            variance = mean_over((scores - mean).square(), routable, over_ranks)
            # The square root has no gradient at 0, where there is nothing to push apart either.
            terms.append((least - (variance + 1e-6).sqrt()).clamp(min=0).square())
    return torch.stack(terms).sum() if terms else None


def _requested(routings: Mapping[str, Routing], keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The keeps of the held stages, and the requested ones of all others, which a schedule may have moved."""
    device = next(iter(keep.values())).device
    others = {
        name: torch.tensor(routing.requested, device=device) for name, routing in routings.items() if name not in keep and routing.requested
    }
    return {**others, **keep}
