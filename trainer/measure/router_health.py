"""Signs of routers that do not learn: dead, collapsed, saturated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...modules.stage import Stage
from ...modules.tokens.trace import Routing
from .cures import Cures, any_of

# Logged steps in a row that have to show a sign.
WINDOW = 3
# Scores whose sigmoid is nearer than 0.001 to 0 or 1.
_SATURATED = 6.9068
# Rows of the window below which equal places are chance.
_ROWS = 8


@dataclass(frozen=True)
class Signs:
    """What one logged step shows of a stage, over the rows of this process's last batch.

    Attributes:
        kept: routable tokens that were kept.
        present: routable tokens.
        rows: rows with routable tokens.
        requested: keep that was requested.
        saturated: share of the scores whose sigmoid is within 0.001 of 0 or 1; None for a scorer without probabilities.
        at: (2, N) float32 on the CPU: rows that kept the token at a position, and rows that have one there.
        gradient: norm of the gradient of the scorer's weights in the step; None where it is not known, with DeepSpeed for example.
    """

    kept: int
    present: int
    rows: int
    requested: float
    saturated: float | None
    at: Tensor
    gradient: float | None

    @classmethod
    @torch.no_grad()
    def of(cls, routing: Routing, gradient: float | None) -> Signs:
        """The signs of one forward. Synchronises with the device."""
        routable, position = routing.routable, routing.state.position
        kept, present = routing.counts()
        there = position[routable]
        mask = routing.kept_mask[routable].float()
        size = int(there.max()) + 1 if len(there) else 0
        at = torch.zeros(2, size, device=mask.device).index_add_(1, there, torch.stack([mask, torch.ones_like(mask)]))
        scores = routing.scores[routable]
        far = float((scores.abs() > _SATURATED).float().mean()) if routing.probabilities and len(scores) else None
        return cls(kept, present, int(routable.any(-1).sum()), routing.requested, far, at.cpu(), gradient)


def warnings_of(stage: Stage, window: Sequence[Signs], largest: float | None, cures: Cures | None = None) -> dict[str, str]:
    """What the last logged steps say of a stage that learns: a message by the kind of fault; none for a healthy one.

    Args:
        stage: the stage.
        window: signs of ``WINDOW`` logged steps, one after the other.
        largest: largest gradient norm of its scorer in any logged step so far; None if no gradient is known.
        cures: of the run. Where several stages share one target of the model out among themselves, one that keeps everything, or next to
            nothing, may have learned to, and is named only if its gradient has vanished too.
    """
    cures = cures or Cures()
    name, found = f"stage {stage.config.key}", {}
    kept, present, rows = (sum(getattr(signs, key) for signs in window) for key in ("kept", "present", "rows"))
    requested = sum(signs.requested for signs in window) / len(window)
    if not present:
        return {}
    keep = kept / present
    seen = f"in {len(window)} logged steps in a row"
    gradients = [signs.gradient for signs in window if signs.gradient is not None]
    known = largest is not None and len(gradients) == len(window)
    vanished = known and max(gradients) <= max(0.01 * float(largest or 0), 1e-8)
    decides = stage.selector.needs_probabilities and (vanished or not cures.shared)
    # A row without a token above the cut keeps its best one.
    least = max(rows / present, 0.005)
    if decides and keep <= least and requested > 2 * least:
        change = any_of([*cures.noise(stage), "lower optimizer.router_lr", *cures.controller("smaller", stage)])
        found["dead"] = (
            f"{name} is dead: {seen} it kept {kept:,} of {present:,} tokens, and {requested:.3f} was requested; {change}; if nothing is needed "
            "there, keep: 0 around the layer costs no router"
        )
    elif decides and keep >= 0.995 and requested < 0.9:
        change = any_of([*cures.controller("larger", stage), *cures.noise(stage), "remove the stage if others do what it should"])
        found["collapsed"] = f"{name} has collapsed: {seen} it kept every token, and {requested:.3f} was requested; {change}"
    if known and max(gradients) == 0 and requested < 1:
        found["dead"] = (
            f"{name} is dead: {seen} the gradient of its scorer was 0; take another estimator (key_bias, or gate around a layer), or check "
            "that layers which compute something follow"
        )
    if "collapsed" not in found and _same_places(window, rows, keep):
        elsewhere = "move it to an earlier layer" if stage.config.layer else "take another scorer"
        change = any_of([*cures.regularizer(stage, "diversity", "uniformity"), *cures.noise(stage), elsewhere])
        found["collapsed"] = (
            f"{name} has collapsed: {seen} it kept the same places in every row ({keep:.3f} of {rows} rows); scorer uniform_grid does the "
            f"same for less; {change}"
        )
    if vanished and "dead" not in found and all(signs.saturated is not None and signs.saturated >= 0.99 for signs in window):
        cooler = ["raise the estimator's temperature"] if hasattr(stage.estimator, "temperature") else []
        change = any_of([*cures.regularizer(stage, "z_loss"), *cooler, "lower optimizer.router_lr"])
        found["saturated"] = (
            f"{name} is saturated: {seen} 99 % of its probabilities were within 0.001 of 0 or 1, and the gradient of its scorer was at most "
            f"{max(gradients):.1e}, of {largest:.1e} before; {change}"
        )
    return found


def _same_places(window: Sequence[Signs], rows: int, keep: float) -> bool:
    """Rows keep the same places: their variance at a place is below a fiftieth of what this keep allows."""
    if rows < _ROWS or not 0.02 < keep < 0.98:
        return False
    at = torch.zeros(2, max(signs.at.shape[1] for signs in window))
    for signs in window:
        at[:, : signs.at.shape[1]] += signs.at
    # A place that few rows have says nothing.
    share, number = (at[0] / at[1].clamp(min=1))[at[1] >= _ROWS], at[1][at[1] >= _ROWS]
    if len(number) < 2:
        return False
    mean = float((share * number).sum() / number.sum())
    between = float((share * (1 - share) * number).sum() / number.sum())
    return between < 0.02 * mean * (1 - mean)
