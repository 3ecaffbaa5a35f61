"""Folders of weights that Laconic has not trained: evaluated by their task and default data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification, ViTForMaskedImageModeling

from laconic import CompressionConfig, StageConfig, compress
from laconic.modules.checkpoints.whole_files import DamagedFile
from laconic.trainer.build.plain_recipe import recipe_of
from laconic.trainer.build.trained_model import trained_model
from laconic.trainer.errors import RecipeError
from laconic.trainer.evaluate import Options, evaluate
from laconic.trainer.probe.probe import Options as ProbeOptions
from laconic.trainer.probe.probe import Probe
from laconic.trainer.run_folder import TOKENIZER
from tests.data.folders import image_folder
from tests.data.texts import jsonl, small_tokenizer


def _folder(path: Path, compressed: bool) -> Path:
    tokenizer = small_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    if compressed:
        compress(model, CompressionConfig([StageConfig(layer=1, site="around", keep=0)]))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("compressed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_plain_folder_is_evaluated_on_the_data_that_are_named(tmp_path: Path, console: Console, compressed: bool) -> None:
    folder, rows = (
        _folder(tmp_path / "model", compressed),
        jsonl(tmp_path / "rows.jsonl", [{"text": f"row {i} of some"} for i in range(40)]),
    )
    given = ["data.name=json", f"data.data_files={rows}", "data.sequence_length=32"]
    recipe, weights = recipe_of(str(folder), given)
    assert (recipe.task, weights) == ("causal_lm", str(folder))
    result = evaluate(str(folder), recipe, console, weights)
    assert list(result["variants"]) == (["compressed", "dense"] if compressed else ["dense"])
    assert result["variants"]["dense"]["perplexity"] == pytest.approx(math.exp(math.log(recipe_vocabulary(folder))), rel=0.1)


def recipe_vocabulary(folder: Path) -> int:
    """A random model finds every entry about as likely."""
    return int(LlamaConfig.from_pretrained(folder).vocab_size)


def _classifier(path: Path, names: Sequence[str], **settings: Any) -> str:
    """A folder of random weights for the classes of ``image_folder``, with its images beside it."""
    if not (path.parent / "images").is_dir():
        image_folder(path.parent / "images")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8,
        id2label=dict(enumerate(names)), label2id={name: code for code, name in enumerate(names)},
    )  # fmt: skip
    model = ViTForImageClassification(config)
    for key, value in settings.items():
        setattr(model.config, key, value)
    model.save_pretrained(path)
    return str(path)


def _images(target: str) -> list[str]:
    return ["data.name=imagefolder", f"data.data_dir={Path(target).parent / 'images'}", "data.batch_size=3", "data.eval_batch_size=3"]


CLASSES = ("class_0", "class_1", "class_2")


def test_settings_of_a_checkpoint_steer_neither_outputs_nor_loss(tmp_path: Path, console: Console) -> None:
    found = []
    for settings in ({}, {"problem_type": "regression"}, {"problem_type": "multi_label_classification", "return_dict": False}):
        target = _classifier(tmp_path / f"model{len(found)}", CLASSES, **settings)
        recipe, weights = recipe_of(target, _images(target))
        # Batches of as many rows as classes: transformers would take the labels for numbers without a word.
        probe = Probe(target, recipe, weights, ProbeOptions(6, 3), tmp_path / f"probe{len(found)}.json", console)
        result = evaluate(target, recipe, console, weights)
        found.append((probe.meter.whole.loss, result["variants"]["dense"]["accuracy"]))
    assert found[0] == found[1] == found[2]


def test_a_reference_reads_the_same_data_and_names_its_classes_alike(tmp_path: Path, console: Console) -> None:
    target, same = _classifier(tmp_path / "a", CLASSES), _classifier(tmp_path / "b", CLASSES)
    recipe, weights = recipe_of(target, _images(target))
    result = evaluate(target, recipe, console, weights, Options(dense=same))
    assert result["variants"]["reference"]["against_reference"]["agreement"] == 1.0
    other = _classifier(tmp_path / "c", CLASSES[::-1])
    with pytest.raises(RecipeError, match=r"has classes \['class_2', 'class_1', 'class_0'\], and the evaluated model"):
        evaluate(target, recipe, console, weights, Options(dense=other))
    (tmp_path / "c" / "config.json").write_text((tmp_path / "c" / "config.json").read_text().replace('"vit"', '"resnet"'))
    with pytest.raises(RecipeError, match="--dense .*: no backbone adapter for model_type 'resnet'"):
        evaluate(target, recipe, console, weights, Options(dense=other))


def test_classes_without_names_are_said(tmp_path: Path, console: Console) -> None:
    target = _classifier(tmp_path / "a", ["LABEL_0", "LABEL_1", "LABEL_2"])
    recipe, weights = recipe_of(target, _images(target))
    assert (
        "the model's classes have no names: they are taken for class_0, class_1, class_2, in this order"
        in (evaluate(target, recipe, console, weights)["remarks"])
    )


def test_weights_that_lack_a_tensor_or_are_of_another_task_are_not_measured(tmp_path: Path) -> None:
    target = _classifier(tmp_path / "a", CLASSES)
    with pytest.raises(RecipeError, match="is a ViTForImageClassification, and task = semantic_segmentation measures a "):
        trained_model(target, "semantic_segmentation", target)
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    del tensors["classifier.bias"]
    save_file(tensors, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    with pytest.raises(DamagedFile, match=r"lacks 1 tensors of a ViTForImageClassification, classifier\.bias first, which would be random"):
        trained_model(target, "image_classification", target)


def test_a_tokenizer_beside_the_weights_is_the_one_that_is_read(tmp_path: Path) -> None:
    folder = str(_folder(tmp_path / "model", False))
    for given in ("data.tokenizer=other", "data.chat_template=x"):
        with pytest.raises(
            RecipeError, match=rf"{given.partition('=')[0]} has no effect on a trained model with a tokenizer .* in {folder}"
        ):
            recipe_of(folder, ["data.name=json", "data.data_files=x", given])
    (tmp_path / "model" / TOKENIZER).unlink()
    assert recipe_of(folder, ["data.name=json", "data.data_files=x", "data.tokenizer=other"])[0].data.tokenizer == "other"  # type: ignore[attr-defined]


def test_what_is_no_model_of_a_task_is_refused(tmp_path: Path) -> None:
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8)
    ViTForMaskedImageModeling(config).save_pretrained(tmp_path / "vit")
    for target, given, message in (
        (str(tmp_path / "vit"), [], "is a ViTForMaskedImageModeling, which is the model of no task"),
        ("nowhere", [], "nowhere is not a folder: name a run folder"),
        (str(tmp_path / "vit"), ["optimizer.lr=1"], "optimizer.lr has no effect"),
    ):
        with pytest.raises(RecipeError, match=message):
            recipe_of(target, given)
