"""Reading prompts: what a cache holds, and the measurement of a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from laconic import CompressionConfig, StageConfig, compress
from laconic.trainer.errors import RecipeError
from laconic.trainer.measure.prefill import prefill, prefill_recipe
from laconic.trainer.recipe.files import load
from tests.matrix.decoders import LAYERS, dense, spread, tokens
from tests.trainer.small_recipes import small


def test_the_cache_holds_what_is_left_of_the_prompt_for_the_layers_from_the_stage_on() -> None:
    stage = StageConfig(layer=1, keep=0.5, scope="prompt", scorer="last_query", protect={"first": 1, "last": 4})
    models = {"dense": dense("llama"), "short": spread(compress(dense("llama"), CompressionConfig([stage])))}
    found = prefill(models, [tokens(1, 25), tokens(2, 25)], rounds=2)
    # Keys and values of two heads of 8 float32 numbers, in one row and in two.
    each = 2 * 2 * 8 * 4 * (1 + 2) / 2
    assert found.cache_bytes["dense"] == LAYERS * 25 * each
    assert found.cache_bytes["short"] == (25 + (LAYERS - 1) * (5 + 10)) * each
    assert (found.tokens, found.rounds, found.speedup["dense"].median) == (25, 2, 1.0)
    assert all(seconds > 0 for seconds in found.seconds.values())


def test_tasks_without_prompts_are_refused(quick: list[str], console: Console) -> None:
    with pytest.raises(RecipeError, match="--prefill: only language models read prompts: take a recipe with task prompt_answers"):
        prefill_recipe(load("vit_digits", [*quick, "baselines=[]"]), 1, console)


@pytest.mark.slow
@pytest.mark.usefixtures("few_functions")
def test_a_recipe_is_measured_on_its_own_prompts(tmp_path: Path, quick: list[str], console: Console) -> None:
    found = prefill_recipe(load("prompt_lora", small("prompt_lora", tmp_path, quick)), 2, console)
    assert 200 < found["tokens"] < 256
    assert found["cache_bytes"]["compressed"] < found["cache_bytes"]["dense"]
