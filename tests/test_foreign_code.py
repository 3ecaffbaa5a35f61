"""Nothing that a stranger wrote is run or believed: code of a repository, paths of an index, texts in a model card."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import ViTConfig, ViTForImageClassification

import laconic
from laconic.data.text.tokenizer import load_tokenizer
from laconic.modules.checkpoints.base_weights import check_weights, weight_files
from laconic.modules.config import CompressionConfig, StageConfig
from laconic.trainer.build.initial_weights import start_of
from laconic.trainer.export.base import format_named, names
from laconic.trainer.export.card import _cell
from laconic.trainer.recipe.files import load
from laconic.trainer.run_folder import load_model

ROOT = Path(__file__).resolve().parents[1]
# Functions of Laconic with this name, PEFT's, which runs no code of a folder, and a step of a processor's, which hands on what that was given.
OWN = (
    *("from_pretrained", "loading.from_pretrained", "laconic.from_pretrained", "PeftModel.from_pretrained"),
    "super()._get_arguments_from_pretrained",
)
# An export that was just written loads with the code that it carries.
TRUSTED = ["trainer.export.formats.standalone"]


def _sources() -> Iterator[tuple[str, str]]:
    """Name and text of every Python file of the package and of the scripts, and of the programs of exports."""
    for folder in ("modules", "trainer", "data", "laconic"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), path.read_text("utf-8")
    for path in sorted(path for path in (ROOT / "scripts").rglob("*") if path.is_file() and path.suffix != ".pyc"):
        text = path.read_text("utf-8")
        if path.suffix == ".py" or "python" in text.partition("\n")[0]:
            yield str(path.relative_to(ROOT)), text
    for name in names():
        form = format_named(name)
        yield form.__module__.removeprefix("laconic."), form.program


def _calls() -> list[tuple[str, ast.Call]]:
    found = []
    for name, text in _sources():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("from_pretrained") and ast.unparse(node.func) not in OWN:
                found.append((name, node))
    return found


def test_no_call_of_from_pretrained_can_ask_for_or_run_foreign_code() -> None:
    calls = _calls()
    assert len(calls) >= 12
    given = {(name, ast.unparse(call)): [word.value for word in call.keywords if word.arg == "trust_remote_code"] for name, call in calls}
    asking = {key for key, value in given.items() if [ast.unparse(item) for item in value] != ["False"]}
    assert {name for name, _ in asking} == set(TRUSTED)


CODE = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import PreTrainedTokenizerFast, ViTConfig
class Custom(PreTrainedTokenizerFast): pass
class CustomConfig(ViTConfig): model_type = "custom"
"""


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose tokenizer and config name code; a question of transformers is answered with yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = tmp_path / "hostile"
    folder.mkdir()
    (folder / "custom.py").write_text(CODE.format(marker=str(tmp_path / "marker")))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Custom", "auto_map": {"AutoTokenizer": [None, "custom.Custom"]}})
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "custom", "auto_map": {"AutoConfig": "custom.CustomConfig"}}))
    return folder


def test_a_tokenizer_a_start_an_encoder_and_a_teacher_run_no_code(hostile: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    with pytest.raises(ValueError, match=r"data.tokenizer = .* cannot be loaded"):
        load_tokenizer(str(hostile))
    starts = [["model.config=null", f"model.name={hostile}"], ["model.config=null", f"model.encoder_of={hostile}"]]
    for overrides in [*starts, [f"distillation={{teacher: {hostile}}}"]]:
        from laconic.trainer.build.validate import validate

        with pytest.raises(ValueError, match="cannot be loaded"):
            validate(load("vit_digits", overrides).recipe)
    with pytest.raises(ValueError, match="custom"):
        laconic.from_pretrained(hostile)
    assert not marker.exists()
    with pytest.raises(ValueError, match="trust_remote_code = True"):
        laconic.from_pretrained(hostile, trust_remote_code=True)


def test_an_index_loads_no_tensor_from_outside_its_folder(tmp_path: Path) -> None:
    config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8)
    model = ViTForImageClassification(config)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    check_weights(tmp_path / "sharded")
    assert len(weight_files(tmp_path / "sharded")) > 1
    path = tmp_path / "sharded" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = next(iter(index["weight_map"].values()))
    shutil.copy(tmp_path / "sharded" / first, tmp_path / "outside.safetensors")
    for outside in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "model.bin"):
        changed = {name: outside if file == first else file for name, file in index["weight_map"].items()}
        path.write_text(json.dumps({**index, "weight_map": changed}))
        for read in (
            weight_files,
            load_model,
            lambda folder: start_of(load("vit_digits", ["model.config=null", f"model.name={folder}"]).recipe.model),
        ):
            with pytest.raises(ValueError, match="which is no safetensors file beside it: it is not loaded"):
                read(tmp_path / "sharded")
    for damaged in ("[]", "{}", '{"weight_map": 3}', "{", '{"weight_map": {"a": 1}}'):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"index.json (is damaged|lists '1')"):
            check_weights(tmp_path / "sharded")


@pytest.mark.parametrize("name", ["a|b", "<script>", "a\nb", "`x`", "[x](http://y)", "", "x" * 101, "a b"])
def test_a_stage_has_a_name_that_means_nothing_in_cards_and_pages(name: str) -> None:
    with pytest.raises(ValueError, match=r"compression.stages\[\].name = .* must have letters, digits"):
        StageConfig(layer=1, name=name)
    with pytest.raises(ValueError, match="must have letters, digits"):
        CompressionConfig.from_dict({"stages": [{"layer": 1, "stack": name or "|"}]})
    assert StageConfig(layer=1, name="vision.before_1-a").key == "vision.before_1-a"


def test_a_cell_of_a_model_card_holds_any_text_in_one_line() -> None:
    assert _cell("a|b\n<script>[x](y) `z` *w*") == r"a\|b &lt;script&gt;\[x\](y) \`z\` \*w\*"
