"""Budget: computes keeps from a target, traces from steps, and the regularization loss from traces."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import registry
from ..backbones import adapter_of
from ..compatibility import check_held, check_noise
from ..config import CompressionConfig, PartConfig
from ..cost.cost import CostModel
from ..tokens.trace import Trace
from . import processes
from .config import BudgetConfig
from .controllers.base import Controller
from .gaps import gaps_of, kernel_width, mean_and_spread
from .regularizers.base import Regularizer
from .schedules import SCHEDULES, progress, staircase

# The controller where selectors leave the count to the budget, and none is named.
DEFAULT = "augmented_lagrangian"


@dataclass(frozen=True)
class BudgetLoss:
    """The loss to add to the task's loss, and values to log.

    Attributes:
        total: scalar with gradient: the weighted regularizer, the controller's term, and the auxiliary losses of estimators and selectors.
        regularizer: unweighted loss of the regularizer, detached; None without one.
        weight: weight of the regularizer at this step.
        auxiliary: sum of the auxiliary losses, detached; None without any.
        soft_keep: mean keep probability by stage name, detached; the achieved keep is in the Routing.
        gaps: achieved less requested by constraint, detached; empty without a controller.
    """

    total: Tensor
    regularizer: Tensor | None
    weight: float | Tensor
    auxiliary: Tensor | None
    soft_keep: Mapping[str, Tensor] = field(default_factory=dict)
    gaps: Mapping[str, Tensor] = field(default_factory=dict)


class Budget:
    """Computes the keeps of a model's stages, makes the traces of training, and computes the loss that holds the ratio.

    Args:
        config: target, measure, regularizer and schedule.
        model: the dense model.
        compression: the stages; stages without ``keep`` and ``tokens`` share one keep, which the budget sets.
        total_steps: number of optimizer steps in training, for all that changes over it: schedules, exploration noise, the regularizer's ramp
            and temperatures of estimators.
        seed: seed of the random draws.
        size: input size, as for CostModel; None means the model's configured size.

    Raises:
        ValueError: the target cannot be met, every stage sets its own keep, or the measure is ``step_time``, which has to be calibrated.

    Example:
        budget = Budget(BudgetConfig(target=0.5), model, CompressionConfig([StageConfig(layer=3)]), total_steps=1000)
        model = compress(model, budget.compression)
        trace = budget.trace(step)
        loss = model(**batch, trace=trace).loss + budget.loss(trace, step).total

    Attributes:
        controller: Controller of the gaps; None where every selector holds its count by itself.
        controls: state of the controller by constraint. ``loss`` moves it when it is called with the next step, by the mean gap over the
            forwards of the step before; ``state_dict()`` is part of a checkpoint.
    """

    def __init__(
        self,
        config: BudgetConfig,
        model: PreTrainedModel,
        compression: CompressionConfig,
        total_steps: int = 1,
        seed: int = 0,
        size: tuple[int, int] | int | None = None,
    ) -> None:
        if config.measure == "step_time":
            raise ValueError(
                "budget.measure = 'step_time' depends on the device, and is calibrated by laconic train: in a loop of your own set "
                "budget.measure = 'macs_ratio' and a budget.target whose measured step takes as long as it may"
            )
        if config.schedule != "constant" and total_steps == 1:
            raise ValueError(
                f"budget.schedule = {config.schedule!r} moves the target over training, and total_steps is 1: give Budget the optimizer steps"
            )
        self.config = config
        self.total_steps = total_steps
        self.seed = seed
        compression = adapter_of(model).resolved(compression, model.config)
        self.free = [stage.key for stage in compression.stages if stage.free]
        if not self.free:
            raise ValueError("budget.target has nothing to decide: every stage has a keep of its own; leave it out of one of them")
        stacks = {stage.key: stage.stack for stage in compression.stages if stage.free}
        if unknown := config.shares.keys() - set(stacks.values()):
            raise ValueError(
                f"budget.shares names {', '.join(sorted(unknown))}, where no stage is without a keep of its own: "
                f"such stages are in {', '.join(repr(name) for name in dict.fromkeys(stacks.values()))}"
            )
        if config.shares and len(set(stacks.values())) == 1:
            raise ValueError(
                f"budget.shares = {dict(config.shares)} shares out by stack, and all stages without a keep of their own are in "
                f"{next(iter(stacks.values())) or 'the only one'!r}: remove it"
            )
        self._powers = {key: float(config.shares.get(stack, 1.0)) for key, stack in stacks.items()}
        if not any(self._powers.values()):
            raise ValueError("budget.shares is 0 for every stack, so that budget.target has nothing to decide: raise one of them")
        self.cost = CostModel(model, compression, size)
        free = set(self.free)
        self.held = [stage for stage in self.cost.stages if stage.config.key in free and stage.selector.needs_probabilities]
        # Caches: a moving schedule needs a keep at every step.
        self._keeps: dict[float, float] = {}
        self._ratios: dict[int, float] = {}
        self._floor: float | None = None
        self.compression = compression.with_keep(self.resolve(config.target))
        self.regularizer = build_regularizer(config)
        if config.schedule != "constant":
            self.resolve(config.start, "start")
        self._check_reach()
        self.controller = build_controller(config, bool(self.held))
        self.controls: dict[str, dict[str, Tensor]] = {}
        # Gaps of the step under way: it may have several forwards.
        self._gaps: dict[str, list[Tensor]] = {}
        self._step = 0
        held = (self.regularizer is not None and self.regularizer.holds_ratio) or (self.controller is not None and self.controller.holds)
        check_held(self.cost.stages, held)
        check_noise(self.cost.stages, config.noise)
        if self.regularizer is not None and not any(stage.scorer.probabilities for stage in self.cost.stages):
            raise ValueError(
                "budget.regularizer needs keep probabilities, and no stage's scorer has any: leave it out "
                "(a top-k selector holds the count by itself), or take scorer 'learned', or 'linear' in a causal model"
            )

    def resolve(self, target: float, key: str = "target") -> dict[str, float]:
        """The largest keeps whose measure is at most ``target``, by name of each stage without its own keep.

        Args:
            target: requested value of the measure.
            key: of the budget, which an error names.
        """
        if self.config.measure == "keep":
            return self._spread(target)
        if target not in self._keeps:
            self._keeps[target] = self._keep_for(target, key)
        return self._spread(self._keeps[target])

    def _spread(self, keep: float) -> dict[str, float]:
        """A keep shared out by the powers of ``shares``, by stage name."""
        return {key: keep**power for key, power in self._powers.items()}

    def _keep_for(self, target: float, key: str) -> float:
        """The largest keep, to four decimals, whose measure is at most ``target``."""
        low, high = 1, 10_000
        if target >= 1 or self._ratio(high) <= target:
            return 1.0
        if self.floor > target:
            raise ValueError(
                f"budget.{key} = {target} cannot be met: with one token left the {self.config.measure} is still {self.floor:.4f}; "
                "raise it, move the first stage to an earlier layer, or put stages around more layers"
            )
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._ratio(middle) <= target else (low, middle)
        return low / 10_000

    def _check_reach(self) -> None:
        """Raises ValueError if a keep leaves less than a token of whole rows, or no decisions of routers can close the gap to the target."""
        config, other = self.config, any(stage.config.key not in self.free for stage in self.cost.stages)
        if config.measure == "keep":
            least = min(config.target, config.start if config.schedule != "constant" else 1.0)
            keeps = self._spread(least)
            present = self.cost(keeps).present
            for stage in self.cost.stages:
                key = stage.config.key
                if key not in keeps or stage.adapter.causal:
                    continue
                # Where a number is rounded, half a token is one; behind other stages so is less, of the few that are left.
                whole = present[key] == self.cost.shapes[stage.config.stack].routable
                left, enough = keeps[key] * present[key], 1 - 1e-6 if stage in self.held else 0.5 if whole else 0.0
                if left < enough:
                    raise ValueError(
                        f"budget.{'target' if least == config.target else 'start'} = {least} cannot be met: it leaves {left:.2g} of "
                        f"{present[key]:g} tokens at stage {key}, and one always stays; raise it"
                    )
        elif (self.held or other) and config.target < 1 and self._ratio(10_000) < config.target - 0.005:
            why = "because other stages have a keep of their own; lower the target, or leave their keep out"
            raise ValueError(
                f"budget.target = {config.target} cannot be met: with every token of the stages that the budget decides for, the "
                f"{config.measure} is {self._ratio(10_000):.4f}, "
                + (why if other else "because the dense model computes more than a compressed one; lower the target")
            )

    @property
    def floor(self) -> float:
        """The measure with one token left: no target can be below it."""
        if self._floor is None:
            self._floor = float(getattr(self.cost(self._spread(1 / 10_000)), self.config.measure))
        return self._floor

    def _ratio(self, keep: int) -> float:
        """The measure at keep = ``keep`` / 10,000."""
        if keep not in self._ratios:
            self._ratios[keep] = getattr(self.cost(self._spread(keep / 10_000)), self.config.measure)
        return self._ratios[keep]

    def target(self, step: int) -> float:
        """Requested value of the measure at a step."""
        config = self.config
        done = progress(step, config.schedule_until, self.total_steps, config.schedule_from)
        value = SCHEDULES[config.schedule](config.start, config.target, done)
        return staircase(value, config.start, config.increment) if config.increment and done < 1 else value

    def keep(self, step: int) -> dict[str, float]:
        """The keep requested at a step, by name of each stage without its own keep."""
        target = self.target(step)
        if self.config.measure == "keep":
            return self.resolve(target)
        # Keeps that need a search have four decimals, so four decimals of the target are enough.
        rounded = round(target, 4)
        return self.resolve(target if rounded < self.floor else rounded)

    @property
    def training_macs_ratio(self) -> float:
        """Mean ``macs_ratio`` requested by the schedule over training, sampled at 200 steps."""
        moves = self.config.schedule != "constant"
        steps = [self.total_steps * number // 200 for number in range(200)] if moves else [0]
        return sum(self.cost(self.keep(step)).macs_ratio for step in steps) / len(steps)

    def trace(self, step: int, sample_ids: Tensor | None = None, labels: Tensor | None = None) -> Trace:
        """The Trace of a training forward.

        Args:
            step: optimizer step.
            sample_ids: (B,) int64 identity of each row, so that draws do not depend on the batch or the rank.
            labels: labels for estimators, if the model is not called with ``labels``.

        Raises:
            ValueError: exploration is annealed over training, whose length the budget was not given.
        """
        if self.config.noise and step > 0 and self.total_steps == 1:
            raise ValueError("budget.noise is annealed over training, and total_steps is 1: give Budget the optimizer steps")
        noise = self.config.noise * (1 - progress(step, self.config.noise_until, self.total_steps))
        keep = self.keep(step) if self.target(step) != self.config.target else {}
        done = progress(step, 1.0, self.total_steps)
        return Trace(step=step, seed=self.seed, sample_ids=sample_ids, labels=labels, noise=noise, progress=done, keep=keep)

    def loss(self, trace: Trace, step: int, over_ranks: Callable[[Tensor], Tensor] | None = None) -> BudgetLoss:
        """The loss for the routings of one forward; moves the controller when ``step`` is a later one than in the last call.

        Args:
            trace: Trace of the forward.
            step: optimizer step, for the ramp.
            over_ranks: mean of a scalar over processes, with this process's gradient; None is that over all processes of
                ``torch.distributed``, if there are several. A trace that is ``alone`` counts this process.

        Raises:
            ValueError: no stage ran with this trace.
        """
        if not trace.routings:
            raise ValueError("the trace has no routing: pass it to the model's forward as trace=trace, before calling loss")
        over_ranks = None if trace.alone else over_ranks or processes.over_ranks()
        device = next(iter(trace.routings.values())).scores.device
        trained = [routing for routing in trace.routings.values() if routing.probabilities]
        total = torch.zeros((), device=device)
        auxiliary = trace.auxiliary_loss
        if auxiliary is not None:
            total = total + auxiliary
        self._advance(step)
        gaps, apart = self._gaps_of(trace, step, over_ranks)
        total = total + apart
        penalized = self.regularizer is not None and self.regularizer.holds_ratio and self.regularizer.grows
        states = {name: self._control(name, gap.device) for name, gap in gaps.items()}
        for name, gap in gaps.items():
            assert self.controller is not None
            self._step = step
            self._gaps.setdefault(name, []).append(gap.detach().double())
            total = total + self.controller.loss(gap, states[name]).float()
        value: Tensor | None = None
        weight: float | Tensor = 0.0
        if self.regularizer is not None and trained:
            weight = self.regularizer.weight * progress(step, self.config.ramp_until, self.total_steps)
            if self.controller is not None and states and penalized:
                factors = [self.controller.weight(state) for state in states.values()]
                weight = weight * sum(factors) / len(factors)
            target = self.target(step) if self.config.measure == "macs_ratio" else None
            value = self.regularizer(trained, target, self.cost, over_ranks)
            total = total + weight * value
        soft = {routing.stage: _mean_soft(routing.soft, routing.routable) for routing in trained}
        return BudgetLoss(
            total=total,
            regularizer=None if value is None else value.detach(),
            weight=weight,
            auxiliary=None if auxiliary is None else auxiliary.detach(),
            soft_keep=soft,
            gaps={name: gap.detach() for name, gap in gaps.items()},
        )

    def _gaps_of(self, trace: Trace, step: int, over_ranks: Callable[[Tensor], Tensor] | None) -> tuple[dict[str, Tensor], Tensor | float]:
        """The gaps of a forward by constraint, and the loss that keeps scores apart; none before a schedule has left full length, or a value
        that keeping every token does not reach: no decision could close these gaps, and the controller would wind up."""
        target = self.target(step)
        moving = target != self.config.target and self.config.measure != "keep"
        if self.controller is None or target >= 1 or (moving and target >= self._ratio(10_000)):
            return {}, 0.0
        zero = torch.zeros(1, device=next(iter(trace.routings.values())).scores.device)
        found = {it.config.key: mean_and_spread(trace.routings.get(it.config.key), zero, over_ranks) for it in self.held}
        widths = {it.config.key: kernel_width(*found[it.config.key], trace.noise if it.selector.explores else 0.0) for it in self.held}
        gaps = gaps_of(trace, self.held, self.config.measure, target, self.keep(step), self.cost, widths, over_ranks)
        # Without a least spread every term is 0, and has no gradient.
        narrow = [(self.controller.least_spread - spread).clamp(min=0).square() for _, spread in found.values()]
        return gaps, torch.stack(narrow).sum()

    def _advance(self, step: int) -> None:
        """Moves the controller if the forwards since the last move were of an earlier step."""
        if self.controller is None or not self._gaps or step <= self._step:
            return
        for name, gaps in self._gaps.items():
            mean = torch.stack(gaps).mean()
            self.controls[name] = self.controller.update(mean, self._control(name, mean.device))
        self._gaps = {}

    def _control(self, name: str, device: torch.device) -> Mapping[str, Tensor]:
        assert self.controller is not None
        state = self.controls.get(name) or self.controller.start(device)
        return {key: value.to(device) for key, value in state.items()}

    @property
    def _controller_name(self) -> str | None:
        return None if self.controller is None else PartConfig.of(self.config.controller or DEFAULT, "controller").name

    def state_dict(self) -> dict[str, Any]:
        """The state of the controller, for a checkpoint: training that loads it goes on exactly."""
        controls = {name: {key: value.cpu() for key, value in state.items()} for name, state in self.controls.items()}
        gaps = {name: torch.stack(gaps).cpu() for name, gaps in self._gaps.items()}
        return {"controller": self._controller_name, "controls": controls, "step": self._step, "gaps": gaps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets the state that ``state_dict`` gave.

        Raises:
            ValueError: entries are missing, so that the state is not that of a budget, or it is that of another controller.
        """
        if missing := [key for key in ("controller", "controls", "step", "gaps") if key not in state]:
            raise ValueError(
                f"the checkpoint's state of the budget lacks {', '.join(missing)}, so that budget.controller cannot go on from it: resume from a "
                "checkpoint that this version saved, or start a new run from its weights"
            )
        if state["controller"] != self._controller_name:
            raise ValueError(
                f"the checkpoint's state of the budget is that of controller {state['controller']!r}, and budget.controller is "
                f"{self._controller_name!r}: set it to the checkpoint's, or start a new run from its weights"
            )
        self.controls = {name: dict(values) for name, values in state["controls"].items()}
        self._step, self._gaps = int(state["step"]), {name: list(gaps.unbind()) for name, gaps in state["gaps"].items()}


def _mean_soft(soft: Tensor | None, routable: Tensor) -> Tensor:
    assert soft is not None
    return (soft.detach() * routable).sum() / routable.sum().clamp(min=1)


def build_regularizer(config: BudgetConfig) -> Regularizer | None:
    """The regularizer of a budget; None if it has none."""
    if config.regularizer is None:
        return None
    built = registry.build("regularizer", PartConfig.of(config.regularizer, "regularizer"))
    assert isinstance(built, Regularizer)
    return built


def build_controller(config: BudgetConfig, held: bool) -> Controller | None:
    """The controller of a budget.

    Args:
        config: the budget.
        held: some free stage's selector leaves the count to the budget. Without one there is no controller.

    Raises:
        ValueError: a controller is set, and it would have nothing to hold.
    """
    if not held:
        if config.controller is not None:
            raise ValueError(
                f"budget.controller = {PartConfig.of(config.controller, 'controller').name!r} has nothing to hold: the selectors of all stages "
                "fix the count by themselves; remove it, or take selector 'gumbel', or 'threshold' with calibrate: false"
            )
        return None
    built = registry.build("controller", PartConfig.of(config.controller or DEFAULT, "controller"))
    assert isinstance(built, Controller)
    return built
