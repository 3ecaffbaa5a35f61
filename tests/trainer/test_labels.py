"""What belongs to the task and its data: classes by name, the kind of the loss, and what is said before training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from rich.console import Console
from torch.nn import functional
from transformers import BertConfig, ViTConfig, ViTForImageClassification

from laconic.data.rows import BadRows, collate, good_rows
from laconic.modules.checkpoints.adapter_saving import trained_modules
from laconic.modules.checkpoints.training_checkpoint import about, of_same_model
from laconic.trainer.build.build import build, model_config
from laconic.trainer.build.heads import heads_of, named_classes
from laconic.trainer.build.validate import validate
from laconic.trainer.errors import RecipeError
from laconic.trainer.evaluate import evaluate
from laconic.trainer.recipe.files import load
from laconic.trainer.run import train_arm
from laconic.trainer.run_folder import RunFolder, load_model
from laconic.trainer.show.pictures import draw_arms
from laconic.trainer.tasks.base import task_named
from tests.clean import CleanProcesses
from tests.data.folders import encoded, parquet

NAMES = ("cat", "dog", "owl")
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16, "patch_size": 4}


def _parquet(path: Path, classes: Sequence[str], labels: Sequence[str], first: int = 0) -> Path:
    """Images whose ClassLabel column has its classes in this order; the images of two files with equal labels are equal."""
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list(classes))})
    images = [{"bytes": encoded(first + row), "path": None} for row in range(len(labels))]
    rows = {"img": images, "label": [list(classes).index(label) for label in labels]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return path


def _overrides(path: Path, *more: str) -> list[str]:
    return [
        "baselines=[]", "data.name=parquet", f"data.data_files={path}", "data.batch_size=4", "trainer.max_steps=2",
        "trainer.bench_rounds=0", "trainer.log_every=1", "budget.target=0.8", "data.validation_fraction=0.5", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on images of three classes."""
    folder = tmp_path_factory.mktemp("labels")
    data = _parquet(folder / "rows.parquet", NAMES, [NAMES[row % 3] for row in range(24)])
    config = "{" + ", ".join(f"{key}: {value}" for key, value in {"model_type": "vit", **TINY}.items()) + "}"
    overrides = _overrides(data, f"model.config={config}", f"output={folder / 'run'}", "optimizer.lr=0.01")
    train_arm(load("vit_digits", overrides), "arm", folder / "run", Console(stderr=True))
    return folder / "run"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Weights of a classifier that was not trained here; its config asks for a regression."""
    labels = dict(enumerate(NAMES))
    config = ViTConfig(
        **TINY, id2label=labels, label2id={name: code for code, name in labels.items()}, problem_type="regression", return_dict=False
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def _start(name: Path, data: Path, *more: str) -> list[str]:
    return _overrides(data, "model.config=null", f"model.name={name}", *more)


def test_the_same_names_in_another_order_give_the_same_accuracy(run: Path, tmp_path: Path, console: Console) -> None:
    labels, recipe = [NAMES[row % 3] for row in range(24)], RunFolder.open(run).read_recipe
    found = {}
    for order in (NAMES, NAMES[::-1]):
        path = _parquet(tmp_path / f"{order[0]}.parquet", order, labels, first=50)
        found[order] = evaluate(str(run), recipe([f"data.data_files={path}"]), console)["variants"]["dense"]["accuracy"]
    assert found[NAMES] == found[NAMES[::-1]]
    # The images of one class that the model gives most often: by number, another class would be meant.
    model = load_model(run)
    data = build(load("vit_digits", _start(run, _parquet(tmp_path / "all.parquet", NAMES, labels, first=50))).recipe).data
    batch = collate([data.validation[row] for row in range(12)])
    answers = model(pixel_values=batch["pixel_values"]).logits.argmax(-1)
    common = NAMES[int(answers.mode().values)]
    two = [common, *(name for name in NAMES if name != common)][:2][::-1]
    path = _parquet(tmp_path / "one.parquet", two, [common] * 24, first=50)
    result = evaluate(str(run), recipe([f"data.data_files={path}"]), console)
    assert result["variants"]["compressed"]["accuracy"] == pytest.approx(float((answers == NAMES.index(common)).float().mean()))
    assert any("0 rows in validation" in line for line in result["remarks"])


def test_classes_that_a_model_lacks_are_named_and_refused(run: Path, tmp_path: Path, console: Console) -> None:
    path = _parquet(tmp_path / "rows.parquet", ("cat", "fox"), ["cat", "fox"] * 8)
    message = r"the data have the class 'fox', and .* has the classes 'cat', 'dog', 'owl': labels are compared by name"
    with pytest.raises(RecipeError, match=message):
        evaluate(str(run), RunFolder.open(run).read_recipe([f"data.data_files={path}"]), console)
    with pytest.raises(ValueError, match=message + ".*model.new_head=true trains a new head for other classes"):
        validate(load("vit_digits", _start(run, path)).recipe)


def test_a_run_goes_on_with_its_head_or_with_a_new_one_on_request(run: Path, tmp_path: Path) -> None:
    before = load_model(run).classifier.weight
    turned = _parquet(tmp_path / "turned.parquet", NAMES[::-1], [NAMES[row % 3] for row in range(24)])
    parts = build(load("vit_digits", _start(run, turned)).recipe)
    assert named_classes(parts.model.config) == NAMES
    assert torch.equal(parts.model.classifier.weight, before)
    row = next(row for row in range(12) if parts.data.train.rows[row]["label"] == 0)  # type: ignore[attr-defined]
    assert int(parts.data.train[row]["labels"]) == 2
    other = _parquet(tmp_path / "other.parquet", ("fox", "hen", "yak"), [("fox", "hen", "yak")[row % 3] for row in range(24)])
    parts = build(load("vit_digits", _start(run, other, "model.new_head=true")).recipe)
    assert named_classes(parts.model.config) == ("fox", "hen", "yak")
    assert not torch.equal(parts.model.classifier.weight, before)
    assert torch.equal(parts.model.vit.embeddings.cls_token, load_model(run).vit.embeddings.cls_token)
    with pytest.raises(ValueError, match=r"model.new_head = true replaces the head of model.name, which is not set"):
        load("vit_digits", ["model.new_head=true"])


def test_an_adapter_with_a_new_head_keeps_its_stages_and_not_its_old_head(run: Path, tmp_path: Path, console: Console) -> None:
    data = _parquet(tmp_path / "rows.parquet", NAMES, [NAMES[row % 3] for row in range(24)])
    lora = ["lora={mode: lora, r: 2, modules_to_save: [classifier]}", "optimizer.lr=0.01", f"output={tmp_path / 'lora'}"]
    arm = train_arm(load("vit_digits", _start(run, data, *lora)), "arm", tmp_path / "lora", console)
    before = arm.parts.model.classifier.weight
    other = _parquet(tmp_path / "other.parquet", ("fox", "hen", "yak"), [("fox", "hen", "yak")[row % 3] for row in range(24)])
    kept = build(load("vit_digits", _start(tmp_path / "lora", data, *lora)).recipe).model
    new = build(load("vit_digits", _start(tmp_path / "lora", other, "model.new_head=true", *lora)).recipe).model
    assert torch.equal(kept.classifier.weight, before)
    assert not torch.equal(new.classifier.weight, before)
    assert "classifier" in trained_modules(new)


def test_weights_with_other_classes_get_a_new_head_although_it_would_fit(weights: Path, tmp_path: Path) -> None:
    before = ViTForImageClassification.from_pretrained(weights).classifier.weight
    same = _parquet(tmp_path / "same.parquet", NAMES[::-1], [NAMES[row % 3] for row in range(24)])
    other = _parquet(tmp_path / "other.parquet", ("fox", "hen", "yak"), [("fox", "hen", "yak")[row % 3] for row in range(24)])
    kept, new = (build(load("vit_digits", _start(weights, path)).recipe).model for path in (same, other))
    assert torch.equal(kept.classifier.weight, before)
    assert named_classes(kept.config) == NAMES
    assert not torch.equal(new.classifier.weight, before)
    frozen = build(load("vit_digits", _start(weights, other, "lora={mode: routers}")).recipe).model
    assert all(parameter.requires_grad for head in heads_of(frozen).values() for parameter in head.parameters())


def test_the_task_sets_its_loss_whatever_a_checkpoint_says(weights: Path, tmp_path: Path) -> None:
    data = _parquet(tmp_path / "rows.parquet", NAMES, [NAMES[row % 3] for row in range(24)])
    parts = build(load("vit_digits", _start(weights, data, "data.batch_size=3", "compression=null", "budget=null")).recipe)
    batch = collate([parts.data.train[row] for row in range(3)])
    task = task_named("image_classification")
    out = task.forward(parts.model.eval(), batch)
    assert float(task.loss(parts.model, batch)) == pytest.approx(float(functional.cross_entropy(out.logits, batch["labels"])), rel=1e-5)
    assert (parts.model.config.problem_type, parts.model.config.num_labels) == ("single_label_classification", 3)
    for key in ("model.settings.problem_type=regression", "model.settings.num_labels=4"):
        with pytest.raises(ValueError, match=rf"{key.partition('=')[0]} is set by the task and its data: remove it"):
            model_config(load("vit_digits", _start(weights, data, key)).recipe.model, task)


def test_an_encoder_that_reads_from_left_to_right_is_no_classifier() -> None:
    data: Any = SimpleNamespace(classes=["a", "b"], length=8, tokenizer=[0])
    with pytest.raises(ValueError, match="is_decoder = true"):
        task_named("text_classification").fit_config(BertConfig(is_decoder=True), data)


def test_bad_rows_first_in_a_split_do_not_keep_pictures_from_being_drawn(tmp_path: Path) -> None:
    images = [b"broken"] * 3 + [encoded(row) for row in range(21)]
    path = parquet(tmp_path / "rows.parquet", images, [row % 3 for row in range(24)])  # type: ignore[arg-type]
    files = f"data.data_files={{train: {path}, validation: {path}}}"
    config = "{" + ", ".join(f"{key}: {value}" for key, value in {"model_type": "vit", **TINY}.items()) + "}"
    overrides = _overrides(path, f"model.config={config}", files, "data.validation_split=validation", "data.max_bad_fraction=0.5")
    overrides.remove("data.validation_fraction=0.5")
    parts = build(load("vit_digits", overrides).recipe)
    assert "bad" in parts.data.test[0]
    draw_arms({"arm": parts}, tmp_path / "kept.png")
    assert (tmp_path / "kept.png").is_file()
    with pytest.raises(BadRows, match="every row is bad: 2 of 2 rows"):
        good_rows([parts.data.test[0]] * 2, 1)


BAD = [
    ([encoded(row) for row in range(2)], [0, 1], [], "are fewer than a batch of 4"),
    ([encoded(row) for row in range(23)] + [b"broken"], [row % 2 for row in range(24)], [], "undecodable image"),
    ([encoded(row) for row in range(24)], [[1]] * 24, [], "holds a list"),
    (
        [encoded(row) for row in range(24)],
        [row % 2 for row in range(24)],
        ["model.config.num_channels=4"],
        r"num_channels = 4: images have 3",
    ),
    ([encoded(row) for row in range(24)], [1] * 24, [], "a classifier needs 2 or more"),
]


@pytest.mark.parametrize(("images", "labels", "more", "message"), BAD, ids=[item[3] for item in BAD])
def test_validate_opens_the_data_and_says_what_is_wrong(
    tmp_path: Path, images: list[bytes | None], labels: list[object], more: list[str], message: str
) -> None:
    path = parquet(tmp_path / "rows.parquet", images, labels)
    config = "{" + ", ".join(f"{key}: {value}" for key, value in {"model_type": "vit", **TINY}.items()) + "}"
    with pytest.raises(ValueError, match=message):
        validate(load("vit_digits", _overrides(path, f"model.config={config}", *more)).recipe)


def test_validate_and_the_report_name_a_class_without_rows(tmp_path: Path, clean: CleanProcesses) -> None:
    path = _parquet(tmp_path / "rows.parquet", ("cat", "dog", "gnu"), ["cat", "dog"] * 12)
    config = "{" + ", ".join(f"{key}: {value}" for key, value in {"model_type": "vit", **TINY}.items()) + "}"
    overrides = _overrides(path, f"model.config={config}")
    assert "class gnu: 0 rows in train" in validate(load("vit_digits", overrides).recipe).remarks
    assert "class gnu: 0 rows in train" in clean.module("laconic", ["validate", "vit_digits", *overrides]).stdout
    facts = build(load("vit_digits", overrides).recipe).data.facts
    assert facts["counts"]["train"]["gnu"] == 0
    assert "class gnu: 0 rows in train" in facts["remarks"]


def test_images_of_one_pixel_are_read(tmp_path: Path) -> None:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (1, 1), (9, 9, 9)).save(buffer, "PNG")
    path = parquet(tmp_path / "rows.parquet", [buffer.getvalue()] * 24, [row % 2 for row in range(24)])
    config = "{" + ", ".join(f"{key}: {value}" for key, value in {"model_type": "vit", **TINY}.items()) + "}"
    for augmentation in ("none", "flip", "crop_flip", "resized_crop_flip"):
        overrides = _overrides(path, f"model.config={config}", f"data.augmentation={augmentation}")
        assert all("bad" not in build(load("vit_digits", overrides).recipe).data.train[row] for row in range(4))


def test_a_run_is_not_resumed_on_data_whose_classes_have_other_names(run: Path) -> None:
    model = load_model(run)
    description = about(model, None)
    assert of_same_model(description, model, None)
    model.config.id2label = dict(enumerate(("cat", "dog", "yak")))
    assert not of_same_model(description, model, None)


def test_evaluate_takes_data_of_one_of_the_model_s_classes_and_refuses_others_with_2(
    run: Path, tmp_path: Path, clean: CleanProcesses
) -> None:
    one = _parquet(tmp_path / "one.parquet", ("owl",), ["owl"] * 24)
    done = clean.module("laconic", ["evaluate", str(run), f"data.data_files={one}"])
    assert done.returncode == 0, done.stderr
    assert "accuracy says nothing of the classes 'cat', 'dog', of 3 in all" in done.stdout
    other = _parquet(tmp_path / "other.parquet", ("fox", "owl"), ["fox", "owl"] * 12)
    done = clean.module("laconic", ["evaluate", str(run), f"data.data_files={other}"])
    assert done.returncode == 2
    assert "error: the data have the class 'fox', and the trained model has the classes 'cat', 'dog', 'owl'" in done.stderr
