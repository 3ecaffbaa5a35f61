"""What the phases of a training run cost: multiply-accumulates, text and time of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..build.parts import RunParts
from ..callbacks.progress import Spent
from ..distributed.strategies import processes_of
from ..recipe.phases import PhasePlan, PhaseRecipe


def training_rows(parts: RunParts) -> int:
    """Rows that a run without phases reads in as many steps, on all processes."""
    recipe = parts.recipe
    return parts.total_steps * recipe.trainer.accumulate * recipe.data.batch_size * processes_of(recipe.trainer)


def phase_ratio(parts: RunParts, plan: PhasePlan, phase: PhaseRecipe) -> float:
    """MACs of a step of a phase ÷ MACs of an ordinary step of the dense model. A row of bags has as many places as one of tokens."""
    assert parts.cost is not None
    return parts.cost(plan.keep(phase)).macs_ratio / phase.fewer_rows


def mean_phase_ratio(parts: RunParts, plan: PhasePlan) -> float:
    """MACs of the steps of all phases ÷ MACs of as many ordinary steps of the dense model."""
    phases = zip(plan.steps, plan.phases, strict=True)
    return sum(steps * phase_ratio(parts, plan, phase) for steps, phase in phases) / plan.ends[-1]


def phase_facts(parts: RunParts, spent: Sequence[Spent]) -> list[dict[str, Any]]:
    """For a report, by phase: ``phase`` (its name), ``steps``, ``amount`` (tokens or images read), ``seconds`` of training steps, and of
    a family with an adapter ``macs_ratio`` of a step and ``macs`` of all forwards.

    Args:
        parts: parts of the run.
        spent: what each phase has read, and in which time.
    """
    plan, found = parts.phases, []
    if plan is None:
        return []
    for steps, phase, used in zip(plan.steps, plan.phases, spent, strict=True):
        facts: dict[str, Any] = {"phase": phase.name, "steps": steps, "amount": used.amount, "seconds": used.seconds}
        if parts.cost is not None:
            ratio = phase_ratio(parts, plan, phase)
            whole = training_rows(parts) * parts.cost().dense_macs
            facts |= {"macs_ratio": ratio, "macs": round(whole * ratio * steps / parts.total_steps)}
        found.append(facts)
    return found


def phase_lines(facts: Sequence[Mapping[str, Any]], unit: str) -> list[str]:
    """A line for each phase of ``phase_facts``; ``unit`` is that of its amount."""
    return [
        f"phase {fact['phase']}: {fact['steps']:,} steps, {fact['amount']:,} {unit}, {fact['seconds']:.1f} s"
        + (f", {fact['macs']:.3g} MACs, {fact['macs_ratio']:.3f} of a dense step" if "macs" in fact else "")
        for fact in facts
    ]
