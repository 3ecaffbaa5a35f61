"""Every vision-language family by the recipe for one's own chats, from a local folder as users have it."""

from __future__ import annotations

import copy
import json
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForImageTextToText
from transformers.models.smolvlm import processing_smolvlm

import laconic
from laconic import CompressionConfig, StageConfig, Trace, compress
from laconic.data.chats.encoder import ChatEncoder
from laconic.data.chats.processor import load_processor
from laconic.data.rows import collate
from laconic.modules.backbones import families
from laconic.trainer.build.chat_processor import check_processor
from laconic.trainer.distributed import collective
from laconic.trainer.evaluate import evaluate, inspect_run
from laconic.trainer.export.export import export
from laconic.trainer.losses.answer_loss import AnswerLoss, answer_loss
from laconic.trainer.recipe.files import load
from laconic.trainer.run import train
from laconic.trainer.run_folder import RunFolder
from tests.clean import CleanProcesses
from tests.matrix.processors import MADE, chat, picture, processor, save
from tests.trainer.small_recipes import of_family

# Where positions have three axes, where images have tiles, and where a row's number of images counts; the others run behind --all.
_DEFAULT = ("qwen2_5_vl", "smolvlm")
FAMILIES = [pytest.param(family, marks=[] if family in _DEFAULT else pytest.mark.slow) for family in MADE]
EXPORTED = ("qwen2_5_vl", "smolvlm")
# Its first layers need every token, also those of models that steps are compared with.
MEASURED = "qwen3_vl"
GENERATE = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A family's folder with a model and its processor, by the family's name."""
    return cache(lambda family: save(family, tmp_path_factory.mktemp("models") / family))


@pytest.fixture(scope="module")
def loaded(saved: Any) -> Any:
    """A family's processor and model, loaded, by the family's name."""
    return cache(lambda family: (load_processor(str(saved(family))), AutoModelForImageTextToText.from_pretrained(saved(family)).eval()))


def _rows(given: Any) -> list[dict[str, Any]]:
    """Two images of different sizes, one, and text alone."""
    encoder = ChatEncoder(given, 400)
    items = [encoder(row["messages"], row["images"]) for row in map(chat, range(3))]
    # As many learned tokens in no two rows.
    for number, item in enumerate(items):
        item["labels"][len(item["labels"]) - number :] = -100
    return items


def _stages(family: str, model: Any) -> Any:
    # Gemma 3 has no query of a last token.
    scorer = "pivots" if family == "gemma3" else "last_query"
    return compress(copy.deepcopy(model), CompressionConfig([StageConfig(layer=2, keep=0.5, scorer=scorer, stack="text", scope="visual")]))


def _loss(model: Any, batch: dict[str, Any]) -> AnswerLoss:
    return answer_loss(model, batch, trace=Trace())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_mixed_rows_is_its_rows_alone_and_what_the_processor_makes_of_them(family: str, loaded: Any) -> None:
    given, plain = loaded(family)
    check_processor(families()[family], plain.config, given)  # type: ignore[arg-type]
    rows, model = _rows(given), _stages(family, plain).train()
    for number, item in enumerate(rows):
        text = given.tokenizer.apply_chat_template(chat(number)["messages"], chat_template=given.chat_template, tokenize=False)
        images = chat(number)["images"]
        made = given(text=[text], images=[images], return_tensors="pt") if images else given.tokenizer([text], return_tensors="pt")
        assert torch.equal(item["input_ids"], made["input_ids"][0])
        assert given.tokenizer.decode(item["input_ids"][item["turns"] >= 0]) == "A fox slept in the yard.<|endoftext|>"
        assert all(torch.equal(value, made[name]) for name, value in item["images"].items())
    alone, mixed = [_loss(model, collate([item])) for item in rows], _loss(model, collate(rows))
    torch.testing.assert_close(mixed.total, sum(one.total for one in alone), atol=1e-4, rtol=1e-5)
    assert len(mixed.right) == sum(len(one.right) for one in alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_process_without_an_image_reads_a_blank_one_that_changes_nothing(
    family: str, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, plain = loaded(family)
    batch, model = collate(_rows(given)[2:]), _stages(family, plain).train()
    expected = _loss(model, batch).total
    monkeypatch.setattr(collective, "world_size", lambda: 2)
    found = _loss(model, batch)
    torch.testing.assert_close(found.total, expected)
    found.total.backward()
    seen = [p.grad for name, p in model.named_parameters() if "vision" in name or "visual" in name]
    assert any(gradient is not None for gradient in seen)
    assert not any(bool(gradient.any()) for gradient in seen if gradient is not None)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_is_drawn_where_the_picture_that_it_comes_from_is(family: str, loaded: Any) -> None:
    (given, model), adapter = loaded(family), families()[family]
    before, after = picture(40, 24, 0), picture(40, 24, 0)
    after.paste((255, 255, 255), (28, 9, 32, 15))
    made = [given(text=[given.image_token], images=[[image]], return_tensors="pt") for image in (before, after)]
    with torch.no_grad():
        inputs = [{name: one[name] for name in adapter.image_inputs} for one in made]
        features = [torch.cat(list(model.model.get_image_features(**one).pooler_output)) for one in inputs]
    features = [one.flatten(0, -2) for one in features]
    tiles = [adapter.pictures(model.config, one) for one in inputs]
    sizes = [tile.tokens for tile in tiles[0]]
    changes = (features[0] - features[1]).norm(dim=-1).split(sizes)
    checked = 0
    for one, other, change in zip(*tiles, changes, strict=True):
        seen = (one.pixels - other.pixels).abs().sum(0)[None]
        if float(seen.amax()) > 0:
            place = functional.adaptive_avg_pool2d(seen, (one.rows, one.columns)).flatten()
            assert int(place.argmax()) == int(one.cells(change).flatten().argmax())
            checked += 1
    assert checked


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in MADE if family not in (*EXPORTED, MEASURED)])
def test_a_family_is_trained(family: str, saved: Any, tmp_path: Path, console: Console) -> None:
    given = [*of_family(family, saved(family), tmp_path), "lora={r: 2}"]
    report = train(load("vlm_finetune", given), given, console)
    assert report.keep["achieved"] == pytest.approx(report.keep["requested"], abs=0.1)
    assert (tmp_path / "run" / "kept_tokens.png").is_file()


@pytest.mark.slow
def test_a_run_is_measured_evaluated_and_inspected(saved: Any, tmp_path: Path, console: Console) -> None:
    given = [*of_family(MEASURED, saved(MEASURED), tmp_path), "trainer.bench_rounds=1"]
    report = train(load("vlm_finetune", given), given, console)
    assert report.step_time is not None
    run = RunFolder.open(tmp_path / "run")
    again = evaluate(str(tmp_path / "run"), run.read_recipe(), console)
    assert again["variants"]["compressed"]["answer_accuracy"] == report.quality["compressed"]
    asked = f"{tmp_path / 'rows' / '0_1.png'} What is it?"
    assert inspect_run(str(tmp_path / "run"), run.read_recipe(), asked, tmp_path / "kept.png")
    assert (tmp_path / "kept.png").is_file()


_ALONE = """
import sys, torch
sys.modules["laconic"] = None
from transformers import AutoModelForImageTextToText
given = torch.load(sys.argv[2], weights_only=True)
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
torch.save(model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False), sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.usefixtures("quick_exports")
@pytest.mark.parametrize("family", EXPORTED)
def test_an_adapter_merged_weights_and_a_folder_without_laconic_answer_alike(
    family: str, saved: Any, tmp_path: Path, console: Console, clean: CleanProcesses
) -> None:
    given = [*of_family(family, saved(family), tmp_path), "lora={r: 2}"]
    train(load("vlm_finetune", given), given, console)
    forms = ("adapter", "merged", "standalone")
    for form in forms:
        assert export(str(tmp_path / "run"), str(tmp_path / form), form)["generation_equal"]
    asked = _asked(load_processor(str(tmp_path / "merged")))
    answers = [laconic.from_pretrained(tmp_path / name).eval().generate(**asked, **GENERATE) for name in ("run", *forms[:2])]
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])
    torch.save(asked, tmp_path / "asked.pt")
    done: subprocess.CompletedProcess[str] = clean.python(
        _ALONE, [str(tmp_path / name) for name in ("standalone", "asked.pt", "made.pt")], {"HF_MODULES_CACHE": str(tmp_path / "code")}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(torch.load(tmp_path / "made.pt", weights_only=True), answers[0])


def _asked(given: Any) -> dict[str, Tensor]:
    """Two questions, one about two images, as ``generate`` takes them."""
    given.tokenizer.padding_side = "left"
    rows = [chat(number) for number in range(2)]
    texts = [
        given.tokenizer.apply_chat_template(
            row["messages"][:1], chat_template=given.chat_template, tokenize=False, add_generation_prompt=True
        )
        for row in rows
    ]
    return dict(given(text=texts, images=[row["images"] for row in rows], padding=True, return_tensors="pt"))


# Processors.


def test_a_processor_that_does_not_fit_its_model_is_refused(saved: Any, loaded: Any) -> None:
    adapter: Any = families()["qwen2_5_vl"]
    config = loaded("qwen2_5_vl")[1].config
    for change, message in (
        ({"merge_size": 1}, r"the processor makes 60 tokens of an image, and the model 15: set data.processor to the model's own"),
        ({"patch_size": 8}, r"the processor makes images of \[384\], and the model reads \[96\]"),
    ):
        given = load_processor(str(saved("qwen2_5_vl")))
        for name, value in change.items():
            setattr(given.image_processor, name, value)
        with pytest.raises(ValueError, match=message):
            check_processor(adapter, config, given)
    other, own, strange = copy.deepcopy(config), load_processor(str(saved("qwen2_5_vl"))), processor("llava_next")
    other.image_token_id = 7
    with pytest.raises(ValueError, match="the model's image_token_id is 7, and the processor's placeholder '<.image_pad.>' has the id 3"):
        check_processor(adapter, other, own)
    other.image_token_id = strange.image_token_ids[0]
    with pytest.raises(ValueError, match="the processor LlavaNextProcessor makes no image_grid_thw, which a qwen2_5_vl reads"):
        check_processor(adapter, other, strange)


def test_a_processor_is_loaded_without_its_part_for_videos_whose_settings_stay(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, folder = load_processor(str(saved("smolvlm"))), tmp_path / "kept"
    assert not hasattr(given, "video_processor")
    given.save_pretrained(folder)
    written = json.loads((folder / "processor_config.json").read_text())
    assert written["processor_class"] == "SmolVLMProcessor"
    assert "video_processor" not in written
    videos = {"video_processor_type": "SmolVLMVideoProcessor", "num_frames": 3}
    (folder / "processor_config.json").write_text(json.dumps(written | {"video_processor": videos}))
    load_processor(str(folder)).save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "processor_config.json").read_text())["video_processor"] == videos
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    with pytest.raises(ValueError, match="the processor of .* needs a package that is not installed: .*pip install num2words"):
        load_processor(str(folder))
