"""The trained model as its own teacher, in every task with labels; keeps that are drawn for each step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from laconic import Trace, stages_of
from laconic.data.rows import collate
from laconic.modules.budget.drawn_keep import DrawnKeep
from laconic.trainer.build.build import build
from laconic.trainer.build.validate import validate
from laconic.trainer.errors import RecipeError
from laconic.trainer.losses.teachers import SelfTeacher
from laconic.trainer.measure.results import training_ratio
from laconic.trainer.recipe.files import load
from laconic.trainer.recipe.schema import DistillationRecipe
from laconic.trainer.task_module import TaskModule
from laconic.trainer.tasks.base import task_named
from tests.trainer.conftest import QUICK
from tests.trainer.small_recipes import small

_SELF = "distillation={teacher: self, weight: 0.75, hidden: 0.5}"


def _module(name: str, folder: Path, *overrides: str) -> tuple[TaskModule, dict[str, Any]]:
    parts = build(load(name, [*small(name, folder, QUICK), "baselines=[]", *overrides]).recipe)
    module = task_named(parts.recipe.task).module(parts)
    assert isinstance(module, TaskModule)
    module.model.train()
    return module, collate([parts.data.train[index] for index in range(2)])


def _learned(module: TaskModule, batch: dict[str, Any], model: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """(P, classes) logits at the labels, and (P, C) what the head reads there, by the model's own forward."""
    names = ("pixel_values", "input_ids", "attention_mask", "position_ids")
    out = model(**{name: batch[name] for name in names if name in batch}, output_hidden_states=True, **options)
    labels, logits, last = batch["labels"], out.logits, out.hidden_states[-1]
    if module.task.metric == "perplexity":
        there = labels[:, 1:] != -100
        return logits[:, :-1][there], last[:, :-1][there]
    if logits.ndim == 4:
        return logits.movedim(1, -1)[labels != 255], last.flatten(0, 1)
    return logits, last


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("vit_digits", ["budget=null", "compression.stages.0.keep=0.5", "data.mixing.mixup=0.8"]),
        pytest.param(
            "segment_digits", ["budget=null", "compression.stages.0.keep=0.5", "compression.restore.layer=2"], marks=pytest.mark.slow
        ),
        pytest.param("text_classify", [], marks=pytest.mark.slow),
        pytest.param("llm_pretrain", [], marks=pytest.mark.slow),
    ],
)
def test_the_model_with_all_tokens_is_a_teacher_in_every_task_with_labels(
    name: str, overrides: list[str], tmp_path: Path, few_passages: None
) -> None:
    module, batch = _module(name, tmp_path, *overrides, _SELF)
    given = copy.deepcopy(module.model)
    found = module.losses(batch)
    batch = module.prepared(batch)
    assert module.model.training
    # Thresholds follow the student alone, in a step; the copy has not seen it.
    own = copy.deepcopy(given).train()
    trace = module.training_trace(batch)
    assert trace is not None
    task_loss = module.task.loss(own, batch, trace=trace)
    replayed = Trace(step=trace.step, seed=trace.seed, sample_ids=trace.sample_ids, replay=trace.decisions(), lookahead=True)
    replayed.documents = batch.get("documents")
    student, _ = _learned(module, batch, given.eval(), trace=replayed)
    with torch.no_grad():
        whole = Trace(documents=batch.get("documents"), keep=dict.fromkeys(stages_of(given), 1.0))
        teacher, _ = _learned(module, batch, given, trace=whole)
    soft, hard = (teacher / 2).log_softmax(-1), (student / 2).log_softmax(-1)
    expected = 4 * (soft.exp() * (soft - hard)).sum(-1).mean()
    distilled = found["distillation"]
    torch.testing.assert_close(distilled.answers, expected.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(distilled.labels, task_loss, atol=1e-5, rtol=1e-4)
    assert float(distilled.hidden) > 0
    torch.testing.assert_close(distilled.total.detach(), (0.25 * task_loss + 0.75 * expected + 0.5 * distilled.hidden).detach())
    assert all(module.model.get_buffer(key).equal(own.get_buffer(key)) for key, _ in own.named_buffers())


def _drawn(**settings: Any) -> DrawnKeep:
    return DrawnKeep(**settings)


def test_epics_range_and_gap_half_way_through_training() -> None:
    drawn = _drawn(start=0.95, lowest=0.1)
    assert drawn.bounds(0, 1000) == pytest.approx((0.95, 1.0))
    # The largest removed share is 0.475.
    assert drawn.bounds(500, 1000) == pytest.approx((1 - 0.475, 1.0))
    assert drawn.bounds(1000, 1000) == pytest.approx((0.1, 1.0))
    teacher = SelfTeacher(DistillationRecipe.model_validate({"teacher": "self", "milder": {}}), {"a": 0.5}, 1000)
    for step, gap in ((0, 0.05), (500, 0.175), (1000, 0.3)):
        assert teacher.keeps({"a": 0.4}, step) == pytest.approx({"a": 0.4 + gap})
    assert teacher.keeps({"a": 0.9}, 500) == {"a": 1.0}
    # A layer that is left out stays so, except in the dense teacher.
    static = SelfTeacher(teacher.recipe, {"a": 0.5, "b": 0.0}, 1000)
    assert static.keeps({}, 0) == pytest.approx({"a": 0.55, "b": 0.0})
    whole = DistillationRecipe.model_validate({"teacher": "self"})
    assert SelfTeacher(whole, {"a": 0.5, "b": 0.0}, 1000).keeps({}, 0) == {"a": 1.0, "b": 1.0}
    # A student with all tokens has nothing to learn from itself.
    assert teacher.keeps({"a": 1.0}, 500) is None


def test_a_draw_is_of_seed_and_step_and_meets_its_range_and_shares() -> None:
    drawn = _drawn(choices=[0.1, 0.4], full=0.25)
    keeps = [drawn.keep(step, 4000, 0) for step in range(4000)]
    assert {value: round(keeps.count(value) / 4000, 1) for value in (0.1, 0.4)} == {0.1: 0.4, 0.4: 0.4}
    assert keeps.count(1.0) / 4000 == pytest.approx(0.25, abs=0.03)
    assert keeps[100:200] == [drawn.keep(step, 4000, 0) for step in range(100, 200)]
    assert keeps[:100] != [drawn.keep(step, 4000, 1) for step in range(100)]
    spread = [_drawn(lowest=0.2, highest=0.6).keep(step, 4000, 0) for step in range(4000)]
    assert 0.2 <= min(spread) < 0.21
    assert 0.59 < max(spread) <= 0.6
    factors = [1 / _drawn(lowest=0.1, draw="reciprocal").keep(step, 4000, 0) for step in range(4000)]
    assert [round(sum(low <= factor < low + 3 for factor in factors) / 4000, 1) for low in (1, 4, 7)] == [0.3, 0.3, 0.3]


def test_steps_in_which_the_teacher_would_be_the_student_have_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reverse = "distillation={teacher: self, keep: 0.25, weight: 1, labels: 1, temperature: 1, reverse: true}"
    own = ["budget=null", "compression.stages.0.keep=1", "training_keep={choices: [0.25], full: 0.5}", "trainer.max_steps=100"]
    module, batch = _module("vit_digits", tmp_path, *own, reverse)
    calls, teach = [], module.task.teach
    monkeypatch.setattr(module.task, "teach", lambda *args, **kwargs: calls.append(kwargs["trace"].keep) or teach(*args, **kwargs))
    (stage,) = stages_of(module.model)
    for step in range(6):
        monkeypatch.setattr(type(module), "global_step", step)
        found, keep = module.losses(batch), module.training_keep.keep(step, 100, 0)  # type: ignore[union-attr]
        assert found["trace"].routings[stage].requested == keep
        assert calls == ([{stage: 0.25}] if keep == 1 else [])
        assert (found["distillation"] is None) == (keep < 1)
        if calls:
            few = module.task.forward(module.model.eval(), batch, trace=Trace(keep={stage: 0.25})).logits.log_softmax(-1)
            whole = module.task.forward(module.model, batch, trace=Trace()).logits.log_softmax(-1)
            expected = (whole.exp() * (whole - few)).sum(-1).mean() + torch.nn.functional.nll_loss(whole, batch["labels"])
            torch.testing.assert_close(found["distillation"].total.detach(), expected.detach(), atol=1e-5, rtol=1e-4)
            module.model.train()
        calls.clear()


def test_a_causal_model_has_no_teacher_until_its_thresholds_have_seen_scores(tmp_path: Path) -> None:
    stages = "compression={stages: [{layer: 1, site: around, keep: 0.3, scorer: linear, selector: threshold, estimator: gate}]}"
    milder = "distillation={teacher: self, milder: {start: 0.2, end: 0.3}}"
    module, batch = _module("llm_pretrain_dense", tmp_path, stages, milder, "trainer.start_rows=0")
    assert module.losses(batch)["distillation"] is None
    assert module.losses(batch)["distillation"] is not None
    # One with all tokens needs no threshold.
    module, batch = _module("llm_pretrain_dense", tmp_path, stages, "distillation={teacher: self}", "trainer.start_rows=0")
    assert module.losses(batch)["distillation"] is not None


def test_the_cost_of_training_is_the_mean_over_the_keeps_of_all_steps() -> None:
    for draws in ("{choices: [0.1, 0.4, 1]}", "{lowest: 0.1, draw: reciprocal}", "{choices: [0.1, 0.4], also: [0.1, 1]}"):
        parts = build(load("vit_digits_elastic", [*QUICK, "trainer.max_steps=1000", f"training_keep={draws}"]).recipe)
        drawn, (stage,), cost = parts.recipe.training_keep, stages_of(parts.model), parts.cost
        assert drawn is not None
        assert cost is not None
        exact = [sum(cost({stage: keep}).macs_ratio for keep in drawn.keeps(step, 1000, 0)) for step in range(1000)]
        # Three decimals of a keep.
        assert training_ratio(parts) == pytest.approx(sum(exact) / 1000, rel=1e-3)


def test_a_step_has_the_mean_loss_of_the_drawn_keep_and_of_those_that_every_step_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ["training_keep={choices: [0.3, 1], also: [1, 0.1]}", "data.mixing.mixup=0.8", "distillation={teacher: self, milder: {}}"]
    module, batch = _module("vit_digits_elastic", tmp_path, *own)
    monkeypatch.setattr(module, "_check_rows", lambda batch: None)
    forwards = {0.3: (0.3, 1.0, 0.1), 1.0: (1.0, 0.1)}
    drawn: Any = module.training_keep
    for step in range(4):
        monkeypatch.setattr(type(module), "global_step", step)
        keep = drawn.keep(step, module.total_steps, module.seed)
        found = module.training_step(batch, 0)
        alone = [module.losses(batch, other) for other in forwards[keep]]
        assert [each["trace"].routings["before_1"].requested for each in alone] == list(forwards[keep])
        torch.testing.assert_close(found["loss"], sum(each["loss"] for each in alone) / len(alone))
        # What is logged is of the drawn keep.
        assert found["trace"].routings["before_1"].requested == keep
        torch.testing.assert_close(found["task_loss"], alone[0]["task_loss"])
    assert {drawn.keep(step, module.total_steps, module.seed) for step in range(4)} == {0.3, 1.0}


_AS_MANY = "distillation={teacher: self, keep: 0.3}"
_PAIRS = ("budget=null", "compression.stages=[{layer: 1, scorer: bipartite, keep: 0.5}]")


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("vit_digits", ["training_keep={lowest: 0.2}"], "training_keep and budget both set the keep"),
        ("vit_digits_dense", ["training_keep={lowest: 0.2}"], "training_keep is the keep of stages, and compression is not set"),
        ("vit_digits", ["training_keep={}"], "give either choices, a list of keeps, or lowest"),
        ("vit_digits", ["training_keep={choices: [0.5, 2]}"], r"training_keep.choices\[1\] = 2.0 must be in"),
        ("vit_digits", ["training_keep={lowest: 0.2, also: [0]}"], r"training_keep.also\[0\] = 0.0 must be in"),
        ("vit_digits", [*_PAIRS, "training_keep={lowest: 0.5, also: [0.2]}"], "training_keep requests a keep of 0.2"),
        ("vit_digits", ["training_keep={lowest: 0.2, until: 0.5}"], "training_keep.until = 0.5 is where the way from start ends"),
        ("vit_digits", ["training_keep={lowest: 0.2, draw: even}"], "training_keep.draw = 'even' is unknown: linear or reciprocal"),
        ("vit_digits", ["training_keep={choices: [0.2], draw: reciprocal}"], "highest, draw, start and until are of a draw between two"),
        ("vit_digits", ["training_keep={lowest: 0.8, highest: 0.5}"], "training_keep.lowest = 0.8 must be at most highest, 0.5"),
        ("vit_digits_dense", ["distillation={teacher: self}"], "is the model with more tokens, and the recipe has no compression"),
        ("vit_digits", ["distillation={teacher: self, keep: 0.8, hidden: 1}"], "which has fewer by keep: set distillation.hidden=0"),
        ("vit_digits", ["distillation={teacher: self, keep: 0.8, milder: {}}"], "distillation.keep = 0.8 has no effect"),
        (
            "vit_digits",
            ["compression.stages=[{layer: 0, scorer: learned, selector: gumbel}]", "distillation={teacher: self, keep: 0.8}"],
            "keeps what its router learned, and distillation.keep requests",
        ),
        ("llm_pretrain", ["budget=null", "training_keep={lowest: 0.2}"], "stages .* have no keep and there is no budget"),
        (
            "vit_digits",
            [*_PAIRS, "training_keep={lowest: 0.2}"],
            "'bipartite' can remove at most half .* training_keep requests a keep of 0.2",
        ),
        ("vit_digits", [*_PAIRS, "distillation={teacher: self, keep: 0.4}"], "and distillation.keep requests a keep of 0.4"),
        (
            "vit_digits",
            ["compression.stages=[{layer: 1, scorer: bipartite}]", "budget={measure: keep, target: 1, start: 0.3, schedule: linear}"],
            "and budget.start requests a keep of 0.3",
        ),
        ("vit_digits_elastic", ["training_keep=null", _AS_MANY], "= 0.3 keeps as many tokens as the student does in every step.*: raise"),
        ("vit_digits_elastic", ["training_keep={choices: [0.3, 0.3]}", _AS_MANY], "so that no step has a teacher: raise distillation.keep"),
        ("vit_digits_elastic", ["training_keep={lowest: 0.3, highest: 0.3}", _AS_MANY], "so that no step has a teacher: raise"),
        ("vit_digits_elastic", ["training_keep={lowest: 0.3, full: 1}", "distillation={teacher: self}"], "no step has a teacher: lower"),
        ("vit_digits", ["budget.measure=keep", "budget.target=0.3", _AS_MANY], "so that no step has a teacher: raise distillation.keep"),
        (
            "vit_digits_elastic",
            ["training_keep=null", "compression.stages=[{layer: 1, keep: 0.3}, {layer: 0, site: around, keep: 0}]", _AS_MANY],
            "so that no step has a teacher: raise distillation.keep",
        ),
        ("text_classify", ["distillation={teacher: dense_self}"], "distillation.teacher = 'dense_self' is for image classifiers, and task"),
    ],
)
def test_what_has_no_meaning_is_refused_with_the_cure(name: str, overrides: list[str], message: str) -> None:
    with pytest.raises((RecipeError, ValueError), match=message):
        validate(load(name, [*QUICK, "baselines=[]", *overrides]).recipe)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("vit_digits_elastic", ["training_keep=null", "compression.stages.0.keep=0.25"]),
        ("vit_digits_elastic", ["training_keep={choices: [0.3], full: 0.5}"]),
        ("vit_digits_elastic", ["training_keep={lowest: 0.3, highest: 0.3, full: 0.5}"]),
        ("vit_digits_elastic", ["training_keep={lowest: 0.2, highest: 0.3}"]),
        ("vit_digits", ["budget={measure: keep, target: 0.3, schedule: linear}"]),
    ],
)
def test_a_teacher_with_the_students_keep_in_some_steps_is_allowed(name: str, overrides: list[str]) -> None:
    validate(load(name, [*QUICK, "baselines=[]", *overrides, _AS_MANY]).recipe)
