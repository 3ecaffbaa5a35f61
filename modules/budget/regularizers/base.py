"""Regularizer: the base class of all regularizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...cost.cost import CostModel
from ...tokens.trace import Routing


def mean_over(values: Tensor, counted: Tensor, over_ranks: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Scalar: mean over the counted rows of all processes, 0 without any, with this process's gradient.

    Args:
        values: (B,) or (B, M).
        counted: bool, of the same shape: the values to count. Rows of text in a batch of images have no routable token.
        over_ranks: mean over processes; None with one process.
    """
    return mean_and_any(values, counted, over_ranks)[0]


def mean_and_any(values: Tensor, counted: Tensor, over_ranks: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, Tensor]:
    """``mean_over``, and a bool scalar: there is something to count in some process. ``counted`` may be weights."""
    both = torch.stack([(values * counted).sum(), counted.sum().to(values.dtype)])
    total, number = both if over_ranks is None else over_ranks(both)
    number = number.detach()
    # The mean of a number over processes may be below 1.
    return total / number.clamp(min=torch.finfo(number.dtype).tiny), number > 0


def soft_keep(routing: Routing) -> Tensor:
    """(B,) mean keep probability over the routable tokens of each row, with gradient.

    If the selector leaves the count to the router, the value is the achieved keep, because probabilities can meet a target that the
    decisions miss; the gradient is still that of the probabilities. The count of other selectors does not move with them.
    """
    probabilities, routable = routing.soft, routing.routable
    assert probabilities is not None
    number = routable.sum(-1).clamp(min=1)
    soft = (probabilities * routable).sum(-1) / number
    if not routing.free:
        return soft
    return torch.as_tensor(routing.kept, device=soft.device) / number + soft - soft.detach()


def mean_keep(routing: Routing, over_ranks: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, Tensor]:
    """Mean of ``soft_keep`` over the routable tokens of all processes, and a bool scalar: there are any.

    A row of more tokens counts for more, as in the achieved keep of a controller and of a report.
    """
    soft = soft_keep(routing)
    return mean_and_any(soft, routing.routable.sum(-1).to(soft.dtype), over_ranks)


def kept_of_rows(routing: Routing, like: Tensor) -> Tensor:
    """(B,) routable tokens that leave the stage, in the type of ``like``, without waiting for the device."""
    return routing.kept.to(like.dtype) if isinstance(routing.kept, Tensor) else torch.full_like(like, routing.kept)


def kept_share(kept: Tensor, present: Tensor, over_ranks: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, Tensor]:
    """Scalars: (B,) kept ÷ (B,) present tokens of all processes, 0 without any, and whether there are any."""
    weight = present.to(kept.dtype)
    return mean_and_any(kept / weight.clamp(min=1), weight, over_ranks)


def by_place(routing: Routing, places: int) -> tuple[Tensor, Tensor]:
    """(B, places) sums of the keep probabilities, with gradient, and numbers of the routable tokens of each row at each place, by their
    position in the original row."""
    soft, position = routing.soft, routing.state.position
    assert soft is not None
    weight = routing.routable.to(soft.dtype)
    last = (position + 1).masked_fill(~routing.routable, 0).amax(-1, keepdim=True)
    # Padding on the left moves positions up.
    length = routing.length
    last = torch.maximum(last, length.view(-1, 1)).clamp(min=1) if isinstance(length, Tensor) else last.clamp(min=max(1, length))
    place = (position * places // last).clamp(0, places - 1)
    empty = soft.new_zeros(len(soft), places)
    return empty.scatter_add(1, place, soft * weight), empty.scatter_add(1, place, weight)


def check_places(name: str, places: int) -> None:
    """Raises ValueError if a row is not divided into places."""
    if places < 2:
        raise ValueError(f"regularizer {name!r}: places = {places} must be at least 2")


@dataclass(frozen=True)
class Regularizer:
    """Pulls the soft ratio of trained scorers towards the requested one.

    Attributes:
        weight: weight of the loss at the end of its ramp.
        holds_ratio: it is 0 or least at the requested ratio, so that it can take the place of a controller's penalty.
        grows: a controller's factor applies to its weight. Not where the pull does not weaken near the target: more of it swings more.
    """

    holds_ratio: ClassVar[bool] = True
    grows: ClassVar[bool] = True
    weight: float = 1.0

    def __call__(
        self,
        routings: Sequence[Routing],
        target: float | None,
        cost: CostModel,
        over_ranks: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Unweighted loss, a float32 scalar.

        Args:
            routings: routings of the stages with a trained scorer, at least one.
            target: requested ``macs_ratio`` at this step; None if the budget's measure is another one.
            cost: CostModel of the model.
            over_ranks: mean of a scalar over processes, for losses that are not means over rows; None with one process.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class StageRegularizer(Regularizer):
    """A mean over stages of a loss that compares each stage with its own requested keep."""

    def __call__(
        self,
        routings: Sequence[Routing],
        target: float | None,
        cost: CostModel,
        over_ranks: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        return torch.stack([self.of_stage(routing, over_ranks) for routing in routings]).mean()

    def of_stage(self, routing: Routing, over_ranks: Callable[[Tensor], Tensor] | None) -> Tensor:
        """Scalar: the loss of one stage."""
        raise NotImplementedError
