"""Results of trained arms, and the report of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..build.parts import RunParts
from ..build.trainable import parameter_counts
from ..callbacks.progress import StepLine
from ..recipe.files import LoadedRecipe
from ..task_module import TaskModule
from .bench import Bench
from .phase_costs import mean_phase_ratio, phase_facts, training_rows
from .report import Arm, Report, versions, with_bench
from .tables import cost_rows

# Steps over which the mean of drawn keeps is taken.
_STEPS = 20_000


@dataclass(frozen=True)
class Trained:
    """One arm after training."""

    parts: RunParts
    module: TaskModule
    arm: Arm


def arm_of(recipe: str, parts: RunParts, module: TaskModule, line: StepLine) -> Arm:
    """The results of a trained arm, without its measured speed."""
    cost, throughput = None if parts.cost is None else parts.cost(), line.throughput
    ratio = training_ratio(parts)
    return Arm(
        recipe=recipe,
        quality=module.quality.value,
        details=_details(parts, module),
        keep={"requested": {} if cost is None else dict(cost.keep), "achieved": module.achieved_keep},
        macs_ratio=module.achieved["macs_ratio"],
        macs_ratio_requested=_target(parts, "macs_ratio"),
        mean_token_fraction=module.achieved["mean_token_fraction"],
        mean_token_fraction_requested=_target(parts, "mean_token_fraction"),
        train_seconds=throughput.seconds,
        per_second=throughput.mean,
        train_macs_ratio=ratio,
        train_macs=None if cost is None or ratio is None else round(training_rows(parts) * cost.dense_macs * ratio),
        phases=phase_facts(parts, line.spent),
        parameters=parameter_counts(parts.model),
        stacks={
            name: {
                "visual_keep": {"requested": cost.stack_keep[name], "achieved": use.keep},
                "macs_ratio": {"requested": cost.stack_macs_ratio[name], "achieved": use.macs_ratio},
            }
            for name, use in (module.achieved_uses.items() if cost is not None else ())
        },
    )


def _target(parts: RunParts, measure: str) -> float | None:
    """The budget's target, if it is of this measure."""
    return None if parts.budget is None or parts.budget.config.measure != measure else parts.budget.config.target


def training_ratio(parts: RunParts) -> float | None:
    """Mean ``macs_ratio`` of the student's forwards of a training step; None if it is unknown: of phases, without a cost model."""
    if parts.cost is None:
        return 1.0 if parts.phases is None else None
    if parts.budget is not None:
        return parts.budget.training_macs_ratio
    if parts.phases is not None:
        return mean_phase_ratio(parts, parts.phases)
    drawn = parts.recipe.training_keep
    if drawn is None:
        return parts.cost().macs_ratio
    number = min(parts.total_steps, _STEPS)
    steps = (parts.total_steps * place // number for place in range(number))
    keeps = (keep for step in steps for keep in drawn.keeps(step, parts.total_steps, parts.recipe.seed))
    # With three decimals, so that at most a thousand costs are computed.
    times = Counter(max(0.001, round(keep, 3)) for keep in keeps)
    moved = [stage.config.key for stage in parts.cost.stages if not stage.config.left_out]
    return sum(often * parts.cost(dict.fromkeys(moved, keep)).macs_ratio for keep, often in times.items()) / number


def ratio_of(arm: Arm, parts: RunParts) -> dict[str, Any]:
    """Requested and achieved ratios for an adapter's manifest."""
    requested = 1.0 if parts.cost is None else parts.cost().macs_ratio
    return {"macs_ratio": {"requested": requested, "achieved": arm.macs_ratio}, "keep": dict(arm.keep)}


def _details(parts: RunParts, module: TaskModule) -> dict[str, Any]:
    """Values besides the metric: the task's own; where kept visual tokens lie; for a causal model, the size of its cache and the results of
    non-causal evaluation."""
    details = module.quality.details(parts.data)
    if parts.cost is not None and (cost := parts.cost()).dense_kv_bytes:
        tokens = cost.dense_tokens
        details["kv_bytes_per_token"] = {"dense": cost.dense_kv_bytes / tokens, "compressed": cost.kv_bytes / tokens}
    if bias := module.position_bias:
        details["position_bias"] = bias
    if module.ahead is not None:
        details["lookahead"] = module.ahead.details(module.task.metric)
    return details


def report_of(loaded: LoadedRecipe, arms: Mapping[str, Trained], measured: Bench | None) -> Report:
    """The report of a run; the recipe itself is the last of its arms."""
    name, main = list(arms.items())[-1]
    arm = main.arm
    others = {key: with_bench(trained.arm, key, measured) for key, trained in arms.items() if trained is not main}
    times = measured.arms[name] if measured is not None and name in measured.arms else None
    dense = arm.quality if name == "dense" else others["dense"].quality if "dense" in others else None
    return Report(
        recipe=loaded.name,
        task=loaded.recipe.task,
        quality={
            "metric": main.module.task.metric,
            "higher_is_better": main.module.task.higher_is_better,
            "split": "test" if main.parts.data.has_test else "validation",
            "dense": dense,
            "compressed": None if name == "dense" else arm.quality,
            **arm.details,
        },
        keep=arm.keep,
        macs_ratio=arm.macs_ratio,
        macs_ratio_requested=arm.macs_ratio_requested,
        mean_token_fraction=arm.mean_token_fraction,
        mean_token_fraction_requested=arm.mean_token_fraction_requested,
        step_time={
            "dense": measured.dense_seconds if measured else None,
            "compressed": times.seconds if times else None,
            "oracle": times.oracle_seconds if times else None,
            "speedup": times.speedup.median if times else None,
            "of_oracle": times.of_oracle.median if times else None,
            "paired": measured.to_dict() if measured else None,
            "target": dict(with_bench(arm, name, measured).step_time) or None,
        },
        peak_memory={
            "kind": measured.memory_kind if measured else None,
            "dense": measured.memory["dense"] if measured else None,
            "compressed": measured.memory.get(name) if measured and name != "dense" else None,
        },
        baselines={key: vars(other) for key, other in others.items()},
        seed=loaded.recipe.seed,
        train_seconds=arm.train_seconds,
        train_macs_ratio=arm.train_macs_ratio,
        train_macs=arm.train_macs,
        phases=arm.phases,
        throughput={"unit": main.module.task.unit, "per_second": arm.per_second},
        parameters=arm.parameters,
        stacks=arm.stacks,
        fitted=arm.fitted,
        gradients=arm.gradients,
        remarks=arm.remarks,
        cost={} if main.parts.cost is None else cost_rows(main.parts.cost),
        bad_rows=main.module.bad_rows.summary(),
        data=main.parts.data.facts,
        versions=versions(),
    )
