"""Damaged adapter folders: each kind of damage has its own message, none is loaded in part, and nothing in a folder is ever run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from laconic import Adapters, from_pretrained
from laconic.modules.checkpoints.adapter_folder import AdapterError, json_bytes, read_adapter, seal, write_adapter
from laconic.modules.checkpoints.adapter_saving import adapter_of
from laconic.modules.checkpoints.base_weights import Base
from tests.matrix import images
from tests.modules.adapted import adapted, adapter_folder, base_folder

Damage = Callable[[Path], None]
LORA, LORA_CONFIG = "adapter_model.safetensors", "adapter_config.json"
STAGES, STAGES_CONFIG = "compression.safetensors", "compression_config.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``base``, ``other`` of the same shapes, ``wide`` of others, and an ``adapter`` on the base."""
    folder = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    base_folder(folder / "base")
    base_folder(folder / "other", initializer_range=0.2)
    base_folder(folder / "wide", hidden_size=32)
    adapter_folder(folder / "adapter", folder / "base")
    return folder


def _missing(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def _truncated(name: str) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-7])


def _altered(name: str) -> Damage:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[-2] ^= 1
        (folder / name).write_bytes(content)

    return damage


def _longer(name: str) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + b" ")


def _manifest(change: Callable[[dict[str, Any]], Any], sealed: bool = True) -> Damage:
    """A changed manifest; sealed as if it had been written so."""

    def damage(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        if sealed:
            manifest["sha256"] = seal(manifest)
        (folder / "manifest.json").write_bytes(json_bytes(manifest))

    return damage


def _consistent(name: str, content: Callable[[Path], bytes]) -> Damage:
    """Another content of a file, with size and hash in the manifest to match: what only a look inside can tell."""

    def damage(folder: Path) -> None:
        import hashlib

        data = content(folder / name)
        (folder / name).write_bytes(data)
        _manifest(lambda manifest: manifest["files"].update({name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}))(
            folder
        )

    return damage


def _config(name: str, change: Callable[[dict[str, Any]], Any]) -> Damage:
    def content(path: Path) -> bytes:
        data = json.loads(path.read_text())
        change(data)
        return json_bytes(data)

    return _consistent(name, content)


def _tensors(name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def content(path: Path) -> bytes:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        return path.read_bytes()

    return _consistent(name, content)


def _first(tensors: dict[str, torch.Tensor], part: str) -> str:
    return next(name for name in sorted(tensors) if part in name)


def _base(name: str) -> Damage:
    return _manifest(lambda manifest: manifest["base"].update(name=str(Path(manifest["base"]["name"]).parent / name)))


DAMAGES: dict[str, tuple[Damage, str]] = {
    "manifest missing": (_missing("manifest.json"), r"has no manifest.json: it is an adapter of plain PEFT, without routers; load it with PEFT"),
    "manifest truncated": (_truncated("manifest.json"), r"manifest.json is not JSON, or truncated"),
    "manifest altered": (_manifest(lambda m: m["base"].update(name="x"), sealed=False), r"manifest.json was altered after it was written"),
    "manifest of another format": (_manifest(lambda m: m.update(format="laconic-adapter-9")), r"its format is 'laconic-adapter-9', .*reads 'laconic-adapter-1'"),
    "manifest without a base": (_manifest(lambda m: m.pop("base")), r"manifest.json lacks 'base'"),
    "manifest is a list": (lambda folder: (folder / "manifest.json").write_text("[]") and None, r"manifest.json must hold an object, it holds list"),
    "LoRA missing": (_missing(LORA), r"adapter_model.safetensors is missing: get the folder again"),
    "LoRA's config missing": (_missing(LORA_CONFIG), r"adapter_config.json is missing"),
    "routers missing": (_missing(STAGES), r"compression.safetensors is missing"),
    "stages missing": (_missing(STAGES_CONFIG), r"compression_config.json is missing"),
    "LoRA truncated": (_truncated(LORA), r"adapter_model.safetensors is truncated: \d+ bytes of \d+"),
    "routers truncated": (_truncated(STAGES), r"compression.safetensors is truncated"),
    "LoRA altered": (_altered(LORA), r"adapter_model.safetensors was altered: its SHA-256"),
    "routers altered": (_altered(STAGES), r"compression.safetensors was altered"),
    "LoRA's config altered": (_altered(LORA_CONFIG), r"adapter_config.json was altered"),
    "stages longer": (_longer(STAGES_CONFIG), r"compression_config.json is longer than it was written"),
    "without routers": (_manifest(lambda m: m["files"].pop(STAGES)), r"was trained with stages before_1, before_2 and holds no routers: compression.safetensors"),
    "LoRA not named": (_manifest(lambda m: m["files"].pop(LORA)), r"manifest.json does not list adapter_model.safetensors"),
    "a file outside": (_manifest(lambda m: m["files"].update({"../base/model.safetensors": {}})), r"names '../base/model.safetensors', which is no file of an adapter"),
    "a LoRA tensor missing": (_tensors(LORA, lambda t: t.pop(_first(t, "lora_A"))), r"LoRA lacks 1 tensor\(s\): base_model.model.vit.layers.0.attention.k_proj.lora_A"),
    "a LoRA tensor too many": (_tensors(LORA, lambda t: t.update({"base_model.model.vit.more.lora_A.weight": torch.ones(2)})), r"LoRA has, and the model has not, 1 tensor"),
    "a LoRA tensor of another shape": (_tensors(LORA, lambda t: t.update({_first(t, "lora_B"): torch.ones(3, 2)})), r"LoRA: .*lora_B.weight is \(3, 2\), the model's \(16, 2\)"),
    "a LoRA tensor not gathered": (_tensors(LORA, lambda t: t.update({_first(t, "lora_B"): torch.empty(0)})), r"lora_B.weight is empty, like a sharded parameter that was not gathered"),
    "LoRA not finite": (_tensors(LORA, lambda t: t[_first(t, "lora_B")].fill_(float("nan"))), r"lora_B.weight holds values that are not finite"),
    "a router tensor missing": (_tensors(STAGES, lambda t: t.pop(_first(t, "score.weight"))), r"routers lacks 1 tensor\(s\): vit.layers.1.stages.before.scorer.score.weight"),
    "a router tensor of another shape": (_tensors(STAGES, lambda t: t.update({_first(t, "score.weight"): torch.ones(1, 3)})), r"routers: .*score.weight is \(1, 3\)"),
    "all router tensors gone": (_tensors(STAGES, lambda t: t.clear()), r"routers lacks \d\d tensor\(s\)"),
    "the head's tensors gone": (_tensors(LORA, lambda t: [t.pop(name) for name in list(t) if "classifier" in name]), r"modules trained in full lacks 2 tensor"),
    "no safetensors": (_consistent(LORA, lambda path: b"\x80\x04 pickle, as it happens"), r"adapter_model.safetensors is no safetensors file"),
    "another rank": (_config(LORA_CONFIG, lambda c: c.update(r=3)), r"LoRA: .*lora_[AB].weight is \(.*\), the model's"),
    "another method of PEFT": (_config(LORA_CONFIG, lambda c: c.update(peft_type="IA3")), r"peft_type is 'IA3', Laconic reads 'LORA'"),
    "a setting that is not read": (_config(LORA_CONFIG, lambda c: c.update(bias="all")), r"bias = 'all' is not supported here"),
    "targets in routers": (_config(LORA_CONFIG, lambda c: c.update(target_modules=["local_global"])), r"they are parts of routers, which train in full"),
    "an unknown scorer": (_config(STAGES_CONFIG, lambda c: c["stages"][0].update(scorer={"name": "lerned"})), r"scorer 'lerned' does not exist"),
    "a layer that is not there": (_config(STAGES_CONFIG, lambda c: c["stages"][0].update(layer=9)), r"layer = 9 must be an integer from 0 to 3"),
    "an unknown class": (_manifest(lambda m: m["model"].update({"class": "pipeline"})), r"names the architecture 'pipeline', which neither transformers"),
    "an unknown family": (_manifest(lambda m: m["model"]["config"].update(model_type="vitt")), r"model_type 'vitt' is unknown"),
    "base of other weights": (_base("other"), r"other' is another base than the adapter .* their weights differ"),
    "base of other shapes": (_base("wide"), r"wide' is another base than the adapter"),
    "base gone": (_base("nowhere"), r"the base of the adapter .* cannot be had: .*nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_folder_says_what_is_wrong_with_it_and_is_not_loaded(damage: str, good: Path, tmp_path: Path) -> None:
    act, message = DAMAGES[damage]
    shutil.copytree(good / "adapter", tmp_path / "adapter")
    act(tmp_path / "adapter")
    with pytest.raises((AdapterError, ValueError), match=message):
        from_pretrained(tmp_path / "adapter")


def test_damages_have_messages_of_their_own(good: Path, tmp_path: Path) -> None:
    messages = {}
    for index, (damage, (act, _)) in enumerate(DAMAGES.items()):
        shutil.copytree(good / "adapter", tmp_path / str(index))
        act(tmp_path / str(index))
        with pytest.raises(ValueError) as told:  # noqa: PT011 - the messages themselves are compared
            from_pretrained(tmp_path / str(index))
        messages[damage] = str(told.value).replace(str(tmp_path / str(index)), "FOLDER")
    assert len(DAMAGES) >= 20
    assert len(set(messages.values())) == len(DAMAGES)


def test_a_damaged_second_adapter_leaves_the_first_as_it_was(good: Path, tmp_path: Path) -> None:
    adapters = Adapters({"one": good / "adapter"})
    before = {name: value.clone() for name, value in adapters.model.state_dict().items()}
    for index, damage in enumerate(("a LoRA tensor of another shape", "a router tensor missing", "another rank", "routers altered")):
        shutil.copytree(good / "adapter", tmp_path / str(index))
        DAMAGES[damage][0](tmp_path / str(index))
        with pytest.raises(AdapterError):
            adapters.add("two", tmp_path / str(index))
    after = adapters.model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert adapters.names == ["one"]


class _Bomb:
    """Runs when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin", "training_args.pt", "weights.pkl", "modeling.py"])
def test_a_planted_pickle_or_script_is_named_and_never_run(name: str, good: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    shutil.copytree(good / "adapter", tmp_path / "adapter")
    planted = tmp_path / "adapter" / name
    planted.write_bytes(f"import os; os.mkdir({str(mark)!r})".encode() if name.endswith(".py") else pickle.dumps(_Bomb(mark)))
    with pytest.raises(AdapterError, match=f"{name} is no part of the adapter and could run code"):
        from_pretrained(tmp_path / "adapter")
    # In place of the tensors themselves, with a hash to match.
    planted.unlink()
    _consistent(LORA, lambda path: pickle.dumps(_Bomb(mark)))(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="is no safetensors file"):
        from_pretrained(tmp_path / "adapter")
    assert not mark.exists()
    # The bomb is one: unpickling it would have left its mark.
    pickle.loads(pickle.dumps(_Bomb(mark)))
    assert mark.exists()


def test_a_base_that_is_a_pickle_is_not_read(good: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    shutil.copytree(good / "base", tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb(mark)))
    with pytest.raises(AdapterError, match=r"has no model.safetensors: .* pickles \(.bin\) are not read"):
        from_pretrained(good / "adapter", base=tmp_path / "base")
    assert not mark.exists()


MALICIOUS: dict[str, tuple[Damage, str]] = {
    "auto_map": (_manifest(lambda m: m["model"]["config"].update(auto_map={"AutoModel": "evil.Model"})), r"names code to run \(auto_map\), which Laconic never does"),
    "auto_mapping": (_config(LORA_CONFIG, lambda c: c.update(auto_mapping={"parent_library": "evil", "base_model_class": "Model"})), r"auto_mapping = .* names classes to import"),
    "megatron_core": (_config(LORA_CONFIG, lambda c: c.update(megatron_core="evil", megatron_config={"a": 1})), r"megatron_co.* names classes to import|megatron_config = .* is not supported"),
    "a class path of a scorer": (_config(STAGES_CONFIG, lambda c: c["stages"][0].update(scorer={"name": "evil.Scorer"})), r"scorer 'evil.Scorer' does not exist"),
    "a model class elsewhere": (_manifest(lambda m: m["model"].update({"class": "evil.Model"})), r"names the architecture 'evil.Model'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(MALICIOUS))
def test_a_config_that_names_code_is_refused_and_the_code_is_not_imported(
    kind: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "evil.py").write_text(f"import os; os.mkdir({str(mark)!r})")
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    act, message = MALICIOUS[kind]
    shutil.copytree(good / "adapter", tmp_path / "adapter")
    act(tmp_path / "adapter")
    with pytest.raises((AdapterError, ValueError), match=message):
        from_pretrained(tmp_path / "adapter")
    assert not mark.exists()


def test_code_that_a_base_brings_is_not_run(good: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    shutil.copytree(good / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Model"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    (tmp_path / "base" / "evil.py").write_text(f"import os; os.mkdir({str(mark)!r})")
    model = from_pretrained(good / "adapter", base=tmp_path / "base")
    with torch.no_grad():
        assert torch.equal(model(images()).logits, from_pretrained(good / "adapter")(images()).logits)
    assert not mark.exists()


def test_an_interrupted_writing_leaves_no_folder(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = adapter_of(adapted(good / "base"), Base("base", None, "0"))

    def fail(*args: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="no space left"):
            write_adapter(adapter, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    write_adapter(adapter, tmp_path / "adapter")
    assert read_adapter(tmp_path / "adapter").lora.keys() == adapter.lora.keys()
    with pytest.raises(ValueError, match="is not empty: give a new folder"):
        write_adapter(adapter, tmp_path / "adapter")
