"""``laconic calibrate``: thresholds are set anew, beside the same weights; stages that stray are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import laconic
from laconic import CompressionConfig, StageConfig, compress, stages_of
from laconic.modules.checkpoints.adapter_folder import read_adapter
from laconic.trainer.build.plain_recipe import recipe_of
from laconic.trainer.calibrate import calibrate, write_stages
from laconic.trainer.errors import RecipeError
from laconic.trainer.measure.strayed import strayed
from tests.data.texts import jsonl, small_tokenizer
from tests.modules.adapted import adapter_folder, base_folder


def _saved(path: Path, selector: str) -> Path:
    tokenizer = small_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    parts = {"site": "around", "keep": 0.4, "scorer": "update", "selector": selector}
    model = compress(LlamaForCausalLM(config), CompressionConfig([StageConfig(layer=1, **parts)]))
    model.save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    jsonl(path / "rows.jsonl", [{"text": f"row {i} of some text, number {i * i}"} for i in range(40)])
    return path / "model"


def test_a_folder_that_could_not_be_evaluated_keeps_what_it_requests_afterwards(tmp_path: Path) -> None:
    folder = _saved(tmp_path, "threshold")
    before, ids = laconic.from_pretrained(folder), torch.arange(5, 17)[None]
    with pytest.raises(ValueError, match=r"stage 'around_1': its threshold has seen no score.* or run laconic calibrate on its folder"):
        before(ids)
    recipe, weights = recipe_of(str(folder), ["data.name=json", f"data.data_files={tmp_path / 'rows.jsonl'}", "data.sequence_length=32"])
    found = calibrate(str(folder), recipe, weights, 8, Console(quiet=True))
    assert found["achieved"] == pytest.approx({"around_1": 0.4}, abs=0.05)
    after = laconic.from_pretrained(folder)
    after(ids)
    (stage,) = stages_of(after).values()
    assert stage.scorer.fitted
    same = {name: value for name, value in before.state_dict().items() if ".stages." not in name}
    assert all(torch.equal(after.state_dict()[name], value) for name, value in same.items())
    assert (folder / "tokenizer_config.json").is_file()


def test_there_must_be_a_threshold(tmp_path: Path) -> None:
    folder = _saved(tmp_path, "top_k")
    recipe, weights = recipe_of(str(folder), ["data.name=json", f"data.data_files={tmp_path / 'rows.jsonl'}"])
    with pytest.raises(RecipeError, match="has no causal stage whose threshold follows its scores"):
        calibrate(str(folder), recipe, weights, 1, Console(quiet=True))


def test_data_that_cannot_be_opened_are_one_message(tmp_path: Path) -> None:
    folder = str(_saved(tmp_path, "threshold"))
    (tmp_path / "cut.jsonl").write_text('{"text": "a"}\n{"text": ')
    for given, message in (
        (["data.data_files=/nowhere.jsonl"], "cannot be opened from /nowhere.jsonl"),
        ([f"data.data_files={tmp_path / 'cut.jsonl'}"], "line 2: not a JSON value"),
        ([f"data.data_files={tmp_path / 'rows.jsonl'}", "data.text_column=none"], "data.text_column = 'none' is missing from the data"),
    ):
        recipe, weights = recipe_of(folder, ["data.name=json", *given])
        with pytest.raises(RecipeError, match=message):
            calibrate(folder, recipe, weights, 1, Console(quiet=True))


def test_the_stages_of_an_adapter_are_replaced_and_its_manifest_knows(tmp_path: Path) -> None:
    folder, _ = adapter_folder(tmp_path / "adapter", base_folder(tmp_path / "base"))
    (folder / "note.txt").write_text("beside")
    old = read_adapter(folder)
    write_stages(folder, {name: value + 1 for name, value in old.stages.items()})
    new = read_adapter(folder)
    assert all(torch.equal(new.stages[name], value + 1) for name, value in old.stages.items())
    assert all(torch.equal(new.lora[name], value) for name, value in old.lora.items())
    assert (folder / "note.txt").read_text() == "beside"


def test_stages_that_keep_another_share_are_named_with_the_cure() -> None:
    config = LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    parts = {"site": "around", "keep": 0.4, "scorer": "linear"}
    stages = [StageConfig(layer=0, selector="top_k", **parts), *(StageConfig(layer=i, selector="threshold", **parts) for i in (1, 2))]
    built = stages_of(compress(LlamaForCausalLM(config), CompressionConfig(stages))).values()
    requested = dict.fromkeys(("around_0", "around_1", "around_2"), 0.4)
    (line,) = strayed(built, requested, {"around_0": 0.5, "around_1": 0.415, "around_2": 0.45}, "runs/x")
    assert "differ by more than 0.02: around_2 0.450 of 0.400; laconic calibrate runs/x sets thresholds anew" in line
    assert strayed(built, requested, requested, "runs/x") == []
