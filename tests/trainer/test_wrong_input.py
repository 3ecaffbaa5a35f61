"""Wrong input of a user or a stranger's file is one message with the place and the cure. tests/fuzz tries what nobody thought of."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers import ViTConfig, ViTForImageClassification

import laconic
from laconic.data.hub import open_source
from laconic.data.source import DataSource
from laconic.modules.budget.config import BudgetConfig
from laconic.modules.checkpoints.adapter_folder import AdapterError, json_bytes, read_adapter, seal
from laconic.modules.checkpoints.base_weights import weights_hash
from laconic.modules.checkpoints.foreign_config import check_size
from laconic.modules.checkpoints.whole_files import DamagedFile
from laconic.modules.config import CompressionConfig, PartConfig, RestoreConfig, StageConfig
from laconic.trainer.build.validate import check_memory, validate
from laconic.trainer.cli.output import user_input
from laconic.trainer.errors import RecipeError
from laconic.trainer.recipe.files import load
from laconic.trainer.recipe.plain_yaml import LONGEST, parsed
from laconic.trainer.run_folder import load_model

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
YAML = [
    ("seed: 1\nseed: 2", r"the key 'seed' is given twice, in line 2 again: remove one of them"),
    ("a: {b: 1, b: 1}", "the key 'b' is given twice"),
    ("{1: a, 0x1: b}", "the key 1 is given twice"),
    ("a: .inf", "a = inf is not a finite number"),
    ("a: [1, {b: .nan}]", r"a.1.b = nan is not a finite number"),
    ("a: 1e999", "a = inf is not a finite number"),
    (f"a: {2**70}", "a number of more than 64 bits"),
    ("a: !!bool x", "a value does not fit its tag"),
    ("a: !!binary aGk=", "a: a bytes is not one of text, number"),
    ("a: !!set {b}", "a: a set is not one of text"),
    ("a: !!python/object:os.system x", "could not determine a constructor"),
    ("true: 1", "the key True is not text; put it in quotes"),
    ("? [1]\n: 2", r"the key \[1\] is not text"),
    ("a: " + "[" * 1000 + "]" * 1000, "it is nested more than 40 deep"),
    (BOMB, "it has more than 100,000 values, those that aliases repeat included"),
    ("a: &a [*a]", r"the alias \*a stands before or inside its anchor"),
    ("x" * (LONGEST + 1), "it has 200,001 characters, and 200,000 are allowed"),
]


@pytest.mark.parametrize(("text", "message"), YAML, ids=[text[:25] for text, _ in YAML])
def test_yaml_that_is_no_plain_data_is_refused_at_once(text: str, message: str) -> None:
    start = time.perf_counter()
    with pytest.raises(RecipeError, match=rf"^here: .*{message}"):
        parsed(text, "here")
    assert time.perf_counter() - start < 1


def test_yaml_reads_numbers_dates_and_merges_as_written() -> None:
    assert parsed("a: 1e-3\nb: 2024-01-31\nc: &c {d: 1, e: 2}\nf: {<<: *c, e: 3}\ng: ''", "x") == {
        "a": 0.001, "b": "2024-01-31", "c": {"d": 1, "e": 2}, "f": {"d": 1, "e": 3}, "g": "",
    }  # fmt: skip
    data = parsed("a: &a {b: 1}\nc: *a", "x")
    data["a"]["b"] = 2
    assert data["c"] == {"b": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfea\x00", "it is not text in UTF-8"),
        (b"[1, 2]", "must hold keys and values, and holds list"),
        (b"base: [a]", r"base = \['a'\] must be the name of one recipe"),
        (b"base: {a: b}", "must be the name of one recipe"),
        (b"base: ../" + b"a" * 5000, "does not exist"),
        (b"x" * 900_000, "has 900,000 bytes, more than a recipe has"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        load(str(tmp_path / "wrong.yaml"))


def test_bases_over_another_path_of_the_same_file_are_a_circle(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "a.yaml").write_text("base: x/../a")
    with pytest.raises(RecipeError, match="its bases form a circle"):
        load(str(tmp_path / "a.yaml"))


OVERRIDES = [
    ("seed=true", "seed: true is neither a number nor a text"),
    ("data.batch_size=true", "true is neither a number nor a text"),
    ("optimizer.betas=[true, 0.9]", "true is neither a number nor a text"),
    ("data.canvas.size=true", "true is neither a number nor a text"),
    ("budget.target=true", "true is neither a number nor a text"),
    ("trainer.devices=true", "true is neither a number nor a text"),
    ("budget.regularizer={name: ratio_mse, weight: true}", "weight = True must be a number"),
    ("seed='!!bool x'", "seed = '!!bool x': input should be a valid integer"),
    (f"seed={'[' * 1000}", "the value is not YAML: it is nested more than 40 deep"),
    ("seed=4294967296", "seed = 4294967296: input should be less than"),
    ("optimizer.lr=.inf", "inf is not a finite number"),
    ("optimizer.lr='1e999'", "optimizer.lr = '1e999': input should be a finite number"),
    ("output='{x}'", r"only \{recipe\} and \{seed\} are replaced"),
    ("output='{recipe:>999999999}'", r"only \{recipe\} and \{seed\} are replaced"),
    ("output=''", "must be the name of a folder"),
    ("baselines.0.x=1", "baselines.0 is 'vit_digits_dense', which has no keys: set baselines.0 as a whole"),
    ("compression.stages.²=1", "'²' is not an index of it"),
    ("compression.stages.0.layer.x=1", "compression.stages.0.layer is 0, which has no keys"),
    ("a..b=1", "must be key.path=value"),
    ("compression.restore=drop", r"compression.restore must have 'layer' and 'by'"),
    ("compression=drop", "compression is a block with stages, not 'drop'"),
    ("compression.stages.0.site=[]", r"compression.stages\[\].site = \[\] must be text"),
    ("compression.stages.0.stack=1", r"compression.stages\[\].stack = 1 must be text"),
    ("compression.stages.0.count=[]", r"compression.stages\[\].count = \[\] must be text"),
    ("compression.stages.0.name=a|b", r"compression.stages\[\].name = 'a\|b' must have letters"),
    ("compression.stages.0={1: 2}", r"compression.stages\[\].1 is not a key"),
    ("model.config.model_type=1", "model.config.model_type = 1 is no family of models"),
    ("model.config.model_type=[]", r"model.config.model_type = \[\] is no family of models"),
    ("data.std=[0]", "greater than 0"),
    ("data.train_samples=1000000000000", "less than or equal to 100000000"),
]


@pytest.mark.parametrize(("override", "message"), OVERRIDES, ids=[override[:40] for override, _ in OVERRIDES])
def test_a_wrong_override_is_one_message(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as refused:
        load("vit_digits", [override])
    assert len(str(refused.value)) < 1000


TINY = ["model.config.hidden_size=16", "model.config.num_hidden_layers=2", "model.config.intermediate_size=32"]
SETTINGS = [
    ("model.config.patch_size=[]", "model.config.patch_size: IndexError"),
    ("model.config.patch_size=0", "the model cannot be built from model, lora and compression: ZeroDivisionError"),
    ("model.config.num_hidden_layers=1000000000000000000", "num_hidden_layers = 1000000000000000000 is larger than any model has"),
    ("model.config.num_hidden_layers=10001", "num_hidden_layers = 10001 is deeper than any model"),
    ("model.config.hidden_size=1000000000", "are those of about .* billion parameters"),
    ("model.config.hidden_act=zz", "cannot be built .*KeyError: 'zz'"),
    ("model.config.image_size=[32]", "model.config.image_size and num_channels: IndexError"),
    ("model.config.num_channels=-1", "an image of 32 × 32 pixels and -1 channels"),
    ("model.config.id2label=3", "model.config.id2label is set by the task and its data: remove it"),
    ("compression.stages.0.scorer={name: learned, width: 100000000000}", "cannot be built"),
    ("compression.stages.0.scorer={name: learned, width: wide}", "an option is of the wrong type: width = 'wide' must be int or null"),
    ("compression.stages.0.scorer={name: learned, width: 1.0e+300}", "width = 1e\\+300 is larger than a float of 32 bits can be"),
    ("compression.stages.0.scorer={name: learned, detach: 1}", "detach = 1 must be bool"),
]


@pytest.mark.parametrize(("override", "message"), SETTINGS, ids=[override[:50] for override, _ in SETTINGS])
def test_settings_that_no_model_can_have_are_refused_before_anything_is_allocated(override: str, message: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        validate(load("vit_digits", [*TINY, override]).recipe)
    assert time.perf_counter() - start < 10


def test_weights_that_exceed_the_memory_are_refused_before_they_are_allocated() -> None:
    recipe = load("vit_digits").recipe
    small = validate(load("vit_digits", TINY).recipe)
    with pytest.raises(RecipeError, match=r"the model's 1,000,000,000,000 parameters need 3,725 GiB, and this machine has \d+ GiB"):
        check_memory(replace(small, parameters=10**12), recipe)
    check_memory(small, recipe)


@pytest.mark.parametrize("name", ["..", ".", "/", "~", "", "a/b/c", "a b", "../x", "file.txt/../x"])
def test_a_folder_is_no_name_of_data_and_is_not_searched(name: str) -> None:
    with pytest.raises(ValueError, match=r"data.name = .* is no hub name: for files set data.name to imagefolder"):
        open_source(DataSource(name))


@pytest.mark.parametrize(
    "given", [1, None, "x", [], [1], {"stages": 1}, {"stages": [None]}, {"stages": [{"layer": 1, "scorer": {1: 2}}]}, {1: 2}]
)
def test_a_compression_config_of_another_type_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=r"compression|scorer"):
        CompressionConfig.from_dict(given)


def test_parts_and_budgets_refuse_other_types() -> None:
    with pytest.raises(ValueError, match="the option 1 must be text"):
        PartConfig.of({"name": "learned", 1: 2}, "scorer")
    with pytest.raises(ValueError, match=r"name = 3 must be text"):
        StageConfig(layer=1, name=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be one of"):
        RestoreConfig(layer=1, by=[])  # type: ignore[arg-type]
    for noise in (float("inf"), float("nan"), -1.0):
        with pytest.raises(ValueError, match=r"budget.noise = .* must be a number of at least 0"):
            BudgetConfig(noise=noise)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of a dense and of a compressed model."""
    folder = tmp_path_factory.mktemp("weights")
    config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8)
    model = ViTForImageClassification(config)
    model.save_pretrained(folder / "dense")
    laconic.compress(model, CompressionConfig([StageConfig(layer=1, keep=0.5)]))
    model.save_pretrained(folder / "compressed")
    return folder


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"architectures": [None]}, r"config.json: architectures = \[None\] must be a list"),
    ({"architectures": "ViT"}, "config.json: architectures = 'ViT'"),
    ({"architectures": {}}, "architectures = {}"),
    ({"architectures": ["os"]}, "neither transformers .* nor Laconic has"),
    ({"model_type": 1}, "config.json cannot be used|cannot be loaded"),
    ({"num_hidden_layers": 10**18}, "is larger than any model has"),
    ({"num_hidden_layers": 5}, "the weights do not fit|missing|cannot be loaded"),
    ({"hidden_size": "x"}, "config.json cannot be used"),
    ({"patch_size": 0}, "cannot be loaded: ZeroDivisionError"),
    ({"compression": 1}, "compression must be a mapping"),
    ({"compression": {"stages": [{"layer": 1, "site": []}]}}, "site = "),
]


@pytest.mark.parametrize(("changes", "message"), CONFIGS, ids=[str(item)[:40] for item, _ in CONFIGS])
def test_a_wrong_config_is_one_message_from_the_public_loader(changes: dict[str, Any], message: str, weights: Path, tmp_path: Path) -> None:
    shutil.copytree(weights / "compressed", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        laconic.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\0" * 64, b"\xff" * 64, b"{}", (40).to_bytes(8, "little") + b"x" * 40])
@pytest.mark.parametrize("kind", ["dense", "compressed"])
def test_a_damaged_file_of_weights_is_named(content: bytes, kind: str, weights: Path, tmp_path: Path) -> None:
    shutil.copytree(weights / kind, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(content)
    for read in (load_model, weights_hash, *([laconic.from_pretrained] if kind == "compressed" else [])):
        with pytest.raises(
            DamagedFile, match=r"model/model.safetensors is no safetensors file, or truncated or damaged .*get or write it again"
        ):
            read(tmp_path / "model")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("base", "x"), ("base", {}), ("base", {"name": 1, "revision": None, "weights_sha256": ""}), ("model", []), ("model", {"class": 1, "config": {}}),
        ("lora", 1), ("stages", 3), ("stages", [1]), ("modules_to_save", "x"), ("ratio", []), ("versions", None), ("files", []), ("files", {"a": 1}),
    ],
)  # fmt: skip
def test_a_manifest_of_another_form_is_refused_even_if_its_hash_is_right(key: str, value: Any, weights: Path, tmp_path: Path) -> None:
    model = laconic.compress(load_model(weights / "dense"), CompressionConfig([StageConfig(layer=1, keep=0.5)]))
    laconic.train_only(model)
    laconic.save_adapter(model, tmp_path / "adapter", weights / "dense")
    path = tmp_path / "adapter" / "manifest.json"
    manifest = {**json.loads(path.read_text()), key: value}
    path.write_bytes(json_bytes({**manifest, "sha256": seal(manifest)}))
    with pytest.raises(AdapterError, match="manifest.json"):
        read_adapter(tmp_path / "adapter")


def test_sizes_in_a_config_inside_another_are_read_too() -> None:
    from transformers import CLIPConfig

    config = CLIPConfig(vision_config={"num_hidden_layers": 2**40})
    with pytest.raises(DamagedFile, match=r"here: vision_config: num_hidden_layers = 1099511627776 is larger than any model has"):
        check_size(config, "here")


@pytest.mark.parametrize("error", [PermissionError("no"), IsADirectoryError("x"), MemoryError(), ValueError("x"), ImportError("x")])
def test_the_commands_end_with_2_and_one_message(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, user_input():
        raise error
    assert ended.value.exit_code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
