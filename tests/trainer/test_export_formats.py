"""Exports: each loads where it should, answers as what was trained, says what it holds, and is refused where it cannot be."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, PreTrainedModel, ViTForImageClassification
from typer.testing import CliRunner

import laconic
from laconic import CompressionConfig, StageConfig, compress
from laconic.data.images.transform import ImageTransform
from laconic.modules.checkpoints.whole_files import DamagedFile
from laconic.modules.tokens.gather import sum_into
from laconic.trainer.cli.app import app
from laconic.trainer.errors import RecipeError
from laconic.trainer.export import export as exporting
from laconic.trainer.export.base import names
from laconic.trainer.export.capture import captured
from laconic.trainer.export.export import export
from laconic.trainer.export.preprocessing import image_processor
from laconic.trainer.export.source import ExportSource, Settings
from laconic.trainer.recipe.files import load
from laconic.trainer.run_folder import load_model
from tests.matrix import METHODS, compressed, decoders, dense, images
from tests.trainer.export_runs import WITHOUT_LACONIC, machine_without_laconic, written_run
from tests.trainer.hub_stand_in import hub

DOCS = Path(__file__).parents[2] / "docs" / "exporting.md"
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")), reason="pip install 'laconic[onnx]'"
)


def _model() -> PreTrainedModel:
    """A router that reads pixels, a token fused from the rest, and pairs that are merged, all with static counts."""
    stages = [
        StageConfig(layer=1, scorer={"name": "evidence", "reads": "pixels"}, merger="fuse", keep=0.6),
        StageConfig(layer=2, site="between", scorer="bipartite", merger="bipartite", keep=0.7),
    ]
    model = compress(dense("vit", num_hidden_layers=3), CompressionConfig(stages))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".stages." in name and parameter.ndim > 1:
                parameter.normal_(0, 0.5)
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written_run(tmp_path_factory.mktemp("export") / "run", _model())


def _documented(kind: str) -> str:
    """The Python that the documentation gives for a format."""
    return next(block for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL) if block.startswith(f"# {kind}"))


# Runs on the machine without Laconic: by the documentation and by the model card, by its name on the hub, and saved once more.
_WITHOUT = (
    WITHOUT_LACONIC
    + """
from transformers import AutoModel, AutoModelForImageClassification
documented, card = sys.argv[1:]
pixel_values = load_file("batch.safetensors")["pixel_values"]
found = {}
with torch.no_grad():
    exec(documented)
    found["documented"] = logits
    exec(card.replace('folder = "."', 'folder = "out/standalone"'))
    model.save_pretrained("again")
    for name, place in (("hub", "me/model"), ("again", "again")):
        found[name] = AutoModelForImageClassification.from_pretrained(place, trust_remote_code=True)(pixel_values).logits
    base = AutoModel.from_pretrained("out/standalone", trust_remote_code=True)
    found["base"], found["base_expected"] = (one(pixel_values).last_hidden_state for one in (base, model.vit))
save_file({name: value.contiguous() for name, value in found.items()}, "answers.safetensors")
"""
)


@pytest.mark.slow
def test_a_machine_without_laconic_loads_a_standalone_export_from_a_folder_and_from_the_hub(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with hub() as remote:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", remote.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "nobody's")
        record = export(str(run), "out/standalone", "standalone", Settings(shard_size="10KB"), push="me/model")
        assert record["pushed"].startswith(remote.url)
        assert [(made["name"], made["visibility"] if "visibility" in made else made["private"]) for made in remote.created] in (
            [("model", "private")],
            [("model", True)],
        )
        folder = tmp_path / "out" / "standalone"
        assert remote.files == {path.name: path.read_bytes() for path in folder.iterdir()}
        assert len(list(folder.glob("model-*.safetensors"))) > 1
        save_file({"pixel_values": images(8)}, "batch.safetensors")
        card = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[0]
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "HF_HUB_OFFLINE")}
        environment |= {"HF_ENDPOINT": remote.url, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        python = machine_without_laconic(tmp_path / "bare")
        done = subprocess.run(
            [python, "-c", _WITHOUT, _documented("standalone"), card], capture_output=True, text=True, check=False, env=environment
        )
        assert done.returncode == 0, done.stderr
    answers = load_file("answers.safetensors")
    with torch.no_grad():
        merged = laconic.from_pretrained(run / "model")(images(8)).logits
    for name in ("documented", "hub", "again"):
        torch.testing.assert_close(answers[name], merged, rtol=0, atol=1e-5)
    assert answers["base"].shape[1] < 37
    torch.testing.assert_close(answers["base"], answers["base_expected"], rtol=0, atol=1e-5)


@pytest.mark.usefixtures("quick_exports")
@pytest.mark.parametrize("name", ["predictor", pytest.param("gate", marks=pytest.mark.slow)])
def test_a_language_model_with_routers_generates_the_same_without_laconic(tmp_path: Path, name: str) -> None:
    method = next(item for item in decoders.METHODS if item.name == name)
    model = decoders.compressed("llama", method, 0.5, 0.5)
    run = written_run(tmp_path / "run", model, "llm_pretrain")
    record = export(str(run), str(tmp_path / "out"), "standalone")
    assert record["generation_equal"] is True
    assert record["max_abs_logit_diff"] <= 1e-5
    for form in ("plain", "onnx", "torch-export"):
        with pytest.raises(RecipeError, match=f"--format {form}: .*stage|--format {form}: around_1 keeps|onnx needs"):
            export(str(run), str(tmp_path / "other"), form)


@pytest.mark.slow
def test_plain_is_the_backbone_where_every_token_passes_and_its_record_is_true(tmp_path: Path) -> None:
    config = CompressionConfig([StageConfig(layer=1, site="around", scorer="random", keep=1.0), StageConfig(layer=2, keep=1.0)])
    run = written_run(tmp_path / "run", compress(dense("vit"), config))
    record = export(str(run), str(tmp_path / "out"), "plain", Settings("bf16"))
    folder = tmp_path / "out"
    assert json.loads((folder / "export.json").read_text()) == json.loads(json.dumps(record))
    assert {path.name for path in folder.iterdir()} - {"export.json", "README.md"} == record["files"].keys()
    for name, told in record["files"].items():
        content = (folder / name).read_bytes()
        assert told == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert record["max_abs_reload_diff"] <= 1e-5 < record["max_abs_logit_diff"]
    assert (record["dtype"], record["batch_sizes"], record["generation_equal"]) == ("bf16", [8, 1], None)
    plain, report = ViTForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert plain.dtype == torch.bfloat16
    assert not hasattr(plain.config, "compression")
    assert json.loads((run / "report.json").read_text())["export"] == {
        key: record[key] for key in ("format", "dtype", "max_abs_logit_diff")
    }


@pytest.mark.slow
@needs_onnx
def test_onnx_agrees_for_any_number_of_rows_without_a_scatter_that_reduces(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx

    monkeypatch.chdir(tmp_path)
    record = export(str(run), "out/onnx", "onnx")
    assert record["max_abs_logit_diff"] <= 1e-4
    nodes = onnx.load("out/onnx/model.onnx").graph.node
    reductions = {
        attribute.s for node in nodes if "Scatter" in node.op_type for attribute in node.attribute if attribute.name == "reduction"
    }
    assert reductions <= {b"none"}
    for rows in (1, 3, 8):
        scope: dict[str, Any] = {"pixel_values": images(rows).numpy()}
        exec(_documented("onnx"), scope)
        with torch.no_grad():
            np.testing.assert_allclose(scope["logits"], load_model(run / "model")(images(rows)).logits.numpy(), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_torch_export_agrees_for_any_number_of_rows_and_holds_no_pickle(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert export(str(run), "out/torch-export", "torch-export")["max_abs_logit_diff"] <= 1e-5
    with zipfile.ZipFile("out/torch-export/model.pt2") as archive:
        # A pickle of protocol 2 or later begins so, and torch's own files are archives in the archive.
        assert not [name for name in archive.namelist() if archive.read(name)[:2] in (b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK")]
    for rows in (1, 3, 8):
        scope: dict[str, Any] = {"pixel_values": images(rows)}
        exec(_documented("torch-export"), scope)
        with torch.no_grad():
            torch.testing.assert_close(scope["logits"], load_model(run / "model")(images(rows)).logits, rtol=0, atol=1e-5)


def _shallow(name: str) -> PreTrainedModel:
    return compressed("vit", next(method for method in METHODS if method.name == name), 0.6, num_hidden_layers=2)


@pytest.mark.parametrize("name", [pytest.param("squeeze", marks=pytest.mark.slow), "around_mlp"])
def test_graphs_of_methods_have_no_scatter_that_reduces(name: str) -> None:
    model = _shallow(name)
    with torch.no_grad():
        expected = model(images(2)).logits
    program = captured(model, {"pixel_values": images(4)})
    torch.testing.assert_close(program.module()(pixel_values=images(2)), expected, rtol=0, atol=1e-5)


def test_a_graph_with_a_scatter_that_reduces_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: False)
    with pytest.raises(RuntimeError, match=r"a scatter with a reduction: .*aten.scatter_add"):
        captured(_shallow("squeeze"), {"pixel_values": images(4)})


def test_adding_up_in_slots_is_the_same_sum_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    values, into = torch.randn(3, 7, 5), torch.randint(0, 7, (3, 7))
    scattered = sum_into(values, into)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    torch.testing.assert_close(sum_into(values, into), scattered)


def test_an_export_that_answers_otherwise_fails_and_has_no_record(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(form: Any, folder: Path, batches: list[dict[str, torch.Tensor]], new_tokens: int) -> list[dict[str, torch.Tensor]]:
        with torch.no_grad():
            return [{"logits": load_model(folder)(**batch).logits + 1e-3} for batch in batches]

    monkeypatch.setattr(exporting, "clean_answers", wrong)
    message = "out was not written: the reloaded export gives other answers, its logits differ by 1.00e-03, allowed"
    with pytest.raises(RuntimeError, match=message):
        export(str(run), str(tmp_path / "out"), push="me/model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("size", "passes"), [(11.0, True), (0.2, False)])
def test_answers_are_compared_relative_to_the_size_of_the_logits(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: float, passes: bool
) -> None:
    """A difference of 1.24e-5 is rounding on logits of size 11, and wrong weights on logits of size 0.2."""
    expected = [{"logits": torch.linspace(-size, size, rows * 10).view(rows, 10)} for rows in (8, 1)]
    monkeypatch.setattr(exporting, "answers", lambda model, batches: expected)
    monkeypatch.setattr(exporting, "clean_answers", lambda *_: [{"logits": answer["logits"] + 1.24e-5} for answer in expected])
    if passes:
        assert export(str(run), str(tmp_path / "out"))["max_abs_reload_diff"] == pytest.approx(1.24e-5, rel=0.1)
    else:
        with pytest.raises(RuntimeError, match=r"its logits differ by 1.24e-05, allowed 2e-06"):
            export(str(run), str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "onx"], f"--format onx does not exist: the formats are {', '.join(names())}"),
        (["--format", "plain"], "before_1 keeps 0.611 of its tokens, between_2 keeps 0.682 of its tokens in evaluation"),
        (["--dtype", "int8"], "--dtype int8 does not exist: the dtypes are fp32, bf16, fp16"),
        (["--format", "onnx", "--dtype", "bf16"], "--dtype bf16: format onnx supports fp32"),
        (["--shard-size", "5"], "--shard-size 5 must be a whole number and KB, MB or GB"),
    ],
)
def test_wrong_wishes_exit_2_with_the_reason_and_write_nothing(run: Path, tmp_path: Path, options: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["export", str(run), "--to", str(tmp_path / "out"), *options])
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()


def test_the_command_lists_the_formats_there_are() -> None:
    shown = re.sub(r"[^\w-]+", " ", CliRunner().invoke(app, ["export", "--help"], env={"COLUMNS": "200"}).stdout)
    assert all(f" {name} " in shown for name in names())


@pytest.mark.parametrize(("form", "model"), [("onnx", "adaptive"), ("torch-export", "adaptive"), ("standalone", "dense")])
def test_models_that_a_format_cannot_hold_are_refused_with_what_to_take(tmp_path: Path, form: str, model: str) -> None:
    threshold = next(method for method in METHODS if method.name == "threshold")
    run = written_run(tmp_path / "run", dense("vit") if model == "dense" else compressed("vit", threshold, 0.5, 0.6))
    message = "this model is dense.*use plain" if model == "dense" else r"before_1 \(selector 'threshold'\).*use merged or standalone"
    with pytest.raises(RecipeError, match=f"{message}|needs onnx"):
        export(str(run), str(tmp_path / "out"), form)


def test_a_missing_extra_is_named(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"--format onnx needs onnx, onnxscript, onnxruntime: pip install 'laconic\[onnx\]'"):
        export(str(run), str(tmp_path / "out"), "onnx")


def test_planted_pickles_and_code_do_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    for folder, model in (("compressed", _model()), ("dense", dense("vit"))):
        place = tmp_path / folder
        model.save_pretrained(place)
        config = json.loads((place / "config.json").read_text())
        config["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForImageClassification"), "evil.Evil")
        (place / "config.json").write_text(json.dumps(config))
        (place / "evil.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
        for name in ("pytorch_model.bin", "model.pt", "training_args.bin"):
            torch.save({"classifier.weight": Evil()}, place / name)
        load_model(place)
        (place / "model.safetensors").unlink()
        with pytest.raises((OSError, DamagedFile), match="no file named model.safetensors"):
            load_model(place)
    assert not (tmp_path / "ran").exists()


def test_the_card_says_what_was_measured_and_nothing_else(run: Path, tmp_path: Path) -> None:
    from laconic.trainer.export.base import format_named
    from laconic.trainer.export.card import facts, write_card

    source, form = ExportSource.open(str(run)), format_named("merged")
    write_card(source, form, Settings(), facts(source), form.usage(source.model), tmp_path)
    card = (tmp_path / "README.md").read_text()
    for said in (
        "| accuracy | 0.8765 on the test split |",
        "| accuracy of the dense control | 0.9000 |",
        "| keep of stage before_1 | 0.6000 requested, 0.4953 achieved |",
        "| keep of stage between_2 | 0.7000 requested, not measured |",
        "0.5120 achieved |",
        "| training step | 1.87× as fast as dense, on 2 cores |",
        "model = laconic.from_pretrained(folder)",
        "pipeline_tag: image-classification",
    ):
        assert said in card
    assert str(run) not in card
    bare = replace(source, report=None)
    write_card(bare, form, Settings(), {**facts(bare), "base_model": "someone/a-model"}, form.usage(source.model), tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "| accuracy | not measured |" in card
    # The header as the hub reads it.
    assert ModelCard(card).data.to_dict() == {
        "library_name": "transformers",
        "tags": ["laconic", "token-compression"],
        "pipeline_tag": "image-classification",
        "base_model": "someone/a-model",
    }


@pytest.mark.parametrize(
    ("size", "mode", "channels"), [((24, 24), "RGB", 3), ((60, 60), "RGB", 3), ((48, 96), "RGB", 3), ((40, 40), "L", 1)]
)
def test_the_image_processor_does_what_evaluation_does(tmp_path: Path, size: tuple[int, int], mode: str, channels: int) -> None:
    recipe = load("vit_digits", ["data.name=imagefolder", "data.data_dir=photos", "data.mean=[0.4]", "data.std=[0.3]"]).recipe
    settings = image_processor(recipe, dense("vit", num_channels=channels).config)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], channels), np.uint8)
    image = Image.fromarray(noise.squeeze(), mode)
    try:
        processor = AutoImageProcessor.from_pretrained(tmp_path)
    except ImportError:
        pytest.skip("this version of transformers reads images with torchvision alone, which is not installed")
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    ours = ImageTransform(24, channels, (0.4,) * channels, (0.3,) * channels)(image, None)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_the_digits_stay_numbers_from_0_to_1() -> None:
    assert image_processor(load("vit_digits").recipe, dense("vit", num_channels=1).config)["do_normalize"] is False
