"""Distillation: the loss by hand, gradients for the student alone, and teachers that do not fit."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.nn import functional
from transformers import ViTConfig

from laconic import Trace
from laconic.modules.compress import checkpoint_activations
from laconic.trainer.build.build import build
from laconic.trainer.build.validate import validate
from laconic.trainer.losses.distillation import DistillationRecipe, divergence, hidden_loss
from laconic.trainer.losses.teachers import GivenTeacher, load_teacher
from laconic.trainer.recipe.files import load
from laconic.trainer.recipe.schema import ModelRecipe
from laconic.trainer.run import train_arm
from laconic.trainer.tasks.base import task_named
from laconic.trainer.tasks.image_classification import ImageClassification
from tests.matrix import CLASSES, METHODS, compressed, dense, images, labels

NAMES = [f"LABEL_{code}" for code in range(CLASSES)]


def _recipe(**settings: object) -> DistillationRecipe:
    return DistillationRecipe.model_validate({"teacher": "given", **settings})


def test_the_loss_is_hintons() -> None:
    student, teacher, temperature = torch.randn(3, 5), torch.randn(3, 5), 3.0
    target = (teacher / temperature).softmax(-1)
    expected = (target * (target.log() - (student / temperature).log_softmax(-1))).sum(-1) * 9
    torch.testing.assert_close(divergence(student, teacher, temperature), expected)
    torch.testing.assert_close(divergence(teacher, student, temperature, reverse=True), expected)
    assert float(divergence(teacher + 1, teacher, temperature).abs().max()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("hidden", [0.0, 0.7])
def test_only_the_student_gets_gradients_and_the_parts_add_up(hidden: float) -> None:
    student = compressed("vit", METHODS[0], 0.5, 0.6).train()
    teacher = dense("vit").train()
    recipe = _recipe(weight=0.25, temperature=2.0, hidden=hidden)
    given = GivenTeacher(teacher, recipe)
    assert not teacher.training
    batch, trace = {"pixel_values": images(), "labels": labels()}, Trace()
    taught = given(ImageClassification, student, batch, trace)
    assert taught is not None
    loss = ImageClassification.learn(student, batch, taught, recipe, trace=trace)
    parts = 0.75 * loss.labels + 0.25 * loss.answers + hidden * (loss.hidden if loss.hidden is not None else 0)
    torch.testing.assert_close(loss.total, parts)
    loss.total.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for name, parameter in student.named_parameters() if "layers" in name and ".stages." not in name)


def test_tokens_are_matched_with_the_teachers_at_their_own_positions() -> None:
    model, trace = compressed("vit", METHODS[3], 0.5, 0.6), Trace()
    with torch.no_grad():
        left = model(pixel_values=images(), trace=trace, output_hidden_states=True).hidden_states[-1]
    assert trace.state is not None
    teacher = torch.randn(3, 37, 16)
    index = trace.state.position[..., None].expand(-1, -1, 16)
    same = teacher.gather(1, index)
    # The fused token stands for several and has no counterpart.
    same[trace.state.size != 1] += 5
    assert left.shape == same.shape
    assert float(hidden_loss(same, teacher, trace)) == 0
    assert float(hidden_loss(same.roll(1, 1), teacher, trace)) > 0.1
    plain = functional.mse_loss(functional.layer_norm(left, (16,)), functional.layer_norm(same, (16,)))
    torch.testing.assert_close(hidden_loss(left, same, None), plain)


def test_the_teacher_is_no_part_of_the_task(tmp_path: Path, quick: list[str]) -> None:
    overrides = [*quick, "baselines=[]"]
    build(load("vit_digits_dense", overrides).recipe).model.save_pretrained(tmp_path / "teacher")
    recipe = load("vit_digits", [*overrides, f"distillation.teacher={tmp_path / 'teacher'}"]).recipe
    parts = build(recipe)
    task = task_named(parts.recipe.task).module(parts)
    assert isinstance(task.teacher, GivenTeacher)
    own = {id(parameter) for parameter in task.parameters()}
    assert not own & {id(parameter) for parameter in task.teacher.model.parameters()}
    assert all(name.startswith("model.") for name in task.state_dict())
    assert copy.deepcopy(task).teacher is task.teacher


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_is_taught_by_the_run_of_a_dense_recipe(precision: str, tmp_path: Path, quick: list[str], console: Console) -> None:
    shared = [item for item in quick if not item.startswith("output")] + ["baselines=[]"]
    train_arm(load("vit_digits_dense", [*shared, f"output={tmp_path / 'dense'}"]), "dense", tmp_path / "dense", console)
    extras = [
        f"distillation.teacher={tmp_path / 'dense'}",
        "distillation.hidden=0.5",
        "data.mixing.mixup=0.8",
        "optimizer.warmup=0",
        f"trainer.precision={precision}",
    ]
    loaded = load("vit_digits", [*shared, *extras, f"output={tmp_path / 'run'}"])
    validate(loaded.recipe)
    before = build(loaded.recipe).model.state_dict()
    arm = train_arm(loaded, "arm", tmp_path / "run", console)
    assert all(not torch.equal(value, before[name]) for name, value in arm.parts.model.state_dict().items() if name.endswith("weight"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": [*NAMES, "more"]}, "has 5 labels, the data have 6"),
        ({"named": True, "classes": ["b", "a", "c", "d", "e"]}, r"its label 0 is 'a', that of the data is 'b'"),
        ({"hidden": 1.0, "width": 32}, "hidden_size of the teacher is 16, of the student 32: set distillation.hidden=0"),
        ({"compressed": True}, "is compressed, and a teacher must be dense"),
        ({"teacher": "dense_self"}, "train the dense recipe first and set distillation.teacher"),
        ({"teacher": "nowhere/at-all"}, "distillation.teacher = 'nowhere/at-all' cannot be loaded"),
        ({"headless": True}, "is not an image classifier"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    teacher = compressed("vit", METHODS[0], 0.5, 0.6) if settings.get("compressed") else dense("vit")
    if settings.get("named"):
        teacher.config.id2label = dict(enumerate("abcde"))
    (teacher.vit if settings.get("headless") else teacher).save_pretrained(tmp_path / "teacher")
    student = dense("vit").config
    student.hidden_size = settings.get("width", 16)
    recipe = _recipe(teacher=settings.get("teacher", str(tmp_path / "teacher")), hidden=settings.get("hidden", 0.0))
    model = ModelRecipe.model_validate({"config": {"model_type": "vit"}})
    with pytest.raises(ValueError, match=message):
        load_teacher(recipe, model, student, settings.get("classes", NAMES))  # type: ignore[arg-type]


def test_dense_self_is_the_loaded_model_without_stages(tmp_path: Path) -> None:
    dense("vit").save_pretrained(tmp_path / "model")
    model = ModelRecipe.model_validate({"name": str(tmp_path / "model")})
    loaded = load_teacher(_recipe(teacher="dense_self"), model, dense("vit").config, NAMES)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(images()).logits, dense("vit")(images()).logits)


def test_loading_a_teacher_moves_no_draw(tmp_path: Path) -> None:
    dense("vit").save_pretrained(tmp_path / "model")
    state, config = torch.get_rng_state(), ViTConfig(num_labels=CLASSES)
    load_teacher(_recipe(teacher=str(tmp_path / "model")), None, config, NAMES)
    assert torch.equal(state, torch.get_rng_state())


def test_gradient_checkpointing_changes_nothing_about_matched_tokens() -> None:
    totals = []
    for recompute in (False, True):
        student = compressed("vit", METHODS[0], 0.5, 0.6).train()
        if recompute:
            checkpoint_activations(student)
        recipe, batch, trace = _recipe(hidden=1.0), {"pixel_values": images(), "labels": labels()}, Trace()
        taught = GivenTeacher(dense("vit"), recipe)(ImageClassification, student, batch, trace)
        assert taught is not None
        total = ImageClassification.learn(student, batch, taught, recipe, trace=trace).total
        total.backward()
        totals.append((total.detach(), student.vit.embeddings.cls_token.grad))
    assert torch.equal(totals[0][0], totals[1][0])
    assert torch.equal(totals[0][1], totals[1][1])
