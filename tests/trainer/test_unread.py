"""Keys that have no effect in a recipe are refused with the reason; those that a change leaves without effect are left out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from laconic.trainer.build.plain_recipe import check_overrides
from laconic.trainer.errors import RecipeError
from laconic.trainer.recipe.files import check, dump, load, read_recorded, shipped
from laconic.trainer.recipe.plain_yaml import parsed
from laconic.trainer.recipe.unread import TABLE

# A value other than the default for every key of the table.
VALUES = {
    "data.data_dir": "/my/images", "data.data_files": "x.csv", "data.config": "en", "data.revision": "v1", "data.train_split": "a",
    "data.validation_split": "b", "data.test_split": "c", "data.validation_fraction": "0.3", "data.image_column": "img",
    "data.chat_column": "c", "data.image_dir": "d", "data.mask_column": "m", "data.text_column": "t", "data.second_text_column": "u", "data.label_column": "y", "data.num_labels": "7",
    "data.ignore_index": "9", "data.mean": "[0.4]", "data.std": "[0.4]", "data.max_bad_fraction": "0.1", "data.canvas.size": "64",
    "distillation.keep": "0.5", "distillation.milder": "{}", "distillation.reverse": "true", "data.kinds": "[reading]", "data.train_samples": "70", "data.eval_samples": "70", "data.mixing.switch": "0.3", "data.label_smoothing": "0.1",
    "model.revision": "v1", "distillation.revision": "v1", "distillation.temperature": "3", "distillation.teacher": "x",
    "optimizer.router_lr": "1", "optimizer.router_weight_decay": "1", "trainer.pictures": "3", "trainer.start_rows": "3", "optimizer.lora_lr": "1",
    "optimizer.lora_weight_decay": "1", "optimizer.final": "0.5", "budget.ramp_until": "0.5", "budget.start": "0.5",
    "budget.schedule_from": "0.1", "budget.schedule_until": "0.5", "budget.noise_until": "0.5", "data.lengths": "[300]", "data.questions": "3",
    "trainer.bench_seconds": "9",
}  # fmt: skip
FILES = ["data.name=parquet", "data.data_files=x.parquet"]
TAUGHT = ["model.config=null", "model.name=runs/x", "distillation={teacher: runs/y, weight: 0.5}"]
# For every row of the table, in order: recipes and overrides under which its condition holds. Together they have all of its keys.
CASES = [
    [("vit_digits", []), ("llm_pretrain", []), ("text_classify", []), ("llm_lora", [])],
    [("vit_digits", []), ("llm_pretrain", []), ("text_classify", []), ("segment_digits", []), ("vlm_digits", [])],
    [("vit_digits", []), ("segment_digits", [])],
    [("vit_digits", []), ("text_classify", [])],
    [("vit_digits", FILES)],
    [("vit_digits", FILES), ("llm_finetune", ["data.data_files=x.json"]), ("text_classify", ["data.name=x/y"])],
    [("vlm_finetune", ["data.data_files=x.json"])],
    [("prompt_lora", ["data.name=json", "data.data_files=x.json"])],
    [("vit_digits", FILES), ("llm_finetune", ["data.data_files=x.json"])],
    [("vit_digits", FILES), ("llm_finetune", ["data.data_files=x.json"])],
    [("vit_digits", [*FILES, "data.validation_split=v"])],
    [("llm_finetune", ["data.data_files=x.json", "data.streaming=true"])],
    [("vit_digits", ["data.mixing.mixup=0.8"]), ("vit_digits", ["data.mixing.cutmix=0.8"])],
    [("vit_digits", [*TAUGHT, "distillation.weight=1"])],
    [("vit_digits", [])],
    [("vit_digits", [*TAUGHT, "distillation.teacher=dense_self"])],
    [("vit_digits", [*TAUGHT, "distillation.teacher=dense_self"])],
    [("vit_digits", ["distillation={teacher: self, milder: {}}"])],
    [("vit_digits", [*TAUGHT, "distillation.weight=0", "distillation.hidden=1"])],
    [("vit_digits", [*TAUGHT, "distillation.weight=0"])],
    [("vit_digits_dense", []), ("vit_digits", ["compression=null", "budget=null"])],
    [("vit_digits", []), ("vit_lora", ["lora={mode: routers}"]), ("vit_lora", ["lora={mode: full}"])],
    [("vit_digits", ["optimizer.schedule=constant"])],
    [("vit_digits", ["trainer.loggers=[csv]"])],
    [("llm_pretrain", []), ("text_classify", [])],
    [("vlm_digits", [])],
    [("vit_digits", ["trainer.bench_rounds=0"])],
    [("vit_digits", [])],
    [("vit_digits", []), ("vit_digits", ["budget.schedule=constant"])],
    [("vit_digits", ["budget.schedule=step", "budget.start=0.9"])],
    [("vit_digits", [])],
]
# Where each key is read.
READ = [
    ("vit_digits", FILES, ["data.data_dir", "data.data_files", "data.train_split", "data.validation_split", "data.test_split",
                           "data.validation_fraction", "data.image_column", "data.label_column", "data.num_labels", "data.mean",
                           "data.std", "data.max_bad_fraction"]),
    ("vit_digits", ["data.name=x/y"], ["data.config", "data.revision"]),
    ("segment_digits", FILES, ["data.mask_column", "data.ignore_index"]),
    ("text_classify", ["data.name=x/y"], ["data.text_column", "data.second_text_column"]),
    ("vlm_finetune", ["data.data_files=x.json"], ["data.chat_column", "data.image_dir"]),
    ("prompt_lora", [], ["data.lengths", "data.questions"]),
    ("vlm_digits", ["distillation={teacher: self}"], ["data.kinds", "distillation.keep", "distillation.milder", "distillation.reverse"]),
    ("vit_digits", ["model.config.image_size=64"], ["data.canvas.size", "data.train_samples", "data.eval_samples", "data.label_smoothing",
                                                    "optimizer.router_lr", "optimizer.router_weight_decay", "trainer.pictures", "trainer.start_rows",
                                                    "optimizer.final", "trainer.bench_seconds"]),
    ("vit_digits", ["data.mixing={mixup: 1, cutmix: 1}"], ["data.mixing.switch"]),
    ("vit_digits", TAUGHT, ["model.revision", "distillation.revision", "distillation.temperature", "distillation.teacher"]),
    ("vit_lora", [], ["optimizer.lora_lr", "optimizer.lora_weight_decay"]),
    ("vit_digits", ["budget.regularizer=ratio_mse", "budget.schedule=linear", "budget.noise=1"],
     ["budget.ramp_until", "budget.start", "budget.schedule_from", "budget.schedule_until", "budget.noise_until"]),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(TABLE)))
def test_a_key_without_effect_is_refused_with_the_reason(number: int) -> None:
    row, refused = TABLE[number], set()
    for name, overrides in CASES[number]:
        for key in row.keys:
            given = [f"{key}.size=64"] if key == "data.canvas" else [f"{key}={VALUES[key]}"]
            try:
                load(name, [*overrides, *given])
            except RecipeError as error:
                if f"{key} = " in str(error) and "has no effect" in str(error):
                    beginning = re.split(r"\{.*?\}", row.reason)[0]
                    # Another row may hold too, and comes first.
                    refused |= {key} if beginning in str(error) or any(key in other.keys for other in TABLE[:number]) else set()
    assert refused == set(row.keys)


def test_every_row_has_a_case_and_every_key_is_read_somewhere() -> None:
    assert len(CASES) == len(TABLE)
    read = {key for _, _, keys in READ for key in keys}
    assert {"data.canvas.size" if key == "data.canvas" else key for row in TABLE for key in row.keys} == read == set(VALUES)
    for name, overrides, keys in READ:
        for key in keys:
            load(name, [*overrides, f"{key}={VALUES[key]}"])


def test_a_recipe_with_a_key_without_effect_is_refused_and_a_base_with_one_is_not(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("base: vit_digits_dense\noptimizer: {router_lr: 1}")
    with pytest.raises(RecipeError, match=r"optimizer.router_lr = 1.0 has no effect: the recipe has no compression"):
        load(str(own))
    # The base's rate was of the routers that the overlay removes.
    own.write_text("base: vit_digits\ncompression: null\nbudget: null")
    assert load(str(own)).recipe.optimizer.router_lr is None
    with pytest.raises(RecipeError, match="optimizer.router_lr = 1.0 has no effect"):
        load(str(own), ["optimizer.router_lr=1"])


def test_what_loses_its_effect_by_an_override_is_left_out(tmp_path: Path) -> None:
    recipe = load("segment_digits", ["data.name=imagefolder", "data.data_dir=scenes", "data.num_labels=21"]).recipe
    recorded = tmp_path / "recipe.yaml"
    recorded.write_text(dump(recipe))
    assert read_recorded(recorded) == recipe == check(parsed(dump(recipe), "x"), "x")
    with pytest.raises(RecipeError, match="data.canvas = .* has no effect"):
        load("segment_digits", ["data.name=imagefolder", "data.canvas.size=32"])


@pytest.mark.parametrize("name", shipped())
def test_no_shipped_recipe_has_a_key_without_effect_and_its_dump_is_the_recipe(name: str) -> None:
    recipe = load(name).recipe
    assert check(parsed(dump(recipe), name), name) == recipe


def test_an_override_of_a_trained_model_that_nothing_reads_is_refused() -> None:
    check_overrides(["data.data_dir=x", "seed=3"])
    for path in ("budget.target", "compression", "optimizer.lr", "model.attention", "dataset"):
        with pytest.raises(RecipeError, match=f"{path} has no effect on a trained model"):
            check_overrides(["seed=3", f"{path}=0.3"])
