"""Probes: what is measured is the model without the part; a plan takes the cheapest parts; a file is continued."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

import laconic
from laconic import CompressionConfig, StageConfig, Trace, compress
from laconic.data.rows import BadRows
from laconic.trainer.build.plain_recipe import recipe_of
from laconic.trainer.errors import RecipeError
from laconic.trainer.probe.attention_rank import attention_ranks, rank_share
from laconic.trainer.probe.meter import Measured, Meter
from laconic.trainer.probe.overlay import overlay
from laconic.trainer.probe.part import Part
from laconic.trainer.probe.plan import greedy
from laconic.trainer.probe.planning import WRITTEN, PlanOptions, check_plan, write_plan
from laconic.trainer.probe.plot import plot
from laconic.trainer.probe.probe import Options, Probe
from laconic.trainer.recipe.files import load
from tests.data.texts import jsonl, small_tokenizer

LAYERS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small language model and texts."""
    path, tokenizer = tmp_path_factory.mktemp("probe"), small_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    jsonl(path / "rows.jsonl", [{"text": f"row {i} of some text, number {i * i}"} for i in range(40)])
    return path


def _given(folder: Path) -> list[str]:
    return ["data.name=json", f"data.data_files={folder / 'rows.jsonl'}", "data.sequence_length=32"]


def _probe(folder: Path, to: Path, model: Path | None = None, rows: int = 6) -> Probe:
    target = str(model or folder / "model")
    recipe, weights = recipe_of(target, _given(folder))
    return Probe(target, recipe, weights, Options(rows=rows, batch_size=4), to, Console(quiet=True))


def test_a_probe_measures_the_model_without_each_part_and_goes_on_where_it_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = _probe(folder, tmp_path / "p.json")
    probe.run()
    row = probe.rows()[1]
    plain = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    shallower = copy.deepcopy(plain)
    del shallower.model.layers[1]
    without = Meter(shallower, probe.meter.task, probe.meter.batches, 32).whole
    assert row["layer left out"] == pytest.approx(without.loss - probe.meter.whole.loss, abs=1e-5)
    assert row["logit change"] > 0
    # The influence of a layer, from the hidden states before and after it.
    batch = probe.meter.batches[0]
    with torch.no_grad():
        states = plain(batch["input_ids"], position_ids=batch["position_ids"], output_hidden_states=True, use_cache=False).hidden_states
    only = Meter(plain, probe.meter.task, [batch], 32)
    size, influence = only.updates([Part(1, "around", 1.0).stage(probe.stack, "all")])["around_1"]
    valid = batch["documents"] >= 0
    assert influence == pytest.approx(1 - float(torch.cosine_similarity(states[1], states[2], dim=-1)[valid].mean()), abs=1e-5)
    assert size == pytest.approx(float(((states[2] - states[1]).norm(dim=-1) / states[1].norm(dim=-1))[valid].mean()), rel=1e-4)
    # The rank of attention, head by head, of the first row's first document.
    ids = batch["input_ids"][:1, batch["documents"][0] == 0]
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        heads = plain(ids, output_attentions=True).attentions[1][0]
    share = sum(int(torch.linalg.matrix_rank(head.tril(-1))) for head in heads) / len(heads) / (ids.shape[1] - 1)
    assert attention_ranks(probe.meter.model, [{"input_ids": ids}])[1] == pytest.approx(share)
    assert 0 < row["ARank"] <= 1
    plot(probe.rows(), "title", tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 1000
    again = _probe(folder, tmp_path / "p.json")
    monkeypatch.setattr(Meter, "__call__", lambda *args: pytest.fail("measured twice"))
    again.run()
    assert again.rows() == probe.rows()
    monkeypatch.undo()
    with pytest.raises(RecipeError, match="was measured with rows = 6, and now it is 5"):
        _probe(folder, tmp_path / "p.json", rows=5)


def test_a_loss_of_nothing_is_not_measured(folder: Path, tmp_path: Path) -> None:
    probe = _probe(folder, tmp_path / "p.json")
    batch = {**probe.meter.batches[0], "terms": torch.tensor(0)}
    with pytest.raises(BadRows, match="have nothing to predict: their loss would be 0"):
        Meter(probe.meter.model, probe.meter.task, [batch], 32)


def test_a_rank_is_that_below_the_diagonal() -> None:
    # Every token reads the first one alone: one direction of the three that four tokens could have; the other head reads all before it alike.
    first = torch.zeros(4, 4)
    first[:, 0] = 1
    alike = torch.ones(4, 4).tril() / torch.arange(1, 5)[:, None]
    assert rank_share(first[None]) == pytest.approx(1 / 3)
    assert rank_share(torch.stack([first, alike])) == pytest.approx((1 / 3 + 1) / 2)


def test_a_record_of_weights_that_have_changed_is_not_continued(folder: Path, tmp_path: Path) -> None:
    _probe(folder, tmp_path / "p.json")
    record = json.loads((tmp_path / "p.json").read_text())
    record["measured"][""]["loss"] += 0.1
    (tmp_path / "p.json").write_text(json.dumps(record))
    with pytest.raises(RecipeError, match=r"was measured with other weights: their loss was"):
        _probe(folder, tmp_path / "p.json")


@pytest.mark.parametrize("base", ["llm_pretrain", "smollm2_lora", "llm_lora"])
def test_a_plan_s_recipe_has_the_probed_weights_in_place_of_those_of_its_base(base: str, folder: Path, tmp_path: Path) -> None:
    probe = _probe(folder, tmp_path / "p.json")
    options = PlanOptions.of("macs_ratio=0.99", tmp_path / "p.yaml", base, True, "", "linear")
    check_plan(probe, options, _given(folder))
    assert not (tmp_path / "p.yaml").exists()
    write_plan(probe, options, _given(folder))
    model = load(str(tmp_path / "p.yaml")).recipe.model
    assert (model.name, model.gguf_file, model.config) == (str(folder / "model"), None, None)


@pytest.mark.parametrize(
    ("base", "override", "message"),
    [
        ("vit_digits", "data.batch_size=4", "is a recipe of task = image_classification, and the model is probed for causal_lm"),
        ("llm_lora", "data.sequence_length=none", "data.sequence_length"),
        ("llm_finetune", "data.sequence_length=32", r"data.name = 'json' needs data.data_files or data.data_dir"),
    ],
)
def test_a_plan_whose_recipe_would_be_wrong_is_refused_before_anything_is_measured(
    base: str, override: str, message: str, folder: Path, tmp_path: Path
) -> None:
    probe = _probe(folder, tmp_path / "p.json")
    with pytest.raises(ValueError, match=message):
        check_plan(probe, PlanOptions.of("macs_ratio=0.8", tmp_path / "p.yaml", base, True, "", "linear"), [override])
    assert {path.name for path in tmp_path.iterdir()} == {"p.json"}


def test_a_plan_that_cannot_be_measured_or_laid_over_its_base_is_refused_before_anything_is_measured(folder: Path, tmp_path: Path) -> None:
    probe = _probe(folder, tmp_path / "p.json")

    def check(plan: str, base: str | None, shortcut: str | None = None, to: str = "p.yaml") -> None:
        check_plan(probe, PlanOptions.of(plan, tmp_path / to, base, True, "", "linear", shortcut), _given(folder))

    check("macs_ratio=0.8", None)
    with pytest.raises(ValueError, match=r"--plan macs_ratio=0.01 cannot be met"):
        check("macs_ratio=0.01", None)
    (tmp_path / "own.yaml").write_text("base: llm_finetune\nmodel: {settings: {attention_dropout: 0.1}}\n")
    with pytest.raises(ValueError, match=r"--base own sets model.settings, and the plan is for the model as it was measured"):
        check("macs_ratio=0.8", "own")
    (tmp_path / "plan.yaml").write_text(f"# {WRITTEN}\nbase: llm_finetune\n")
    with pytest.raises(ValueError, match=r"--base plan is --overlay itself"):
        check("macs_ratio=0.8", "plan", to="plan.yaml")


def test_a_plan_needs_rows_to_fit_what_it_fits(folder: Path, tmp_path: Path) -> None:
    probe = _probe(folder, tmp_path / "p.json", rows=40)
    with pytest.raises(ValueError, match="all 30 training rows are measured"):
        check_plan(probe, PlanOptions.of("macs_ratio=0.8", tmp_path / "p.yaml", None, True, "", "linear", "linear"), _given(folder))


@pytest.mark.slow
def test_a_plan_is_a_recipe_of_the_measured_stages(folder: Path, tmp_path: Path) -> None:
    probe = _probe(folder, tmp_path / "p.json")
    options = PlanOptions.of("macs_ratio=0.6", tmp_path / "p.yaml", None, True, "0.5", "linear")
    write_plan(probe, options, _given(folder))
    planned = load(str(tmp_path / "p.yaml")).recipe
    assert planned.compression is not None
    assert planned.model.name == str(folder / "model")
    assert planned.budget is None
    stages = planned.compression.stages
    assert probe.meter.macs_ratio(stages) <= 0.6
    assert probe.record.plan is not None
    assert probe.record.plan["macs_ratio"] == pytest.approx(probe.meter.macs_ratio(stages))
    for stage in stages:
        assert stage.left_out or (stage.part("scorer").name, stage.part("estimator").name) == ("linear", "gate")


@pytest.mark.slow
def test_a_compressed_model_is_probed_with_its_own_stages(folder: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder / "model")
    compress(model, CompressionConfig([StageConfig(layer=1, site="around", keep=0.5, scorer="linear", selector="threshold")]))
    # An uncalibrated threshold would be refused.
    laconic.start_routers(model, [{"input_ids": torch.arange(16)[None]}])
    model.save_pretrained(tmp_path / "model")
    small_tokenizer().save_pretrained(tmp_path / "model")
    probe = _probe(folder, tmp_path / "p.json", tmp_path / "model")
    assert {part.layer for part in probe.parts} == {0, 2}
    loaded = laconic.from_pretrained(tmp_path / "model").eval()
    total = sum(float(probe.meter.task.forward(loaded, batch, trace=Trace()).total) for batch in probe.meter.batches)
    assert probe.meter.whole.loss == pytest.approx(total / probe.meter.answers, rel=1e-5)
    without = probe.measure([Part(2, "around")])
    assert without.loss != probe.meter.whole.loss


@pytest.mark.slow
def test_images_are_probed_too(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=8,
        num_channels=1,
        num_labels=10,
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    recipe, weights = recipe_of(str(tmp_path / "vit"), ["data.train_samples=16", "data.eval_samples=8", "data.canvas.size=32"])
    probe = Probe("vit", recipe, weights, Options(rows=8), tmp_path / "p.json", Console(quiet=True))
    probe.run()
    assert set(probe.record.measured) >= {"", "around_0=0", "around_attention_1=0", "around_1=0.5"}
    assert all(isinstance(found, Measured) for found in probe.record.measured.values())


# Losses that rise more for every part that is missing already, as those of models mostly do.
WORTH = {
    Part(layer, site): value for layer in range(6) for site, value in (("around", 3.0 + 0.7 * layer**1.5), ("around_mlp", 1.5 + layer**1.1))
}


def _loss(parts: Sequence[Part]) -> float:
    return sum(WORTH[part] for part in parts) * (1 + 0.1 * len(parts))


def _cost(parts: Sequence[Part]) -> float:
    return 1 - sum(0.15 if part.site == "around" else 0.1 for part in parts)


def _every_time(target: float) -> list[str]:
    """The plan with every part measured again after each choice."""
    chosen: dict[int, Part] = {}
    taken: list[str] = []
    while _cost(list(chosen.values())) > target:
        now = list(chosen.values())
        after = {part: [*(other for other in now if other.layer != part.layer), part] for part in WORTH}
        after = {part: parts for part, parts in after.items() if _cost(parts) < _cost(now) - 1e-9}
        best = min(after, key=lambda part: ((_loss(after[part]) - _loss(now)) / (_cost(now) - _cost(after[part])), part))
        if _cost(after[best]) <= target:
            best = min((part for part in after if _cost(after[part]) <= target), key=lambda part: _loss(after[part]))
        chosen[best.layer] = best
        taken.append(best.key)
    return taken


@pytest.mark.parametrize("target", [0.8, 0.62, 0.3])
def test_a_plan_takes_each_time_the_part_with_the_least_rise_for_its_macs_and_measures_few(target: float) -> None:
    measured: list[int] = []

    def counted(parts: Sequence[Part]) -> float:
        measured.append(len(parts))
        return _loss(parts)

    steps = greedy(list(WORTH), target, counted, _cost)
    assert [step.part.key for step in steps] == _every_time(target)
    assert steps[-1].macs_ratio <= target
    assert steps[-1].loss == pytest.approx(_loss(list({step.part.layer: step.part for step in steps}.values())))
    # Every part once, and later those alone that may be the best.
    assert len(measured) < len(WORTH) * (1 + len(steps) / 2)


def test_a_plan_that_cannot_be_met_is_refused() -> None:
    with pytest.raises(ValueError, match=r"with every part left out it is still 0.1000; raise it"):
        greedy(list(WORTH), 0.05, _loss, _cost)


@pytest.mark.parametrize(
    ("plan", "keeps", "message"),
    [
        ("keep=0.5", "", "must be macs_ratio=SHARE"),
        ("macs_ratio=2", "", "must be macs_ratio=SHARE"),
        ("macs_ratio=0.5", "1.5", "--keeps 1.5"),
    ],
)
def test_wrong_plans_are_refused(plan: str, keeps: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        PlanOptions.of(plan, tmp_path / "p.yaml", None, True, keeps, "linear")


@pytest.mark.slow
def test_a_plan_with_shortcuts_is_measured_with_them_and_with_the_tokens_of_its_scorer(folder: Path, tmp_path: Path) -> None:
    probe = _probe(folder, tmp_path / "p.json")
    part = Part(1, "around", shortcut="linear")
    assert probe.measure([part]).change < 0.9 * probe.measure([Part(1, "around")]).change
    some = Part(2, "around", 0.5, "update")
    assert probe.measure([some]).loss != probe.measure([Part(2, "around", 0.5)]).loss
    options = PlanOptions.of("macs_ratio=0.7", tmp_path / "p.yaml", None, False, "0.5", "update", "linear")
    write_plan(probe, options, _given(folder))
    planned = load(str(tmp_path / "p.yaml")).recipe
    assert planned.compression is not None
    assert all(stage.part("shortcut").name == "linear" for stage in planned.compression.stages)
    again = _probe(folder, tmp_path / "p.json")
    assert again.measure([part]) == probe.measure([part])


def test_an_overlay_trains_the_keeps_of_its_plan_whatever_its_base_draws(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(overlay("vit_digits_elastic", {}, [StageConfig(layer=1, keep=0.5, scorer="learned")], "a plan"))
    recipe = load(path).recipe
    assert (recipe.training_keep, recipe.phases, recipe.budget) == (None, None, None)
