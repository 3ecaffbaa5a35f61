"""Norms of the gradient by group, and warnings of dead, collapsed and saturated routers."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from laconic import BudgetConfig, CompressionConfig, StageConfig, compress
from laconic.modules.budget.budget import Budget
from laconic.modules.stage import Stage, stages_of
from laconic.modules.tokens.decision import Decision
from laconic.modules.tokens.state import TokenState
from laconic.modules.tokens.trace import Routing
from laconic.trainer.callbacks.health import RouterHealth
from laconic.trainer.callbacks.progress import RunLog
from laconic.trainer.measure.cures import Cures
from laconic.trainer.measure.router_health import WINDOW, Signs, warnings_of
from tests.matrix import dense, images, traced

ROWS, TOKENS = 6, 16


def _stage(selector: str = "gumbel") -> Stage:
    stages = CompressionConfig([StageConfig(layer=1, scorer="learned", selector=selector, keep=0.5)])
    return stages_of(compress(dense("vit"), stages))["before_1"]


def _cures(layers: int = 1) -> Cures:
    stages = CompressionConfig([StageConfig(layer=layer, scorer="learned", selector="gumbel") for layer in range(layers)])
    return Cures(Budget(BudgetConfig(target=0.5, measure="macs_ratio"), dense("vit"), stages))


def _signs(scores: torch.Tensor, gradient: float | None = 1.0, requested: float = 0.5, position: torch.Tensor | None = None) -> Signs:
    """Signs of (B, M) scores, of which those above 0 are kept."""
    state = TokenState.initial(*scores.shape, 0, None, scores.device)
    state = state if position is None else replace(state, position=position)
    index, kept = torch.arange(scores.shape[1]).expand_as(scores), scores > 0
    return Signs.of(
        Routing("before_1", scores, True, Decision(index, kept), state, requested, scores.shape[1], kept.sum(-1), False), gradient
    )


def _scores(spread: float = 2.0) -> torch.Tensor:
    return spread * torch.randn(ROWS, TOKENS, generator=torch.Generator().manual_seed(0))


_SAME = _scores()[:1].expand(ROWS, -1)
_CASES: dict[str, tuple[Signs, dict[str, str]]] = {
    "healthy": (_signs(_scores()), {}),
    "no_token": (_signs(_scores() - 20), {"dead": "it kept 0 of 288 tokens, and 0.500 was requested; raise budget.noise"}),
    "few_were_requested": (_signs(_scores() - 20, requested=0.1), {}),
    "every_token": (_signs(_scores() + 20), {"collapsed": "it kept every token, and 0.500 was requested"}),
    "nearly_every_token_was_requested": (_signs(_scores() + 20, requested=0.95), {}),
    "no_gradient": (_signs(_scores(), 0.0), {"dead": "the gradient of its scorer was 0; take another estimator"}),
    "the_same_places": (_signs(_SAME), {"collapsed": "it kept the same places in every row .* budget.regularizer=diversity"}),
    # An earlier stage has left other tokens of each row.
    "the_same_slots_at_other_places": (_signs(_SAME, position=torch.stack([torch.randperm(TOKENS) for _ in range(ROWS)])), {}),
    "large_scores_that_learn": (_signs(_scores(1e5)), {}),
    "large_scores": (_signs(_scores(1e5), 1e-3), {"saturated": r"at most 1.0e-03, of 1.0e\+00 before; set budget.regularizer=z_loss"}),
    "large_scores_and_unknown_gradients": (_signs(_scores(1e5), None), {}),
}


@pytest.mark.parametrize("case", list(_CASES))
def test_a_router_that_does_not_learn_is_named_with_what_to_change(case: str) -> None:
    signs, expected = _CASES[case]
    found = warnings_of(_stage(), [signs] * WINDOW, None if signs.gradient is None else 1.0, _cures())
    assert found.keys() == expected.keys()
    for kind, message in expected.items():
        assert re.search(f"^stage before_1 .*{message}", found[kind]), found[kind]


def test_a_selector_that_fixes_the_count_is_not_blamed_for_it() -> None:
    assert warnings_of(_stage("top_k"), [_signs(_scores() - 20)] * WINDOW, 1.0) == {}


def test_stages_that_share_a_target_may_keep_everything_or_nothing_while_they_learn() -> None:
    for shift, kind in ((-20.0, "dead"), (20.0, "collapsed")):
        found = [warnings_of(_stage(), [_signs(_scores() + shift, gradient)] * WINDOW, 1.0, _cures(2)) for gradient in (1.0, 1e-3)]
        assert found[0] == {}
        assert kind in found[1]


def test_norms_are_those_of_logged_steps_by_group_and_a_warning_is_given_once() -> None:
    shown, logged = io.StringIO(), dict[str, float]()
    stages = CompressionConfig([StageConfig(layer=1, scorer="learned", selector="gumbel", keep=0.5)])
    model = compress(dense("vit"), stages).train()
    with torch.no_grad():
        # Every token is kept.
        stages_of(model)["before_1"].scorer.score.bias.fill_(5.0)  # type: ignore[union-attr, operator]
    logits, trace = traced(model, images(4))
    logits.square().sum().backward()
    health = RouterHealth(RunLog(Console(quiet=True), shown), total_steps=9, every=2)
    trainer: Any = SimpleNamespace(
        accumulate_grad_batches=1, loggers=[SimpleNamespace(log_metrics=lambda found, step: logged.update(found))]
    )
    module: Any = SimpleNamespace(model=model, budget=None)
    for step in range(9):
        trainer.global_step = step
        health.on_before_optimizer_step(trainer, module, object())
        trainer.global_step = step + 1
        health.on_train_batch_end(trainer, module, {"trace": trace}, None, step)
        assert bool(logged) == (step >= 1)
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    whole = {name: torch.cat([g.flatten() for key, g in own.items() if (".stages." in key) == (name == "routers")]).norm() for name in ("routers", "rest")}  # fmt: skip
    for name, norm in whole.items():
        assert logged[f"train/grad_norm_{name}"] == pytest.approx(float(norm), rel=1e-5)
        assert health.report[name] == pytest.approx({"mean": float(norm), "largest": float(norm)}, rel=1e-5)
    assert logged["before_1/grad_norm"] == pytest.approx(float(whole["routers"]), rel=1e-5)
    # Steps 2, 4, 6, 8 and the last one are logged; three of them are enough.
    (warning,) = health.warnings
    assert warning.startswith("step 6: stage before_1 has collapsed")
    assert shown.getvalue() == f"warning: {warning}\n"
    again = RouterHealth(health.lines, 9, 2)
    again.load_state_dict(health.state_dict())
    assert (again.report, again.warnings) == (health.report, health.warnings)
    assert str(again.state_dict()) == str(health.state_dict())


def test_a_scorer_that_no_gradient_reaches_is_dead() -> None:
    model = compress(dense("vit"), CompressionConfig([StageConfig(layer=1, scorer="learned", keep=0.5)])).train()
    _, trace = traced(model, images(4))
    health = RouterHealth(RunLog(Console(quiet=True), io.StringIO()), total_steps=9, every=1)
    trainer: Any = SimpleNamespace(accumulate_grad_batches=1, loggers=[])
    for step in range(WINDOW):
        trainer.global_step = step
        health.on_before_optimizer_step(trainer, SimpleNamespace(model=model, budget=None), object())  # type: ignore[arg-type]
        trainer.global_step = step + 1
        health.on_train_batch_end(trainer, SimpleNamespace(model=model, budget=None), {"trace": trace}, None, step)  # type: ignore[arg-type]
    assert any("is dead" in warning and "gradient of its scorer was 0" in warning for warning in health.warnings)


def test_partitioned_gradients_have_no_norm() -> None:
    model = compress(dense("vit"), CompressionConfig([StageConfig(layer=1, scorer="learned", keep=0.5)]))
    health, trainer = RouterHealth(RunLog(Console(quiet=True), io.StringIO()), 1, 1), SimpleNamespace(global_step=0)
    health.on_before_optimizer_step(trainer, SimpleNamespace(model=model), SimpleNamespace(overflow=False))  # type: ignore[arg-type]
    assert health.report == {}
