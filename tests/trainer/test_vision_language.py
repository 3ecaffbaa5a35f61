"""Vision-language models trained from a recipe: loss, metric, run, evaluation, export, and batches without an image."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies.deepspeed import remove_module_hooks
from rich.console import Console
from transformers import AutoProcessor

import laconic
from laconic import CompressionConfig, StageConfig, Trace, stages_of
from laconic.data.chats.splits import ChatData
from laconic.data.embedded.digit_questions import DigitQuestions
from laconic.data.rows import collate
from laconic.modules.tokens.labels import IGNORE_TOKEN
from laconic.trainer.build.build import build
from laconic.trainer.build.validate import validate
from laconic.trainer.distributed import collective
from laconic.trainer.distributed.deepspeed_strategy import remove_hooks
from laconic.trainer.errors import RecipeError
from laconic.trainer.evaluate import evaluate, inspect_run
from laconic.trainer.export.export import export
from laconic.trainer.losses.answer_loss import AnswerLoss, answer_loss, with_blank_image
from laconic.trainer.measure.answers import read_answers
from laconic.trainer.metrics.answers import AnswerAccuracy
from laconic.trainer.recipe.files import load
from laconic.trainer.run import train
from laconic.trainer.run_folder import RunFolder, load_model
from laconic.trainer.tasks.vision_language import VisionLanguage
from tests.trainer.small_recipes import OWN_TOWER, small


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build(load("vlm_digits", small("vlm_digits", tmp_path_factory.mktemp("start"), QUICK)).recipe)


QUICK = ["trainer.max_steps=2", "data.batch_size=4", "data.eval_batch_size=4", "data.train_samples=16", "data.eval_samples=6", "trainer.bench_rounds=0"]  # fmt: skip


def _batch(parts: Any, rows: tuple[int, ...] = (0, 1, 2)) -> dict[str, Any]:
    return collate([parts.data.train[row] for row in rows])


def test_the_loss_is_that_of_transformers_with_its_gradient(parts: Any) -> None:
    plain, batch = laconic.decompress(copy.deepcopy(parts.model)).train(), _batch(parts)
    found = answer_loss(plain, batch)
    found.mean.backward()
    ours = {name: p.grad.clone() for name, p in plain.named_parameters() if p.grad is not None}
    plain.zero_grad()
    given = {key: batch[key] for key in ("input_ids", "attention_mask", "labels", "pixel_values")}
    expected = plain(**given, use_cache=False).loss
    expected.backward()
    torch.testing.assert_close(found.mean, expected)
    theirs = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(ours, theirs)
    assert len(found.right) == int((batch["labels"] != IGNORE_TOKEN).sum())


def test_answers_are_right_as_a_whole_and_counted_by_kind() -> None:
    # Row 0: two answers of 2 and 1 tokens; row 1: one answer of 2 tokens.
    out = AnswerLoss(
        torch.tensor(3.0),
        torch.zeros(5, 2),
        torch.tensor([True, True, False, True, False]),
        torch.tensor([0, 0, 0, 1, 1]),
        torch.tensor([0, 0, 1, 0, 0]),
        torch.zeros(5, 2),
    )
    quality = AnswerAccuracy()
    quality.add(out, {"kinds": torch.tensor([[1, 0], [1, -1]]), "sample_ids": torch.arange(2)})
    assert (quality.right, quality.total) == ({-1: 0, 0: 0, 1: 1}, {-1: 0, 0: 1, 1: 2})
    assert quality.value == pytest.approx(1 / 3)
    other = AnswerAccuracy()
    other.add(out, {"kinds": torch.tensor([[1, 0], [1, -1]]), "sample_ids": torch.arange(2)})
    quality.merge(other)
    assert quality.value == pytest.approx(1 / 3)
    data = ChatData([], [], [], processor=None, length=8, kinds=("reading", "counting"))  # type: ignore[arg-type]
    details = quality.details(data)
    assert details["answers"] == {"reading": {"accuracy": 0.0, "answers": 2}, "counting": {"accuracy": 0.5, "answers": 4}}
    assert details["loss"] == pytest.approx(0.6)
    unnamed = AnswerAccuracy()
    unnamed.add(out, {"kinds": torch.empty(2, 0, dtype=torch.long), "sample_ids": torch.arange(2)})
    assert unnamed.value == pytest.approx(1 / 3)


def test_a_blank_image_changes_nothing_and_gives_the_tower_a_gradient_of_zero(parts: Any) -> None:
    plain = laconic.decompress(copy.deepcopy(parts.model))
    before = [
        laconic.compress(copy.deepcopy(plain), laconic.CompressionConfig([laconic.StageConfig(layer=0, keep=0.5, stack=stack)]))
        for stack in ("projector", "vision")
    ]
    for model in (copy.deepcopy(parts.model), plain, *before):
        batch = _batch(parts)
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] == model.config.image_token_id, 5)
        del batch["pixel_values"]
        traces = ({"trace": Trace()}, {"trace": Trace()}) if stages_of(model) else ({}, {})
        expected = answer_loss(model.train(), batch, **traces[0])
        filled = batch | with_blank_image(model, {key: batch[key] for key in ("input_ids", "attention_mask")})
        found = answer_loss(model, filled, **traces[1])
        torch.testing.assert_close(found.mean, expected.mean)
        assert torch.equal(found.right, expected.right)
        found.mean.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if "vision_tower" in name or "projector" in name}
        # Layers above the one whose features are read have none, in any batch.
        lacking = {name for name, gradient in gradients.items() if gradient is None}
        assert all("post_layernorm" in name for name in lacking), lacking
        assert not any(bool(gradient.any()) for gradient in gradients.values() if gradient is not None)


@pytest.mark.parametrize("stack", ["projector", "text"])
def test_a_batch_without_an_image_calls_the_modules_of_one_with_images(stack: str, parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collective, "world_size", lambda: 2)
    model, orders = copy.deepcopy(parts.model), []
    if stack == "text":
        stages = [laconic.StageConfig(layer=1, keep=0.5, stack="text", scope="visual", site=site) for site in ("around", "before")]
        model = laconic.compress(laconic.decompress(model), laconic.CompressionConfig(stages))
    for images in (True, False):
        batch, order = _batch(parts), list[str]()
        if not images:
            batch["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] == model.config.image_token_id, 5)
            del batch["pixel_values"]
        # Those whose weights are gathered, and those of stages: with shards of weights DeepSpeed compares the calls of all modules.
        weighted = [(name, module) for name, module in model.named_modules() if module._parameters or ".stages." in name]
        hooks = [module.register_forward_pre_hook(lambda *_, name=name, order=order: order.append(name)) for name, module in weighted]
        with torch.no_grad():
            answer_loss(model.train(), batch, trace=(trace := Trace()))
        assert {routing.counts()[1] > 0 for routing in trace.routings.values()} == {images}
        for hook in hooks:
            hook.remove()
        orders.append(order)
    assert any("vision_tower" in name for name in orders[0])
    assert orders[0] == orders[1]


@pytest.mark.usefixtures("quick_exports")
def test_a_run_is_reported_by_kind_evaluated_exported_and_answers(tmp_path: Path, console: Console) -> None:
    overrides = [*small("vlm_digits", tmp_path, QUICK), f"output={tmp_path / 'run'}"]
    report = train(load("vlm_digits", overrides), overrides, console)
    assert report.quality["metric"] == "answer_accuracy"
    assert report.keep["requested"] == {"projector.before_0": 0.25}
    assert report.keep["achieved"]["projector.before_0"] == pytest.approx(0.25, abs=0.15)
    assert report.stacks["text"]["visual_keep"] == pytest.approx({"requested": 0.25, "achieved": 0.25})
    assert report.stacks["text"]["macs_ratio"]["achieved"] < 1
    assert "visual keep projector 0.250 of 0.250, text 0.250 of 0.250" in (tmp_path / "run" / "log.txt").read_text()
    again = evaluate(str(tmp_path / "run"), RunFolder.open(tmp_path / "run").read_recipe(), console)
    assert again["variants"]["compressed"]["answer_accuracy"] == report.quality["compressed"]
    answers = read_answers(tmp_path / "run").values()
    assert sum(answer.right for answer in answers) / len(answers) == report.quality["compressed"]
    assert sum(report.quality["position_bias"]["projector.before_0"]["by_row"]) == pytest.approx(1)
    assert (tmp_path / "run" / "kept_tokens.png").is_file()
    recipe, picture = RunFolder.open(tmp_path / "run").read_recipe(), tmp_path / "kept.png"
    assert inspect_run(str(tmp_path / "run"), recipe, None, picture) == report.keep["achieved"]
    DigitQuestions("test", 6)[1]["images"][0].save(tmp_path / "a.png")
    kept = inspect_run(str(tmp_path / "run"), recipe, f"{tmp_path / 'a.png'} Where is the 7?", tmp_path / "own.png")
    assert kept == {"projector.before_0": 0.25}
    assert (tmp_path / "own.png").is_file()
    for wrong, message in (("nowhere.png What?", "image file that does not exist"), (str(tmp_path / "a.png"), "and a question")):
        with pytest.raises(ValueError, match=message):
            inspect_run(str(tmp_path / "run"), recipe, wrong, tmp_path / "own.png")
    assert export(str(tmp_path / "run"), str(tmp_path / "merged"))["max_abs_logit_diff"] == 0
    model = laconic.from_pretrained(tmp_path / "merged")
    processor = AutoProcessor.from_pretrained(tmp_path / "merged", backend="pil")
    row = DigitQuestions("test", 6)[0]
    text = processor.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
    given = processor(text=text, images=row["images"], return_tensors="pt")
    made = model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    ids, mask = given["input_ids"], given["attention_mask"]
    for _ in range(4):
        # The prompt ends where it ended: what is generated is behind it.
        prompt = torch.arange(ids.shape[1])[None] < given["input_ids"].shape[1]
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=given["pixel_values"],
            use_cache=False,
            trace=Trace(prompt=prompt, lookahead=True),
        ).logits
        logits[..., model.generation_config.eos_token_id] = -torch.inf
        ids, mask = torch.cat([ids, logits[:, -1:].argmax(-1)], 1), torch.cat([mask, mask[:, :1]], 1)
    assert torch.equal(made, ids)


def test_hooks_that_a_strategy_removes_are_installed_again(parts: Any) -> None:
    model, batch = laconic.decompress(copy.deepcopy(parts.model)).eval(), _batch(parts)
    given = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        expected = model(**given).logits
        remove_hooks(model)
        assert torch.equal(model(**given).logits, expected)
        # What is guarded against.
        remove_module_hooks(model)
        with pytest.raises((TypeError, AttributeError, IndexError, KeyError)):
            model(**given)


def test_what_does_not_belong_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data.image_dir = 'x' has no effect"):
        load("vlm_digits", ["data.image_dir=x"])
    with pytest.raises(RecipeError, match=r"data.canvas is for"):
        load("vlm_digits", ["data.canvas={size: 32}"])
    with pytest.raises(ValueError, match=r"bert is no supported vision-language model: use gemma3, .*llava, "):
        build(load("vlm_digits_base", ["model.tower_of=null", "model.config={model_type: bert}"]).recipe)
    with pytest.raises(ValueError, match=r"vocab_size = 299 must be at least 300|entries and the model"):
        build(load("vlm_digits_base", [*OWN_TOWER, "model.config.text_config.vocab_size=300"]).recipe)
    with pytest.raises(ValueError, match=r"drops the first token of the tower.*vision_feature_select_strategy=full"):
        build(load("vlm_digits_base", [*OWN_TOWER, "model.config.vision_feature_select_strategy=default"]).recipe)
    with pytest.raises(ValueError, match=r"data.kinds = \['spelling'\] must be some of reading, counting"):
        build(load("vlm_digits_base", [*OWN_TOWER, "data.kinds=[spelling]"]).recipe)
    with pytest.raises(ValueError, match=r"data.processor is missing"):
        build(load("vlm_digits_base", [*OWN_TOWER, "data.name=json", "data.data_files=x.jsonl"]).recipe)


@pytest.mark.slow
def test_a_tower_that_was_trained_before_becomes_that_of_a_new_model(tmp_path: Path, console: Console) -> None:
    overrides = [*small("vlm_digits_tower", tmp_path, QUICK), f"output={tmp_path / 'tower'}"]
    train(load("vlm_digits_tower", overrides), overrides, console)
    sizes = [item for item in small("vlm_digits_base", tmp_path, QUICK) if "vision_config" not in item and "tower_of" not in item]
    given = [*sizes, f"model.tower_of={tmp_path / 'tower'}"]
    made, classifier = build(load("vlm_digits_base", given).recipe).model, load_model(tmp_path / "tower")
    theirs = {
        name.removeprefix("vision_model."): value for name, value in classifier.state_dict().items() if name.startswith("vision_model.")
    }
    ours = made.model.vision_tower.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert validate(load("vlm_digits_base", given).recipe).macs_ratio == 1
    for wrong, message in (
        (
            [*given, "model.config.vision_config.hidden_size=16"],
            "model.tower_of = .* decides the vision tower, and so does model.config.vision_config",
        ),
        ([*sizes, f"model.tower_of={tmp_path / 'nowhere'}"], "model.tower_of = .*nowhere"),
    ):
        with pytest.raises(ValueError, match=message):
            build(load("vlm_digits_base", wrong).recipe)
    with pytest.raises(RecipeError, match="model.tower_of is for a new model, and model.config is not set"):
        load("vlm_finetune", ["model.tower_of=x", "data.data_files=x.json"])
    with pytest.raises(ValueError, match="model.tower_of = 'x' is for LLaVA, and model.config.model_type = 'vit'"):
        build(load("vit_digits_dense", ["model.tower_of=x"]).recipe)


def test_the_model_with_all_tokens_teaches_itself_with_few(tmp_path: Path, console: Console) -> None:
    given = [*small("vlm_digits", tmp_path, QUICK), "distillation={teacher: self, weight: 0.7, temperature: 1}"]
    parts = build(load("vlm_digits", given).recipe)
    module, batch = VisionLanguage.module(parts), _batch(parts)
    module.model.train()
    found = module.losses(batch)
    assert module.model.training
    few = answer_loss(parts.model, batch, trace=Trace(sample_ids=batch["sample_ids"]))
    plain = answer_loss(laconic.decompress(copy.deepcopy(parts.model)), batch)
    expected = (plain.logits.softmax(-1) * (plain.logits.log_softmax(-1) - few.logits.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(found["distillation"].answers, expected.detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found["distillation"].total, 0.3 * few.mean + 0.7 * expected)
    # No gradient flows through the teacher.
    found["distillation"].total.backward()
    ours = parts.model.lm_head.weight.grad.clone()
    parts.model.zero_grad()
    again = answer_loss(parts.model, batch, trace=Trace(sample_ids=batch["sample_ids"]))
    constant = plain.logits.detach()
    (0.3 * again.mean + 0.7 * (constant.softmax(-1) * (constant.log_softmax(-1) - again.logits.log_softmax(-1))).sum(-1).mean()).backward()
    torch.testing.assert_close(ours, parts.model.lm_head.weight.grad)
    run = [*given, f"output={tmp_path / 'run'}"]
    assert validate(load("vlm_digits", run).recipe).macs_ratio < 1
    train(load("vlm_digits", run), run, console)


@pytest.mark.slow
def test_a_run_goes_on_after_the_folder_of_its_tower_is_gone(parts: Any, tmp_path: Path, console: Console) -> None:
    parts.model.model.vision_tower.save_pretrained(tmp_path / "tower")
    sizes = [item for item in small("vlm_digits_base", tmp_path, QUICK) if "vision_config" not in item and "tower_of" not in item]
    given = [*sizes, f"model.tower_of={tmp_path / 'tower'}"]
    run = RunFolder(tmp_path / "run")
    loaded = load("vlm_digits_base", [*given, f"output={run.path}"])
    expected = train(loaded, given, console)
    # As if it had been killed before it saved the model.
    run.report.unlink()
    for folder in (run.path / "model", tmp_path / "tower"):
        shutil.rmtree(folder)
    assert validate(loaded.recipe, resumed=run).steps == 2
    found = train(loaded, given, console, resume="auto")
    assert found.quality == expected.quality
    with pytest.raises(ValueError, match="model.tower_of = .*tower"):
        validate(loaded.recipe)


def test_a_keep_below_one_token_of_an_image_is_refused_with_the_floor(parts: Any) -> None:
    def checked(*stages: StageConfig) -> Any:
        return validate(parts.recipe.model_copy(update={"compression": CompressionConfig(stages)}))

    with pytest.raises(
        RecipeError, match=r"projector.before_0: keep = 0.007 leaves 0.45 of 64 visual tokens .*: set keep to 0.0156 or more"
    ):
        checked(StageConfig(layer=0, stack="projector", scorer="random", keep=0.007))
    by_power: dict[str, Any] = {"stack": "text", "scope": "visual", "scorer": "random", "count": "dynamicvit", "keep": 0.05}
    with pytest.raises(RecipeError, match=r"text.before_1: keep = 0.05 leaves 0.16 of 64 .*: set keep to 0.1250 or more"):
        checked(StageConfig(layer=0, **by_power), StageConfig(layer=1, **by_power))
    assert checked(StageConfig(layer=0, stack="projector", scorer="random", keep=0.0157)).keep == {"projector.before_0": 0.0157}
