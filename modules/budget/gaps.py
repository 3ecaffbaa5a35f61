"""The gaps that a controller closes: what the decisions of a step achieve, less what is requested."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..cost.cost import CostModel
from ..stage import Stage
from ..tokens.trace import Routing, Trace
from .regularizers.base import kept_of_rows, kept_share, mean_and_any

Reduce = Callable[[Tensor], Tensor] | None


def gaps_of(
    trace: Trace,
    held: Sequence[Stage],
    measure: str,
    target: float,
    requested: Mapping[str, float],
    cost: CostModel,
    widths: Mapping[str, Tensor],
    over_ranks: Reduce = None,
) -> dict[str, Tensor]:
    """Gaps of one forward by constraint, float32 scalars over all processes, with gradient.

    With the measure ``keep`` every stage that the budget holds is a constraint. With another one the model is a single constraint, named
    as the measure: its stages may share the tokens out among themselves, so that each learns a keep of its own. Its value is that of the
    report, from the lengths of the batch's own rows; its gradient is that of rows of the configured length. Every process reduces the
    same scalars, also for a stage that did not run here, in a batch without an image for example; where it ran nowhere the gap is 0.

    Args:
        trace: Trace of the forward.
        held: the stages whose selectors leave the count to the budget.
        measure: the budget's measure.
        target: its requested value at this step.
        requested: keep by stage name at this step.
        cost: CostModel of the model.
        widths: width of the kernels by stage name, from ``kernel_width``.
        over_ranks: mean of a scalar over processes, with this process's gradient; None with one process.
    """
    keys = [stage.config.key for stage in held]
    # In a process where a stage did not run, it has no tokens.
    zero = torch.zeros(1, device=next(iter(trace.routings.values())).scores.device)
    counts = {key: kept_by_row(trace.routings[key], widths[key]) if key in trace.routings else (zero, zero) for key in keys}
    if measure == "keep":
        shares = {key: kept_share(*counts[key], over_ranks) for key in keys}
        return {key: (share - requested[key]) * there for key, (share, there) in shares.items()}
    if len({stage.config.stack for stage in held}) > 1:
        # The rows of stacks differ, images and texts: a mean of each stands for all.
        shares = {key: kept_share(*counts[key], over_ranks) for key in keys}
        keep = {key: torch.where(there, share, requested[key]) for key, (share, there) in shares.items()}
        some = torch.stack([there for _, there in shares.values()]).any()
        soft = cost.soft(_of_all(trace, cost, keep), measure)
    else:
        ratio = cost.soft(_of_all(trace, cost, {key: kept / present.clamp(min=1) for key, (kept, present) in counts.items()}), measure)
        # A row of more tokens counts for more, as in the MACs of a whole data set.
        soft, some = mean_and_any(ratio, counts[keys[0]][1].to(ratio.dtype), over_ranks)
    # Processes have to reduce the same scalars, whatever their rows.
    if over_ranks is not None or not cost.as_configured(trace):
        soft = _achieved(trace, cost, measure, soft, over_ranks) + soft - soft.detach()
    return {measure: (soft - target) * some}


def kept_by_row(routing: Routing, width: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) routable tokens that leave the stage, with a gradient that says how the count moves with the scores; (B,) int64 those present.

    The derivative of a hard count is the density of scores at the cut. It is estimated by logistic kernels. The derivative of the keep
    probability would not do: where all scores are near the cut it hardly moves while the count jumps, so that the count would swing
    without end.

    Args:
        routing: of a stage whose scores are keep log-odds.
        width: scalar, width of the kernels in log-odds.
    """
    soft = ((routing.scores / width).sigmoid() * routing.routable).sum(-1)
    present = routing.routable.sum(-1)
    return kept_of_rows(routing, soft.detach()) + soft - soft.detach(), present


def mean_and_spread(routing: Routing | None, zero: Tensor, over_ranks: Reduce = None) -> tuple[Tensor, Tensor]:
    """Scalars: mean, without gradient, and standard deviation, with it, of a stage's scores over the routable tokens of all processes; 0
    and 0.001 if it did not run.

    Args:
        routing: of the stage; None if it did not run in this process.
        zero: a zero on the device.
        over_ranks: mean of a scalar over processes, with this process's gradient; None with one process.
    """
    scores = zero if routing is None else routing.scores
    weight = zero if routing is None else routing.routable.to(scores.dtype)
    mean, _ = mean_and_any(scores, weight, over_ranks)
    variance, _ = mean_and_any((scores - mean.detach()).square(), weight, over_ranks)
    # The square root has no gradient at 0, where there is nothing to push apart either.
    return mean.detach(), (variance + 1e-6).sqrt()


def kernel_width(mean: Tensor, spread: Tensor, noise: float | Tensor) -> Tensor:
    """Scalar: width of the kernels that estimate the density at the cut, at least 0.05.

    Where all scores are on one side of the cut there is no density, and nothing would bring them back. Kernels then reach from the scores
    to the cut.

    Args:
        mean: mean of the scores.
        spread: standard deviation of the scores.
        noise: logistic noise on the compared scores, under which kernels of this width are exact on average; 0 without any.
    """
    half = 0.5 * torch.maximum(spread.detach(), mean.abs() - 2 * spread.detach())
    return (torch.maximum(half, noise) if isinstance(noise, Tensor) else half.clamp(min=noise)).clamp(min=0.05)


def _achieved(trace: Trace, cost: CostModel, measure: str, soft: Tensor, over_ranks: Reduce) -> Tensor:
    """Scalar without gradient: the measure over the rows of all processes, as a report counts it. Synchronises with the device."""
    uses = cost.uses(trace)
    if measure == "macs_ratio":
        # In rows of the configured size: MACs may be too many for a float32.
        rows = sum(use.dense_macs for use in uses.values()) / cost.row_macs
    else:
        rows = sum(use.dense_tokens for use in uses.values())
    value, weight = torch.tensor([[cost.ratio(uses, measure)], [rows]], dtype=soft.dtype, device=soft.device)
    return mean_and_any(value, weight, over_ranks)[0]


def _of_all(trace: Trace, cost: CostModel, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The keeps of held stages, of those that follow them, and what all others keep, by row or of all rows as those of held stages."""
    found = dict(keep)
    like = next(iter(keep.values()))
    for stage in cost.stages:
        key, routing = stage.config.key, trace.routings.get(stage.config.key)
        if key in found:
            continue
        if stage.config.follows is not None and stage.reads in found:
            found[key] = found[str(stage.reads)]
        elif routing is not None and routing.requested:
            present = routing.routable.sum(-1).to(like.dtype)
            kept = kept_of_rows(routing, present)
            found[key] = kept / present.clamp(min=1) if like.dim() else kept.sum() / present.sum().clamp(min=1)
    return found
