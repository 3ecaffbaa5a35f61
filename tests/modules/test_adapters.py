"""Adapters: they answer as what was trained, plain PEFT finds all of them, and several take turns on one base."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from laconic import Adapters, add_lora, compress, from_pretrained, merge_lora, save_adapter, stages_of, train_only
from laconic.modules.checkpoints.adapter_folder import AdapterError
from laconic.modules.checkpoints.base_weights import weights_hash
from tests.matrix import BACKBONES, FAMILIES, METHODS, Method, decoders, dense, images
from tests.matrix.case import settle
from tests.modules.adapted import LEARNED, adapted, adapter_folder, base_folder

CLASSIFIERS = [family for family in BACKBONES if FAMILIES[family].architecture.endswith("ForImageClassification")]
SAVED = [method for method in METHODS if method.name in ("evidence_pixels", "random", "threshold", "around")]


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(images()).logits
    return logits


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_loaded_adapter_answers_bit_for_bit_like_what_was_trained(family: str, tmp_path: Path) -> None:
    folder, model = adapter_folder(tmp_path / "adapter", base_folder(tmp_path / "base", family))
    loaded = from_pretrained(folder)
    assert torch.equal(_logits(loaded), _logits(model))
    assert type(loaded) is type(model)
    assert not loaded.training
    flags = [{name: parameter.requires_grad for name, parameter in item.named_parameters()} for item in (model, loaded)]
    assert flags[0] == flags[1]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("module", ["lm_head", "embeddings"])
def test_tied_embeddings_trained_in_full_are_the_same_model_in_plain_peft(family: str, module: str, tmp_path: Path) -> None:
    decoders.dense(family, tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    model, plain = (AutoModelForCausalLM.from_pretrained(tmp_path / "base") for _ in range(2))
    named = {"lm_head": "lm_head", "embeddings": "wte" if family == "gpt2" else "embed_tokens"}[module]
    add_lora(model, LoraConfig(r=2, modules_to_save=[named]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    save_adapter(model.eval(), tmp_path / "adapter", tmp_path / "base")
    ours, of_peft = from_pretrained(tmp_path / "adapter"), PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    ids = decoders.tokens()
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(ours(ids).logits, expected)
        assert torch.equal(of_peft(input_ids=ids).logits, expected)
    # They train as one: one tensor, not two.
    weights = [ours.get_input_embeddings().weight, ours.get_output_embeddings().weight]
    assert weights[0] is weights[1]


@pytest.mark.parametrize("method", SAVED, ids=lambda method: method.name)
def test_routers_of_every_kind_come_back_with_their_buffers(method: Method, tmp_path: Path) -> None:
    folder, model = adapter_folder(tmp_path / "adapter", base_folder(tmp_path / "base"), method=method)
    loaded = from_pretrained(folder)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert torch.equal(_logits(loaded), _logits(model))


@pytest.mark.parametrize(
    "settings", [{}, {"use_dora": True, "use_rslora": True, "rank_pattern": {"fc1": 3}}], ids=["plain", "dora, patterns"]
)
@pytest.mark.parametrize("family", ["vit", "siglip"])
def test_plain_peft_on_the_plain_base_finds_every_tensor_by_value(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", family)
    folder, model = adapter_folder(tmp_path / "adapter", base, **settings)
    plain = AutoModelForImageClassification.from_pretrained(base)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        peft = PeftModel.from_pretrained(plain, str(folder))
    assert not [item for item in told if "adapter keys" in str(item.message)]
    written, found = load_file(folder / "adapter_model.safetensors"), get_peft_model_state_dict(peft, save_embedding_layers=False)
    assert written.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in written.items())
    # By value in the model itself too: what PEFT runs is what was trained.
    trained = dict(model.named_parameters())
    for name, parameter in peft.base_model.model.named_parameters():
        ours = name.replace("classifier.modules_to_save.default", "classifier").replace("classifier.original_module", "-")
        if "-" not in ours:
            assert torch.equal(parameter, trained[ours]), name


def test_the_folder_holds_each_router_tensor_once_and_the_manifest_says_what_it_is(tmp_path: Path) -> None:
    import json

    base = base_folder(tmp_path / "base")
    folder, model = adapter_folder(tmp_path / "adapter", base)
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "compression_config.json", "compression.safetensors", "manifest.json",
    }  # fmt: skip
    routers = load_file(folder / "compression.safetensors")
    assert routers.keys() == {name for name in model.state_dict() if ".stages." in name}
    assert not any(".stages." in name for name in load_file(folder / "adapter_model.safetensors"))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["base"] == {"name": str(base), "revision": None, "weights_sha256": weights_hash(base)}
    assert manifest["stages"] == list(stages_of(model))
    assert manifest["files"].keys() == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert manifest["versions"].keys() >= {"torch", "transformers", "peft"}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt2", "gpt_neox"])
def test_language_models_have_adapters_that_answer_generate_and_merge_alike(family: str, tmp_path: Path) -> None:
    decoders.dense(family).save_pretrained(tmp_path / "base")
    by_name = {method.name: method for method in decoders.METHODS}
    model = compress(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), by_name["predictor"].config(0.5, 0.6))
    settle(model)
    add_lora(model, LoraConfig(r=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(parameter.requires_grad * torch.randn_like(parameter) * 0.1)
    save_adapter(model.eval(), tmp_path / "adapter", tmp_path / "base")
    loaded = from_pretrained(tmp_path / "adapter")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "adapter"))
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    found = get_peft_model_state_dict(plain, save_embedding_layers=False)
    assert written.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in written.items())
    tokens = torch.randint(2, decoders.VOCABULARY, (2, 24))
    options: dict[str, Any] = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        logits, said = model(tokens).logits, model.generate(tokens, **options)
        assert torch.equal(loaded(tokens).logits, logits)
        assert torch.equal(loaded.generate(tokens, **options), said)
        merge_lora(loaded).save_pretrained(tmp_path / "merged")
        merged = from_pretrained(tmp_path / "merged")
        assert (merged(tokens).logits - logits).abs().max() <= 1e-5 * max(1.0, float(logits.abs().max()))
        assert torch.equal(merged.generate(tokens, **options), said)


def test_the_hash_of_weights_hangs_on_their_values_and_not_on_their_files(tmp_path: Path) -> None:
    model = dense("vit")
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert weights_hash(tmp_path / "whole") == weights_hash(tmp_path / "shards")
    with torch.no_grad():
        model.vit.layernorm.bias[3] += 1e-6
    model.save_pretrained(tmp_path / "other")
    assert weights_hash(tmp_path / "whole") != weights_hash(tmp_path / "other")


def test_routers_alone_are_an_adapter_too(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    model = compress(AutoModelForImageClassification.from_pretrained(base), LEARNED.config(0.5, 0.6))
    train_only(model, ["classifier"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(parameter.requires_grad * torch.randn_like(parameter))
    save_adapter(model.eval(), tmp_path / "adapter", base)
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "modules.safetensors", "compression_config.json", "compression.safetensors", "manifest.json",
    }  # fmt: skip
    assert torch.equal(_logits(from_pretrained(tmp_path / "adapter")), _logits(model))


def test_several_adapters_take_turns_on_one_base_with_their_own_stages_and_heads(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    by_name = {method.name: method for method in METHODS}
    one, first = adapter_folder(tmp_path / "one", base)
    two, second = adapter_folder(
        tmp_path / "two", base, seed=2, method=by_name["random"], layers=(0, 3), target_modules=["q_proj"], r=3, modules_to_save=None
    )
    three, third = adapter_folder(tmp_path / "three", base, seed=3, method=None, use_dora=True)
    adapters = Adapters({"one": one, "two": two})
    model = adapters.model
    adapters.add("three", three)
    assert adapters.active == "one"
    for name, trained in [("one", first), ("two", second), ("three", third), ("two", second), ("one", first)]:
        assert adapters.use(name) is model
        assert torch.equal(_logits(model), _logits(trained))
        assert list(stages_of(model)) == list(stages_of(trained))
    with pytest.raises(ValueError, match="no adapter 'four': there are one, two, three"):
        adapters.use("four")
    merged = adapters.merge()
    assert (_logits(merged) - _logits(first)).abs().max() <= 1e-5
    assert {name for name, _ in merged.named_parameters() if "lora" in name} == set()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(_logits(from_pretrained(tmp_path / "merged")), _logits(merged))


def test_an_adapter_that_does_not_fit_is_not_added_and_changes_nothing(tmp_path: Path) -> None:
    one, model = adapter_folder(tmp_path / "one", base_folder(tmp_path / "base"))
    other = base_folder(tmp_path / "other", initializer_range=0.2)
    two, _ = adapter_folder(tmp_path / "two", other)
    adapters = Adapters({"one": one})
    state = {name: value.clone() for name, value in adapters.model.state_dict().items()}
    with pytest.raises(AdapterError, match=r"was trained on '.*other' and .* on '.*base', which have other weights"):
        adapters.add("two", two)
    with pytest.raises(ValueError, match="there is an adapter 'one' already"):
        adapters.add("one", one)
    assert adapters.names == ["one"]
    assert adapters.model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in adapters.model.state_dict().items())
    assert torch.equal(_logits(adapters.model), _logits(model))


def test_another_number_of_classes_than_the_base_has_comes_with_the_adapter(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    model = AutoModelForImageClassification.from_pretrained(base, num_labels=3, ignore_mismatched_sizes=True)
    model.config.id2label = {0: "cat", 1: "dog", 2: "eel"}
    compress(model, LEARNED.config(0.5, 0.6))
    add_lora(model, LoraConfig(r=2, modules_to_save=["classifier"]))
    save_adapter(model.eval(), tmp_path / "new", base)
    old, five = adapter_folder(tmp_path / "old", base)
    adapters = Adapters({"old": old, "new": tmp_path / "new"})
    assert torch.equal(_logits(adapters.use("new")), _logits(model))
    assert adapters.model.config.id2label == {0: "cat", 1: "dog", 2: "eel"}
    assert torch.equal(_logits(adapters.use("old")), _logits(five))
    assert adapters.model.config.num_labels == 5


def test_an_adapter_of_the_hub_is_fetched_without_anything_that_could_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, model = adapter_folder(tmp_path / "adapter", base_folder(tmp_path / "base"))
    asked: dict[str, Any] = {}

    def snapshot(name: str, **kwargs: Any) -> str:
        asked.update(kwargs, name=name)
        return str(folder)

    monkeypatch.setattr("laconic.modules.checkpoints.loading.snapshot_download", snapshot)
    monkeypatch.setattr("laconic.modules.checkpoints.loading.cached_file", lambda name, file, **kwargs: str(folder / file))
    assert torch.equal(_logits(from_pretrained("somebody/adapter", revision="v1")), _logits(model))
    assert asked == {"name": "somebody/adapter", "revision": "v1", "allow_patterns": ["*.json", "*.safetensors"]}


def test_a_base_that_moved_is_told_where_it_is(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    folder, model = adapter_folder(tmp_path / "adapter", base)
    base.rename(tmp_path / "moved")
    with pytest.raises(AdapterError, match=r"the base of the adapter in .* cannot be had: .*give its place with base="):
        from_pretrained(folder)
    assert torch.equal(_logits(from_pretrained(folder, base=tmp_path / "moved")), _logits(model))


def test_a_compressed_model_that_was_loaded_dense_keeps_its_names_when_saved(tmp_path: Path) -> None:
    # transformers would file them under the names of an older version, which it does not know again for a generated class.
    model = compress(AutoModelForImageClassification.from_pretrained(base_folder(tmp_path / "base")), LEARNED.config(0.5, 0.6)).eval()
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(_logits(from_pretrained(tmp_path / "saved")), _logits(model))


def test_what_an_adapter_cannot_hold_is_not_saved_in_part(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    model = adapted(base)
    model.vit.embeddings.cls_token.requires_grad_(True)
    with pytest.raises(ValueError, match=r"vit.embeddings trains in part, which an adapter cannot hold"):
        save_adapter(model, tmp_path / "adapter", base)
    assert not (tmp_path / "adapter").exists()


def test_a_tied_embedding_that_trained_is_the_head_too_and_lora_on_it_is_refused(tmp_path: Path) -> None:
    decoders.dense("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="lora.targets names lm_head, whose weight is tied"):
        add_lora(model, LoraConfig(r=2, target_modules=["lm_head"]))
    compress(model, decoders.METHODS[1].config(0.5, 0.6))
    add_lora(model, LoraConfig(r=2, modules_to_save=["embed_tokens"]))
    with torch.no_grad():
        for stage in stages_of(model).values():
            stage.selector.set_cut(0.5)
        model.model.embed_tokens.weight.add_(torch.randn_like(model.model.embed_tokens.weight) * 0.1)
        tokens = torch.randint(2, decoders.VOCABULARY, (2, 24))
        logits = model.eval()(tokens).logits
        save_adapter(model, tmp_path / "adapter", tmp_path / "base")
        assert torch.equal(from_pretrained(tmp_path / "adapter")(tokens).logits, logits)
