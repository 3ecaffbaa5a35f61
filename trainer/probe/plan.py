"""A plan: which layers and halves to leave out, or to give fewer tokens, so that the loss rises least for the MACs saved."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .part import Part

# Loss of a model with these parts, and its macs_ratio.
Loss = Callable[[Sequence[Part]], float]
Cost = Callable[[Sequence[Part]], float]


@dataclass(frozen=True)
class Step:
    """One choice of a plan.

    Attributes:
        part: the part that was chosen; it replaces an earlier one of its layer.
        loss: loss after it.
        macs_ratio: MACs ÷ dense after it.
    """

    part: Part
    loss: float
    macs_ratio: float


@dataclass(order=True)
class _Move:
    """A possible choice with its last measurement; ordered by the loss that a saved MAC costs, then by the part."""

    price: float
    part: Part
    at: int = field(compare=False)
    rise: float = field(compare=False)
    loss: float = field(compare=False)
    macs_ratio: float = field(compare=False)


def greedy(options: Sequence[Part], target: float, loss: Loss, cost: Cost) -> list[Step]:
    """Chooses parts one by one, each time the one whose rise of the loss is least for the MACs that it saves, until the target is met.

    Effects do not add up: after each choice parts are measured again beside those chosen so far. Only those are measured that may be the
    best one: mostly a part costs more when others are missing, so a part whose old price is above the new price of another one is not
    (lazy evaluation of greedy choices, Minoux 1978). The last choice is the part that meets the target at the least loss.

    Args:
        options: parts that may be chosen, several a layer; one a layer is in the plan.
        target: largest ``macs_ratio``.
        loss: loss of the model with parts.
        cost: ``macs_ratio`` of the model with parts.

    Raises:
        ValueError: all options together do not meet the target.
    """
    chosen: dict[int, Part] = {}
    steps: list[Step] = []
    now, spent = loss(()), cost(())
    check_target(options, target, cost)

    def beside(part: Part) -> list[Part]:
        return [*(other for layer, other in chosen.items() if layer != part.layer), part]

    def measured(part: Part) -> _Move:
        after, ratio = loss(beside(part)), cost(beside(part))
        return _Move((after - now) / max(spent - ratio, 1e-9), part, len(steps), after - now, after, ratio)

    waiting = [measured(part) for part in options if cost([part]) < spent]
    while spent > target:
        heapq.heapify(waiting)
        best = _freshest(waiting, len(steps), measured)
        if best.macs_ratio <= target:
            fitting = [move for move in waiting if cost(beside(move.part)) <= target]
            best = _last(best, fitting, len(steps), now, measured)
        chosen[best.part.layer] = best.part
        now, spent = best.loss, best.macs_ratio
        steps.append(Step(best.part, now, spent))
        # Of this layer only what saves more is left.
        rest = [move.part for move in waiting if move.part.layer == best.part.layer and cost(beside(move.part)) < spent]
        waiting = [move for move in waiting if move.part.layer != best.part.layer] + [measured(part) for part in rest]
    return steps


def _freshest(waiting: list[_Move], at: int, measured: Callable[[Part], _Move]) -> _Move:
    """The move with the lowest price, measured beside what is chosen; it leaves the heap."""
    while waiting[0].at < at:
        heapq.heapreplace(waiting, measured(waiting[0].part))
    return heapq.heappop(waiting)


def _last(best: _Move, fitting: list[_Move], at: int, now: float, measured: Callable[[Part], _Move]) -> _Move:
    """The move with the least loss of those that meet the target: a smaller one than the cheapest may do."""
    for move in sorted(fitting, key=lambda move: move.rise):
        # Measured among fewer parts, it rose less.
        if now + move.rise >= best.loss:
            break
        fresh = move if move.at == at else measured(move.part)
        best = fresh if fresh.loss < best.loss else best
    return best


def check_target(options: Sequence[Part], target: float, cost: Cost) -> None:
    """Raises ValueError if the cheapest option of every layer does not meet the target. Arguments as of ``greedy``."""
    cheapest: dict[int, Part] = {}
    for part in options:
        other = cheapest.get(part.layer)
        if other is None or cost([part]) < cost([other]):
            cheapest[part.layer] = part
    if (least := cost(list(cheapest.values()))) > target:
        raise ValueError(f"--plan macs_ratio={target:g} cannot be met: with every part left out it is still {least:.4f}; raise it")
