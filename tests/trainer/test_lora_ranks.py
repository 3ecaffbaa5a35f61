"""LoRA on two processes: every strategy writes whole adapters, leaves the weights below alone, and is left again for another."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from laconic import Trace, from_pretrained, merge_lora
from laconic.modules.checkpoints.base_weights import weights_hash
from laconic.trainer.build.build import build
from laconic.trainer.errors import RecipeError
from laconic.trainer.export.export import export
from laconic.trainer.recipe.files import load
from laconic.trainer.run import train_arm
from laconic.trainer.run_folder import load_model
from tests.trainer.export_runs import WITHOUT_LACONIC, machine_without_laconic
from tests.trainer.test_strategies import scalars
from tests.trainer.two_ranks_lora import LANGUAGE, SHARED, STRATEGIES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(two_processes: Path) -> Path:
    """Folder of what two processes did, and one process beside them."""
    folder = two_processes / "lora"
    torch.set_num_threads(1)
    one = load("vit_lora", [*SHARED, "data.batch_size=16", f"model.name={folder / 'base'}"])
    train_arm(one, "arm", folder / "one", Console(quiet=True))
    return folder


def _adapter(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_the_adapter_holds_every_tensor_once_with_its_true_shape(name: str, ranks: Path) -> None:
    expected = build(load("vit_lora", [*SHARED, f"model.name={ranks / 'base'}"]).recipe).model
    routers = load_file(ranks / name / "adapter" / "compression.safetensors")
    assert {key: value.shape for key, value in routers.items()} == {
        key: value.shape for key, value in expected.state_dict().items() if ".stages." in key
    }
    whole = load_file(ranks / name / "adapter" / "adapter_model.safetensors")
    trained = [key for key, value in expected.named_parameters() if value.requires_grad and ".stages." not in key]
    assert len(whole) == len(trained)
    assert all(value.any() for key, value in whole.items() if "lora_B" in key)


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_two_processes_learn_what_one_does_and_resume_bit_for_bit(name: str, ranks: Path) -> None:
    differences = [abs(a - b) for a, b in zip(*(scalars(ranks / run) for run in (name, "one")), strict=True)]
    print(f"{name}: losses differ by {differences}")
    assert differences[0] < 1e-6
    # Without a warm-up Adam's first step is the sign of each gradient, also of those that are rounding.
    assert max(differences) < 1e-3
    ours, alike = _adapter(ranks / name / "adapter"), _adapter(ranks / "plain" / "adapter")
    torch.testing.assert_close(ours, alike, rtol=0, atol=1e-5)
    unbroken = _adapter(ranks / name / "unbroken")
    assert all(torch.equal(value, ours[key]) for key, value in unbroken.items())


def test_the_weights_below_are_bit_for_bit_those_of_before(ranks: Path) -> None:
    assert weights_hash(ranks / "base" / "model") == (ranks / "hash.txt").read_text()
    base = dict(load_model(ranks / "base" / "model").named_parameters())
    for name in STRATEGIES:
        manifest = json.loads((ranks / name / "adapter" / "manifest.json").read_text())
        assert manifest["base"]["weights_sha256"] == (ranks / "hash.txt").read_text()
        loaded = {key.replace(".base_layer", ""): value for key, value in from_pretrained(ranks / name).named_parameters()}
        assert all(torch.equal(value, loaded[key]) for key, value in base.items() if "classifier" not in key)


@pytest.mark.parametrize("name", ["deepspeed_1", "deepspeed_2", "deepspeed_3"])
def test_a_checkpoint_of_pieces_holds_what_trains_whole_and_without_pickle(name: str, ranks: Path) -> None:
    last = max((ranks / name / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    there, final = _adapter(last / "adapter"), _adapter(ranks / name / "adapter")
    assert there.keys() == final.keys()
    assert {key: value.shape for key, value in there.items()} == {key: value.shape for key, value in final.items()}
    assert from_pretrained(last) is not None
    # DeepSpeed's own part holds no frozen weight either.
    state = torch.load(next(last.rglob("*mp_rank_00_model_states.pt")), weights_only=False)["module"]
    assert not [key for key in state if "embeddings" in key]


def test_what_two_processes_trained_merges_and_saves_on_one(ranks: Path, tmp_path: Path) -> None:
    probe = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        trained = from_pretrained(ranks / "deepspeed_3")
        expected = trained(probe).logits
        merge_lora(trained).save_pretrained(tmp_path / "merged")
        assert (from_pretrained(tmp_path / "merged")(probe).logits - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["deepspeed_1", "deepspeed_3"])
def test_another_number_of_processes_is_refused_naming_both_and_its_weights_alone_go_on(name: str, ranks: Path, tmp_path: Path) -> None:
    console = Console(quiet=True)
    alone = [*SHARED, *STRATEGIES[name], "trainer.checkpoint_every=2", f"model.name={ranks / 'base'}"]
    with pytest.raises(
        RecipeError, match=r"trained by 2 process\(es\), now there are 1; .* its weights with a new optimizer: model.name=(\S+) and"
    ) as told:
        train_arm(load("vit_lora", alone), "arm", ranks / name, console, resume="auto")
    offered = str(told.value).split("model.name=")[1].split(" ")[0]
    again = load("vit_lora", [*SHARED, f"model.name={offered}", f"output={tmp_path}"])
    model = build(again.recipe).model
    with torch.no_grad():
        probe = torch.rand(4, 1, 32, 32)
        assert torch.equal(model.eval()(probe).logits, from_pretrained(offered)(probe).logits)
    train_arm(again, "arm", tmp_path, console)
    assert (tmp_path / "adapter" / "manifest.json").is_file()


def test_tied_and_frozen_weights_in_pieces_are_saved_whole_and_a_missing_piece_is_loud(ranks: Path) -> None:
    said, *names = json.loads((ranks / "results.json").read_text())["tied"]
    assert said.startswith("the model could not be gathered whole, and was not saved: ")
    assert "model.embed_tokens.weight (32, 16) → (0,)" in said
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(names)
    found, expected = (load_file(ranks / "tied" / name / "model.safetensors") for name in ("model", "expected"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert "lm_head.weight" not in found


# On the machine without Laconic: logits of the rows that are given, and for a text what is generated behind them.
_WITHOUT = (
    WITHOUT_LACONIC
    + """
from transformers import AutoModelForCausalLM, AutoModelForImageClassification
inputs = load_file("inputs.safetensors")
loader = AutoModelForCausalLM if "input_ids" in inputs else AutoModelForImageClassification
answers = {}
with torch.no_grad():
    for name in sys.argv[1:]:
        model = loader.from_pretrained(name, trust_remote_code=True).eval()
        answers[f"{name} logits"] = model(**inputs).logits
        if "input_ids" in inputs:
            answers[f"{name} generated"] = model.generate(**inputs, max_new_tokens=8, do_sample=False)
save_file({name: value.contiguous() for name, value in answers.items()}, "answers.safetensors")
"""
)


@pytest.mark.usefixtures("quick_exports")
@pytest.mark.parametrize("kind", ["", "text_"], ids=["vit", "llm"])
def test_the_round_trip(kind: str, ranks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense, then LoRA and routers on two processes, adapter, merged, and standalone where there is no Laconic."""
    monkeypatch.chdir(tmp_path)
    if kind:
        rows = torch.randint(3, 256, (8, 12), generator=torch.Generator().manual_seed(0))
        # Prompts of different lengths, padded on the left.
        mask = torch.arange(12)[None] >= torch.arange(8)[:, None]
        inputs = {"input_ids": rows, "attention_mask": mask.long()}
    else:
        inputs = {"pixel_values": torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))}
    expected: dict[str, torch.Tensor] = {}
    for name in LANGUAGE:
        run = ranks / f"{kind}{name}"
        # What the checkpoint of the last step holds is what was trained.
        trained, adapter = from_pretrained(run / "checkpoints" / "4.ckpt"), from_pretrained(run)
        # Every export is verified in a process of its own, which takes a while: all forms of one strategy.
        forms = ("adapter", "merged", "standalone") if name == "deepspeed_3" else ("standalone",)
        assert all(export(str(run), f"{name}_{form}", form)["max_abs_logit_diff"] <= 1e-5 for form in forms)
        again = from_pretrained(tmp_path / f"{name}_adapter" if "adapter" in forms else run / "adapter")
        merged = from_pretrained(tmp_path / f"{name}_merged") if "merged" in forms else merge_lora(from_pretrained(run))
        with torch.no_grad():
            logits = trained(**inputs).logits
            assert all(torch.equal(model(**inputs).logits, logits) for model in (adapter, again))
            expected[f"{name}_standalone logits"] = merged(**inputs).logits
            assert (expected[f"{name}_standalone logits"] - logits).abs().max() <= 1e-5
            if kind:
                assert {float(routing) < 1 for routing in _shares(merged, inputs)} == {True}
                expected[f"{name}_standalone generated"] = merged.generate(**inputs, max_new_tokens=8, do_sample=False)
    save_file(inputs, "inputs.safetensors")
    places = [f"{name}_standalone" for name in LANGUAGE]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    python = machine_without_laconic(tmp_path / "bare")
    done = subprocess.run([python, "-c", _WITHOUT, *places], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    answers = load_file("answers.safetensors")
    assert answers.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(answers[name], values, rtol=0, atol=0 if "generated" in name else 1e-5)


def _shares(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> list[float]:
    """Of the tokens at every stage, how many went through."""
    trace = Trace()
    model(**inputs, trace=trace)
    return [float(routing.kept_mask.float().mean()) for routing in trace.routings.values()]
