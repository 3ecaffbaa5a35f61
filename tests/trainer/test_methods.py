"""Methods by name: each is the stages of a file, in any recipe for vision-language models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from laconic.trainer.build.build import build
from laconic.trainer.build.trainable import check_lora
from laconic.trainer.build.validate import validate
from laconic.trainer.errors import RecipeError
from laconic.trainer.evaluate import Options, evaluate
from laconic.trainer.measure.tables import cost_of_recipe
from laconic.trainer.recipe.baselines import load_baselines
from laconic.trainer.recipe.files import load
from laconic.trainer.recipe.methods import methods
from laconic.trainer.run import silent, train
from laconic.trainer.run_folder import RunFolder, load_model
from tests.trainer.conftest import QUICK
from tests.trainer.small_recipes import OWN_TOWER, small


def _of(name: str, *overrides: str) -> list[str]:
    kept = [item for item in small("vlm_digits_base", Path(), QUICK) if "compression" not in item]
    layers = 32 if name == "hidrop" else 4
    return [*kept, f"model.config.text_config.num_hidden_layers={layers}", f"compression.method={name}", *overrides]


_DEFAULT = ("learned", "pooled")
# Plans of a language model are in the recipes of that model.
_OF_IMAGES = [name for name in methods() if not name.startswith("smollm2_")]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in _DEFAULT else pytest.mark.slow) for name in _OF_IMAGES if name != "downsampled"]
)
def test_a_method_is_valid_in_a_recipe_and_says_what_it_is(name: str) -> None:
    first = methods()[name].read_text().splitlines()[0]
    assert first.startswith("# ")
    checked = validate(load("vlm_digits_base", _of(name)).recipe)
    # DualSpeed drops tokens in training alone, and costs what the dense model does in use.
    assert checked.macs_ratio < 1 or (checked.macs_ratio == 1 and set(checked.keep.values()) == {1.0})


@pytest.mark.slow
def test_down_sampled_images_have_a_quarter_of_the_tokens_in_all_layers_and_what_was_trained_stays(tmp_path: Path) -> None:
    overrides = [item for item in small("vlm_finetune", tmp_path, QUICK) if "compression" not in item]
    whole = build(load("vlm_finetune", [*overrides, "compression=null"]).recipe)
    half = build(load("vlm_finetune", [*overrides, "compression.method=downsampled"]).recipe)
    tower, own = half.model.model.vision_tower.embeddings, whole.model.model.vision_tower.embeddings
    assert half.model.config.vision_config.image_size == tower.image_size == 16
    grid = own.position_embedding.weight.view(1, 8, 8, -1).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, size=(4, 4), mode="bicubic", align_corners=False).flatten(2)[0].T
    torch.testing.assert_close(tower.position_embedding.weight, expected)
    assert torch.equal(tower.patch_embedding.weight, own.patch_embedding.weight)
    row, before = half.data.train[0], whole.data.train[0]
    assert row["images"]["pixel_values"].shape[-1] == 16
    images = len(before["images"]["pixel_values"])
    assert len(before["input_ids"]) - len(row["input_ids"]) == images * (64 - 16)
    given = [*overrides, "compression.method=downsampled", "trainer.max_steps=1", "baselines=[]", f"output={tmp_path / 'run'}"]
    train(load("vlm_finetune", given), given, silent())
    assert load_model(tmp_path / "run").config.vision_config.image_size == 16
    again = evaluate(str(tmp_path / "run"), RunFolder.open(tmp_path / "run").read_recipe(), silent())
    assert 0 <= again["variants"]["dense"]["answer_accuracy"] <= 1
    with pytest.raises(RecipeError, match="has no stages, and compression.keep is one of a stage: remove it"):
        load("vlm_finetune", [*overrides, "compression.method=downsampled", "compression.keep=0.5"])
    for wrong, message in (("0.01", "not one patch of 4 pixels is left of images of 32"), ("3", "less than or equal to 2")):
        with pytest.raises((RecipeError, ValueError), match=message):
            build(load("vlm_finetune", [*overrides, "compression=null", f"model.image_scale={wrong}"]).recipe)
    with pytest.raises(ValueError, match="model.image_scale = 0.5 changes the image size of model.name, which is not set"):
        build(load("vlm_digits_base", [*OWN_TOWER, "model.image_scale=0.5"]).recipe)


def test_settings_of_a_method_go_to_all_of_its_stages_and_fractions_are_of_the_depth() -> None:
    recipe = load("vlm_digits_base", _of("pyramiddrop", "compression.keep=0.6")).recipe
    assert recipe.compression is not None
    assert [(stage.layer, stage.keep) for stage in recipe.compression.stages] == [(0.25, 0.6), (0.5, 0.6), (0.75, 0.6)]
    rows = cost_of_recipe("vlm_digits_base", _of("pyramiddrop"))["layers"]
    # 64 visual tokens beside 64 of text: int(64 · 0.5^s).
    assert [row["tokens"] - 64 for row in rows if row["stack"] == "text"] == [64, 32, 16, 8]
    recipe = load("vlm_digits_base", _of("divprune", "compression.tokens=9")).recipe
    assert recipe.compression is not None
    assert [(stage.tokens, stage.keep) for stage in recipe.compression.stages] == [(9, None)]


@pytest.mark.slow
def test_visual_tokens_enter_late_and_leave_early_and_layers_process_fewer_of_them_by_depth() -> None:
    def visual(name: str, *overrides: str) -> list[int]:
        rows = cost_of_recipe("vlm_digits_base", _of(name, *overrides))["layers"]
        return [row["tokens"] - 64 for row in rows if row["stack"] == "text"]

    assert visual("hidrop") == [0] * 9 + [64] + [32] * 4 + [16] * 2 + [8] * 2 + [4] * 7 + [0] * 7
    assert visual("hidrop", "compression.keep=0.25")[9:14] == [64, 16, 16, 16, 16]
    # round(64 · (½ cos(π · layer ÷ 3) + ½)).
    assert visual("p_mod") == [64, 48, 16, 0]
    assert visual("p_mod", "compression.count=round") == [32] * 4


def test_a_method_replaces_the_stages_of_a_recipe_and_the_other_way_round(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: vlm_digits\ncompression: {method: fastv, keep: 0.3}\noptimizer: {router_lr: 3.0e-3}\n")
    recipe = load(str(tmp_path / "mine.yaml")).recipe
    assert recipe.compression is not None
    assert [(stage.key, stage.keep) for stage in recipe.compression.stages] == [("text.before_2", 0.3)]
    (tmp_path / "other.yaml").write_text(
        "base: mine\ncompression:\n  stages:\n    - {layer: 0, stack: projector, scorer: random, keep: 0.5}\n"
    )
    other = load(str(tmp_path / "other.yaml")).recipe
    assert other.compression is not None
    assert [stage.key for stage in other.compression.stages] == ["projector.before_0"]
    # The method's own settings give way to the recipe's.
    (tmp_path / "third.yaml").write_text("base: vlm_digits_base\ncompression: {method: learned}\noptimizer: {router_lr: 3.0e-3}\n")
    assert load(str(tmp_path / "third.yaml")).recipe.optimizer.router_lr == 3e-3
    assert load("vlm_digits_base", ["compression.method=learned"]).recipe.optimizer.router_lr == 1e-2


def test_wrong_names_and_settings_are_refused_with_what_there_is() -> None:
    for overrides, message in (
        (
            ["compression.method=pyramid_drop"],
            r"compression.method = 'pyramid_drop' is no method: the methods are .*did you mean pyramiddrop",
        ),
        (["compression.method=[a]"], r"compression.method = \['a'\] is no method"),
        (["compression.method={}"], r"compression.method = \{\} is no method"),
        (["compression.method=fastv", "compression.ratio=0.5"], "compression.ratio is no setting of a method: there are layer, keep"),
        (["compression.method=fastv", "compression.stages=[]"], "has stages of its own: remove compression.stages"),
        (["compression.method=fastv", "compression.keep=2"], "keep = 2"),
    ):
        with pytest.raises((RecipeError, ValueError), match=message):
            validate(load("vlm_digits_base", [*_of("fastv")[:-1], *overrides]).recipe)


def test_overrides_of_a_method_may_come_in_any_order_and_stages_replace_a_method() -> None:
    for given in (["compression.keep=0.7", "compression.method=fastv"], ["compression.method=fastv", "compression.keep=0.7"]):
        recipe = load("vlm_digits", [*given, "baselines=[]"]).recipe
        assert recipe.compression is not None
        assert [stage.keep for stage in recipe.compression.stages] == [0.7]
    stages = "compression.stages=[{layer: 0, stack: projector, scorer: random, keep: 0.5}]"
    recipe = load("vlm_finetune", ["data.data_files=x.json", stages]).recipe
    assert recipe.compression is not None
    assert [stage.key for stage in recipe.compression.stages] == ["projector.before_0"]
    with pytest.raises(RecipeError, match="compression.method = null: set compression=null for a dense model"):
        load("vlm_finetune", ["data.data_files=x.json", "compression.method=null"])
    # A recipe's own key without effect is refused, whatever the overrides.
    with pytest.raises(RecipeError, match="data.kinds = .* has no effect"):
        load("vlm_finetune", ["data.data_files=x.json", "data.kinds=[reading]", "compression.keep=0.3"])


@pytest.mark.parametrize(
    ("given", "arms", "reasons"),
    [
        (["compression.method=fastv"], ["vlm_digits_dense"], ["stages of its own"]),
        (["compression.method=fastv", "compression.keep=0.3"], ["vlm_digits_dense"], ["stages of its own"]),
        (["compression.method=downsampled"], [], ["its model is another one", "stages of its own"]),
        (["compression=null"], [], ["it is the recipe itself", "stages of its own"]),
        (["optimizer.lr=1"], ["vlm_digits_dense", "vlm_digits_random"], []),
    ],
)
def test_other_stages_leave_out_the_control_arms_that_are_not_comparable(given: list[str], arms: list[str], reasons: list[str]) -> None:
    found = load_baselines(load("vlm_digits", given), given)
    assert [arm.name for arm in found.arms] == arms
    assert len(found.notes) == len(reasons)
    for note, reason in zip(found.notes, reasons, strict=True):
        assert "is left out, because compression" in note
        assert reason in note


def test_adapters_on_resized_models_are_refused_with_the_cure(tmp_path: Path) -> None:
    overrides = [*small("vlm_lora", tmp_path, QUICK), "compression.method=downsampled"]
    with pytest.raises(RecipeError, match="model.image_scale = 0.5 changes position embeddings, which lora.mode = 'lora' freezes"):
        check_lora(load("vlm_lora", overrides).recipe)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["epic", "dualspeed"])
def test_methods_with_a_keep_of_each_step_train_and_leave_the_stages_own(name: str, tmp_path: Path) -> None:
    given = [*_of(name), "baselines=[]", "data.eval_samples=4", "data.train_samples=16", f"output={tmp_path / 'run'}"]
    report = train(load("vlm_digits_base", given), given, silent())
    assert report is not None
    assert report.train_macs_ratio is not None
    assert report.train_macs_ratio != report.macs_ratio
    # DualSpeed's model is an ordinary one.
    recipe = RunFolder.open(tmp_path / "run").read_recipe()
    if name == "epic":
        found = evaluate(str(tmp_path / "run"), recipe, silent(), options=Options(keeps=[1.0, 0.5]))["variants"]
        assert found["keep 1"]["answer_accuracy"] == found["dense"]["answer_accuracy"]
        assert list(found["keep 0.5"]["keep"].values()) == [0.5]
    else:
        with pytest.raises(RecipeError, match="--keep is of stages, and the model has none: remove it"):
            evaluate(str(tmp_path / "run"), recipe, silent(), options=Options(keeps=[0.5]))
    compression = load_model(tmp_path / "run").config.to_dict().get("compression")
    assert (None if compression is None else compression["stages"][0]["keep"]) == {"epic": 0.25, "dualspeed": None}[name]
