"""Runs with LoRA: what they keep, that the weights below stay bit for bit, and that training goes on from whatever a run left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from laconic import from_pretrained, stages_of
from laconic.modules.checkpoints.base_weights import weights_hash
from laconic.modules.checkpoints.lora import is_lora
from laconic.trainer.build.build import build
from laconic.trainer.build.optimization import parameter_groups
from laconic.trainer.build.trainable import quantization
from laconic.trainer.build.validate import validate
from laconic.trainer.errors import RecipeError
from laconic.trainer.evaluate import evaluate
from laconic.trainer.export.export import export
from laconic.trainer.recipe.baselines import load_baselines
from laconic.trainer.recipe.files import load
from laconic.trainer.run import train, train_arm
from laconic.trainer.run_folder import RunFolder, load_model
from laconic.trainer.tasks.base_image import with_normalisation
from tests.trainer.conftest import QUICK
from tests.trainer.small_recipes import of_files
from tests.trainer.stopping import train_until

TINY = [item for item in QUICK if not item.startswith("model.config")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a dense run ``base`` and a run ``lora`` on it, with a checkpoint after the last of its three steps."""
    folder = tmp_path_factory.mktemp("runs")
    torch.set_num_threads(1)
    console = Console(quiet=True)
    train_arm(load("vit_lora_base", [*QUICK, f"output={folder / 'base'}"]), "dense", folder / "base", console)
    overrides = _overrides(folder, "lora", "trainer.max_steps=3")
    train(load("vit_lora", overrides), overrides, console)
    return folder


def _overrides(runs: Path, output: str, *more: str) -> list[str]:
    return [*TINY, "baselines=[]", "optimizer.warmup=0", f"model.name={runs / 'base'}", f"output={runs / output}", *more]


def _probe(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))).logits
    return logits


def test_a_run_keeps_an_adapter_and_its_base_stays_bit_for_bit(runs: Path) -> None:
    run = runs / "lora"
    assert not (run / "model").exists()
    assert {path.name for path in (run / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "compression_config.json", "compression.safetensors", "manifest.json", "hashes.json",
    }  # fmt: skip
    manifest = json.loads((run / "adapter" / "manifest.json").read_text())
    assert manifest["base"] == {
        "name": str(runs / "base" / "model"),
        "revision": None,
        "weights_sha256": weights_hash(runs / "base" / "model"),
    }
    assert manifest["modules_to_save"] == ["classifier"]
    loaded = dict(from_pretrained(run).named_parameters())
    moved = set()
    for name, value in load_model(runs / "base" / "model").named_parameters():
        trained = (
            loaded[name] if name in loaded else loaded[name.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")]
        )
        moved |= set() if torch.equal(trained, value) else {name}
    assert moved == {"classifier.weight", "classifier.bias"}
    # What trains has trained: LoRA's second halves start at zero.
    assert all(value.any() for name, value in loaded.items() if "lora_B" in name)


def test_weights_below_are_the_same_objects_values_through_a_run(runs: Path, console: Console) -> None:
    loaded = load("vit_lora", _overrides(runs, "again"))
    before = {name: value.clone() for name, value in build(loaded.recipe).model.named_parameters()}
    model = train_arm(loaded, "arm", runs / "again", console).parts.model
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    assert frozen
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed.isdisjoint(frozen)
    assert {name for name in changed if ".stages." in name} == {name for name in before if ".stages." in name}


def test_the_report_and_the_manifest_say_what_trains_and_at_which_ratio(runs: Path) -> None:
    report = json.loads((runs / "lora" / "report.json").read_text())
    groups = report["parameters"]
    assert groups.keys() == {"lora", "routers", "rest"}
    assert all(groups[name]["trainable"] == groups[name]["total"] > 0 for name in ("lora", "routers"))
    assert groups["rest"]["trainable"] == 16 * 10 + 10
    assert "trained (lora 3,584 of 3,584; routers 874 of 874; rest 170 of" in (runs / "lora" / "log.txt").read_text()
    ratio = json.loads((runs / "lora" / "adapter" / "manifest.json").read_text())["ratio"]
    assert ratio["macs_ratio"]["achieved"] == report["macs_ratio"] <= 0.5
    assert ratio["keep"] == report["keep"]
    checked = validate(load("vit_lora", _overrides(runs, "x")).recipe)
    assert checked.trainable == sum(group["trainable"] for group in groups.values())
    assert checked.parameters == sum(group["total"] for group in groups.values())


def test_checkpoints_hold_what_trains_and_no_weight_below(runs: Path) -> None:
    checkpoint = torch.load(runs / "lora" / "checkpoints" / "3.ckpt", weights_only=True)
    names = {name.removeprefix("model.") for name in checkpoint["state_dict"]}
    model = from_pretrained(runs / "lora")
    assert names == {name for name, value in model.named_parameters() if value.requires_grad} | {name for name, _ in model.named_buffers()}
    assert len(checkpoint["optimizer_states"][0]["state"]) == sum(value.requires_grad for value in model.parameters())


def test_a_resumed_run_ends_bit_for_bit_like_an_unbroken_one(runs: Path, console: Console) -> None:
    shared = _overrides(runs, "resumed", "trainer.max_steps=3", "lora.dropout=0.1")
    loaded = load("vit_lora", shared)
    train_arm(loaded, "arm", runs / "resumed", console)
    unbroken = {path.name: load_file(path) for path in (runs / "resumed" / "adapter").glob("*.safetensors")}
    shutil.rmtree(runs / "resumed")
    train_until(2, loaded, runs / "resumed", console)
    train_arm(loaded, "arm", runs / "resumed", console, resume="auto")
    for name, tensors in unbroken.items():
        resumed = load_file(runs / "resumed" / "adapter" / name)
        assert all(torch.equal(value, resumed[key]) for key, value in tensors.items())
    # Over other weights it would not be the same training.
    weights = runs / "base" / "model" / "model.safetensors"
    hashes = (runs / "base" / "model" / "hashes.json").read_bytes()
    (runs / "base" / "model" / "hashes.json").unlink()
    before, model = weights.read_bytes(), load_model(runs / "base" / "model")
    with torch.no_grad():
        model.vit.layernorm.bias += 1
    model.save_pretrained(runs / "base" / "model")
    try:
        with pytest.raises(RecipeError, match="belongs to another model, to other classes or to other frozen weights"):
            train_arm(loaded, "arm", runs / "resumed", console, resume="auto")
    finally:
        weights.write_bytes(before)
        (runs / "base" / "model" / "hashes.json").write_bytes(hashes)


@pytest.mark.usefixtures("quick_exports")
@pytest.mark.slow
def test_exports_and_evaluation_answer_like_the_run(runs: Path, tmp_path: Path, console: Console) -> None:
    run = runs / "lora"
    trained = _probe(from_pretrained(run))
    record = export(str(run), str(tmp_path / "adapter"), "adapter")
    # Against the run as it was trained, with its LoRA apart.
    assert record["max_abs_logit_diff"] == record["max_abs_reload_diff"] == 0
    assert torch.equal(_probe(from_pretrained(tmp_path / "adapter")), trained)
    export(str(run), str(tmp_path / "merged"))
    assert (_probe(from_pretrained(tmp_path / "merged")) - trained).abs().max() <= 1e-5
    targets = (str(run), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    found = [evaluate(target, RunFolder.open(target).read_recipe(), console)["variants"]["compressed"]["accuracy"] for target in targets]
    assert found[0] == found[1] == found[2] == json.loads((run / "report.json").read_text())["quality"]["compressed"]
    with pytest.raises(RecipeError, match=r"trained all weights, .*use --format merged"):
        export(str(runs / "base"), str(tmp_path / "none"), "adapter")


@pytest.mark.usefixtures("quick_exports")
@pytest.mark.slow
def test_an_adapter_that_was_trained_at_many_keeps_loads_and_is_exported_at_any(runs: Path, tmp_path: Path, console: Console) -> None:
    run = runs / "elastic"
    drawn = ["budget=null", "compression.stages.0.keep=0.5", "training_keep={lowest: 0.2, draw: reciprocal}", "trainer.max_steps=2"]
    train_arm(load("vit_lora", _overrides(runs, "elastic", *drawn)), "arm", run, console)
    fewer = from_pretrained(run, keep=0.25)
    assert not torch.equal(_probe(fewer), _probe(from_pretrained(run)))
    record = export(str(run), str(tmp_path / "adapter"), "adapter", keep=0.25)
    again = from_pretrained(tmp_path / "adapter")
    assert [stage.config.keep for stage in stages_of(again).values()] == [0.25]
    assert torch.equal(_probe(again), _probe(fewer))
    assert record["keep"] == {"before_0": {"requested": 0.25, "achieved": None}}
    # The run's figures are of the keep that it was trained at.
    assert json.loads((tmp_path / "adapter" / "manifest.json").read_text())["ratio"] == {}
    export(str(run), str(tmp_path / "merged"), keep=0.25)
    assert (_probe(from_pretrained(tmp_path / "merged")) - _probe(fewer)).abs().max() <= 1e-5


@pytest.mark.parametrize("left", ["lora", "lora/adapter", "lora/checkpoints/3.ckpt"])
def test_training_goes_on_from_a_run_an_adapter_and_a_checkpoint(left: str, runs: Path, tmp_path: Path, console: Console) -> None:
    overrides = [item for item in _overrides(runs, "x") if not item.startswith(("model.name", "output"))]
    recipe = load("vit_lora", [*overrides, f"model.name={runs / left}", f"output={tmp_path}"])
    validate(recipe.recipe)
    parts = build(recipe.recipe)
    before = from_pretrained(runs / left)
    assert torch.equal(_probe(parts.model.eval()), _probe(before))
    train_arm(recipe, "arm", tmp_path, console)
    manifest = json.loads((tmp_path / "adapter" / "manifest.json").read_text())
    assert manifest["base"]["name"] == str(runs / "base" / "model")
    assert not torch.equal(_probe(from_pretrained(tmp_path)), _probe(before))


def test_an_adapter_goes_on_as_a_whole_model_and_that_one_under_new_lora(runs: Path, tmp_path: Path, console: Console) -> None:
    overrides = [item for item in _overrides(runs, "x") if not item.startswith(("model.name", "output"))]
    whole = load("vit_lora", [*overrides, "lora=null", f"model.name={runs / 'lora'}"])
    model = build(whole.recipe).model.eval()
    assert (_probe(model) - _probe(from_pretrained(runs / "lora"))).abs().max() <= 1e-5
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(is_lora(name) for name, _ in model.named_parameters())
    train_arm(whole, "arm", tmp_path / "whole", console)
    ends = _probe(from_pretrained(tmp_path / "whole"))
    # Compressed already: its stages go on with their weights, LoRA starts neutral.
    for left in ("whole", "whole/model", "whole/checkpoints/2.ckpt"):
        mode = "lora.mode=full" if left.endswith(".ckpt") else "lora.mode=lora"
        settings = [] if mode == "lora.mode=lora" else ["lora={mode: full}"]
        again = build(load("vit_lora", [*overrides, *settings, f"model.name={tmp_path / left}"]).recipe)
        assert torch.equal(_probe(again.model.eval()), ends)
    assert torch.equal(_probe(from_pretrained(tmp_path / "whole" / "checkpoints" / "2.ckpt")), ends)


def test_routers_alone_train_on_frozen_weights(runs: Path, tmp_path: Path, console: Console) -> None:
    recipe = load("vit_lora", [*_overrides(runs, "x"), "lora.mode=routers"])
    arm = train_arm(recipe, "arm", tmp_path, console)
    trained = {name for name, value in arm.parts.model.named_parameters() if value.requires_grad}
    assert trained == {name for name, _ in arm.parts.model.named_parameters() if ".stages." in name or name.startswith("classifier")}
    assert torch.equal(_probe(from_pretrained(tmp_path)), _probe(arm.parts.model.eval()))


def test_a_head_that_the_weights_lack_trains_without_being_named(runs: Path, tmp_path: Path) -> None:
    from tests.data.folders import encoded, parquet

    data = parquet(tmp_path / "rows.parquet", [encoded(i) for i in range(32)], [i % 3 for i in range(32)])
    overrides = [*of_files(_overrides(runs, "x")), "data.name=parquet", f"data.data_files={data}", "lora.modules_to_save=[]"]
    from tests.matrix import dense

    dense("vit", image_size=32).save_pretrained(tmp_path / "vit")
    model = build(load("vit_lora", [*overrides, f"model.name={tmp_path / 'vit'}"]).recipe).model
    assert model.config.num_labels == 3
    assert {name for name, value in model.named_parameters() if value.requires_grad and not is_lora(name) and ".stages." not in name} == {
        "classifier.weight", "classifier.bias",
    }  # fmt: skip


def test_lora_routers_and_the_rest_have_their_own_rates_and_decays(runs: Path) -> None:
    rates = ["optimizer.lr=1", "optimizer.lora_lr=2", "optimizer.router_lr=3"]
    decays = ["optimizer.weight_decay=0.1", "optimizer.lora_weight_decay=0.2", "optimizer.router_weight_decay=0.3"]
    recipe = load("vit_lora", [*_overrides(runs, "x"), *rates, *decays]).recipe
    model, settings = build(recipe).model, recipe.optimizer
    groups = {
        group["name"]: (group["lr"], group["weight_decay"])
        for group in parameter_groups(
            model, settings.lr, settings.router_lr, settings.weight_decay, None, settings.lora_lr, settings.router_weight_decay, settings.lora_weight_decay
        )
    }  # fmt: skip
    assert groups["lora"] == (2, 0.2)
    assert groups["router"] == (3, 0.3)
    assert groups["backbone"] == (1, 0.1)
    assert groups["backbone_no_decay"] == (1, 0)


def test_pixels_are_normalised_as_in_the_run_that_goes_on(runs: Path, tmp_path: Path) -> None:
    recipe = (runs / "base" / "recipe.yaml").read_text()
    try:
        # As if it had been trained on images of files: the embedded digits are not normalised.
        data_of_run = {"name": "parquet", "data_files": "rows.parquet", "mean": [0.25], "std": [0.5]}
        (runs / "base" / "recipe.yaml").write_text(yaml.safe_dump({**yaml.safe_load(recipe), "data": data_of_run}))
        data = with_normalisation(load("vit_lora", _overrides(runs, "x")).recipe).data
        assert (data.mean, data.std) == ([0.25], [0.5])
    finally:
        (runs / "base" / "recipe.yaml").write_text(recipe)


def test_control_arms_have_the_same_lora(runs: Path) -> None:
    overrides = [item for item in _overrides(runs, "x") if not item.startswith("baselines")]
    dense, random = load_baselines(load("vit_lora", overrides), overrides).arms
    assert dense.recipe.compression is None
    assert dense.recipe.lora == random.recipe.lora == load("vit_lora", overrides).recipe.lora


MISTAKES = [
    (["lora.rank=3"], r"lora.rank is not a key; did you mean lora\.r"),
    (["lora.r=0"], r"lora.r = 0: input should be greater than or equal to 1"),
    (["lora.mode=qlora"], r"lora.mode = 'qlora': input should be 'routers', 'lora' or 'full'"),
    (["lora.mode=routers", "lora.r=4"], r"lora.r is a setting of LoRA, and lora.mode = 'routers' has no LoRA: remove it"),
    (["lora={mode: routers}", "compression=null", "budget=null"], r"lora.mode = 'routers' trains routers, and the recipe has no compression"),
    (["lora.targets=[qproj]"], r"lora.targets = \['qproj'\]: they match nothing"),
    (["lora.modules_to_save=[clasifier]"], r"lora.modules_to_save names 'clasifier'"),
    (["model.name=null", "model.config={model_type: vit, image_size: 32, num_channels: 1}"], r"lora.mode = 'lora' freezes the weights of model.name"),
    (["trainer.ema=0.9"], r"trainer.ema = 0.9 averages all weights, and lora.mode = 'lora'"),
    (["optimizer.layer_decay=0.9"], r"optimizer.layer_decay = 0.9 applies to a trained backbone"),
    (["lora.dora=true", "trainer.strategy=deepspeed_3"], r"lora.dora = true is not supported with deepspeed_3"),
    (["lora.quantize=4bit"], r"lora.quantize = '4bit' needs a GPU, and torch finds none"),
    (["lora.quantize=8bit"], r"lora.quantize = '8bit': input should be '4bit'"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), MISTAKES, ids=[" ".join(item) for item, _ in MISTAKES])
def test_a_mistake_names_the_key_and_the_cure(overrides: list[str], message: str, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("laconic.trainer.build.trainable.torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        validate(load("vit_lora", [*_overrides(runs, "x"), *overrides]).recipe)


CONTINUED = [
    (["lora.r=4"], r"lora.r = 4, and the adapter in model.name has 8: use the same"),
    (["lora.alpha=4"], r"lora.alpha = 4.0, and the adapter in model.name has 16"),
    (["lora.targets=[q_proj]"], r"lora.targets differ from those of the adapter in model.name, in vit.layers.0.attention.k_proj"),
    (["compression=null", "budget=null"], r"was trained with stages before_0, and the recipe has no compression"),
    (["compression.stages.0.layer=1"], r"was trained with stages before_0, and the recipe has before_1"),
    (["compression.stages.0.scorer=learned"], r"stage 'before_0': its scorer differ"),
    (["lora={mode: routers}"], r"is an adapter with LoRA, and lora.mode = 'routers' would ignore it"),
]


@pytest.mark.parametrize(("overrides", "message"), CONTINUED, ids=[" ".join(item) for item, _ in CONTINUED])
def test_going_on_otherwise_than_before_is_refused(overrides: list[str], message: str, runs: Path) -> None:
    with pytest.raises(ValueError, match=message):
        validate(load("vit_lora", [*_overrides(runs, "x"), f"model.name={runs / 'lora'}", *overrides]).recipe)


def test_quantised_weights_are_asked_for_as_qlora_has_them(monkeypatch: pytest.MonkeyPatch, runs: Path) -> None:
    monkeypatch.setattr("laconic.trainer.build.trainable.torch.cuda.current_device", lambda: 0)
    model = load_model(runs / "base" / "model")
    options = quantization(load("vit_lora", [*_overrides(runs, "x"), "lora.quantize=4bit"]).recipe.lora, type(model), model.config)
    config = options["quantization_config"]
    # A head that trains is none that can be quantised.
    assert config.llm_int8_skip_modules == ["classifier"]
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert quantization(None, type(model), model.config) == {}


def test_quantisation_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch, runs: Path) -> None:
    monkeypatch.setattr("laconic.trainer.build.trainable.torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("laconic.trainer.build.trainable.importlib.util.find_spec", lambda name: None)
    from laconic.trainer.build.trainable import check_lora

    with pytest.raises(RecipeError, match=r"the package bitsandbytes is not installed; pip install 'laconic\[quant\]'"):
        check_lora(load("vit_lora", [*_overrides(runs, "x"), "lora.quantize=4bit"]).recipe)


def test_a_malicious_checkpoint_is_not_run(tmp_path: Path, runs: Path) -> None:
    import os
    import pickle

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"laconic": Bomb(), "state_dict": {}}, tmp_path / "evil.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Bomb()))
    for name in ("evil.ckpt", "plain.ckpt"):
        with pytest.raises(ValueError, match="is no training checkpoint of Laconic"):
            from_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match="is no training checkpoint of Laconic"):
            validate(load("vit_lora", [*_overrides(runs, "x"), f"model.name={tmp_path / name}"]).recipe)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("quick_exports")
def test_a_language_model_s_adapter_has_its_tokenizer_and_goes_on(tmp_path: Path, console: Console) -> None:
    small = ["data.sequence_length=64", "data.train_samples=6", "data.eval_samples=2", "data.batch_size=2", "baselines=[]"]
    small += ["trainer.max_steps=2", "trainer.bench_rounds=0", "trainer.log_every=1"]
    model = [item for item in QUICK if item.startswith("model.config") and "num_hidden_layers" not in item]
    train_arm(load("llm_pretrain_dense", [*small, *model, "model.config.vocab_size=400"]), "dense", tmp_path / "base", console)
    overrides = [*small, "model.config=null", f"model.name={tmp_path / 'base'}", "lora={r: 2}", "budget.target=0.8"]
    arm = train_arm(load("llm_pretrain", overrides), "arm", tmp_path / "run", console)
    assert {path.name for path in (tmp_path / "run" / "adapter").iterdir()} >= {"tokenizer.json", "tokenizer_config.json", "manifest.json"}
    tokens = torch.randint(400, (2, 16))
    with torch.no_grad():
        logits = arm.parts.model.eval()(tokens).logits
        assert torch.equal(from_pretrained(tmp_path / "run")(tokens).logits, logits)
    record = export(str(tmp_path / "run"), str(tmp_path / "export"), "adapter")
    assert record["max_abs_logit_diff"] <= 1e-5
    assert (tmp_path / "export" / "tokenizer.json").is_file()
    again = [item for item in overrides if not item.startswith("model.name")]
    parts = build(load("llm_pretrain", [*again, f"model.name={tmp_path / 'export'}"]).recipe)
    with torch.no_grad():
        assert torch.equal(parts.model.eval()(tokens).logits, logits)
