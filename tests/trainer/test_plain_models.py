"""Folders of weights that Laconic has not trained: evaluated by their task and default data."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForMaskedImageModeling

from laconic import CompressionConfig, StageConfig, compress
from laconic.trainer.build.plain_recipe import recipe_of
from laconic.trainer.errors import RecipeError
from laconic.trainer.evaluate import evaluate
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
