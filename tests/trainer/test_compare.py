"""Comparisons: which recipes the arms are, what is kept and what goes on, and the figures."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from laconic.modules.checkpoints.whole_files import DamagedFile
from laconic.trainer.build.build import model_config
from laconic.trainer.build.validate import validate
from laconic.trainer.cli.app import app
from laconic.trainer.compare import running
from laconic.trainer.compare.arms import Arm, arms_of
from laconic.trainer.compare.compare import Options, plan
from laconic.trainer.compare.derived import smaller_input
from laconic.trainer.compare.job import Job, jobs_of
from laconic.trainer.compare.plot import draw
from laconic.trainer.compare.results import results_of
from laconic.trainer.compare.running import Failed, check_at_once, environment, run_all, time_left
from laconic.trainer.compare.statistics import Mean, difference
from laconic.trainer.distributed.signals import Stopped
from laconic.trainer.errors import RecipeError
from laconic.trainer.recipe.files import dump, load
from laconic.trainer.recipe.schema import Recipe
from laconic.trainer.run import train
from laconic.trainer.run_folder import RunFolder
from laconic.trainer.tasks.base import task_named
from tests.trainer.conftest import QUICK
from tests.trainer.stopping import StopAfter, train_until


def _arms(recipe: str, names: str, *overrides: str) -> dict[str, Arm]:
    return {arm.name: arm for arm in arms_of(recipe, names.split(","), overrides)[1]}


def _overlay(folder: Path, recipe: str) -> str:
    """The recipe in a folder without the files of its arms."""
    (folder / "mine.yaml").write_text(f"base: {recipe}\n")
    return str(folder / "mine.yaml")


def test_intervals_are_students_t_over_seeds_and_differences_are_paired() -> None:
    # t of 2 degrees of freedom at 97.5 % is 4.302653, of 1 degree 12.706205.
    found = Mean.of([0.1, 0.2, 0.3])
    assert (found.mean, found.low, found.high) == (pytest.approx(0.2), 0.1, 0.3)
    assert found.deviation == pytest.approx(0.1)
    assert found.interval == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-6)
    # The seeds move both arms by far more than the arms differ.
    paired = difference([0.11, 0.52, 0.93], [0.10, 0.50, 0.90])
    assert paired.mean == pytest.approx(0.02)
    assert paired.interval == pytest.approx(4.302653 * 0.01 / 3**0.5, rel=1e-6)
    assert difference([2.0, 4.0], [1.0, 1.0]).interval == pytest.approx(12.706205, rel=1e-6)
    assert (Mean.of([0.5]).deviation, Mean.of([0.5]).interval) == (None, None)


@pytest.mark.parametrize("recipe", ["vit_digits", "llm_pretrain", "segment_digits"])
def test_arms_that_are_made_from_a_recipe_are_those_that_ship_with_it(recipe: str, tmp_path: Path) -> None:
    made = _arms(_overlay(tmp_path, recipe), "dense,learned,random")
    assert made["dense"].load(0).compression is None
    assert made["learned"].load(0) == load(recipe).recipe
    for name in ("dense", "random"):
        ours, shipped = made[name].load(0, ["baselines=[]"]), load(f"{recipe}_{name}", ["baselines=[]"]).recipe
        assert ours == shipped
        assert _arms(recipe, name)[name].source == f"{recipe}_{name}"


def test_overrides_are_for_every_arm_that_can_have_them_or_for_one() -> None:
    given = ["compression.stages.0.layer=3", "budget.target=0.8", "optimizer.router_lr=0.1", "seed=7"]
    arms = _arms(
        "vit_digits", "dense,learned,random,shorter=dense,half=learned@0.9", *given, "shorter:trainer.max_steps=9", "half:model.settings={}"
    )
    assert arms["dense"].load(7).trainer.max_steps == 500
    assert arms["shorter"].load(7).trainer.max_steps == 9
    for name, target in (("learned", 0.8), ("random", 0.8), ("half", 0.9)):
        recipe = arms[name].load(8)
        assert recipe.compression is not None
        assert recipe.budget is not None
        assert (recipe.compression.stages[0].layer, recipe.budget.target, recipe.optimizer.router_lr, recipe.seed) == (3, target, 0.1, 8)
    assert arms["half"].kind == "half"
    own = _arms("mae_digits_finetune", "a=dense,scratch=dense", "a:model.encoder_of=runs/a-{seed}", "seed=3")
    assert own["a"].load(4).model.encoder_of == "runs/a-4"
    assert own["scratch"].load(4).model.encoder_of == "runs/mae_digits"


def test_a_file_of_another_folder_is_an_arm(tmp_path: Path) -> None:
    mine = _overlay(tmp_path, "vit_digits_energy")
    assert (
        _arms("vit_digits", f"mine={mine}", "optimizer.lr=0.1")["mine"].load(0).compression == load("vit_digits_energy").recipe.compression
    )


def test_a_ratio_replaces_keeps_of_stages_and_of_methods() -> None:
    recipe = _arms("vlm_digits", "learned@0.8")["learned@0.8"].load(0)
    assert recipe.compression is not None
    assert recipe.budget is not None
    assert (recipe.budget.target, recipe.compression.stages[0].keep) == (0.8, None)
    recipe = _arms("vlm_digits", "dart,dart@0.9")["dart@0.9"].load(0)
    assert recipe.compression is not None
    assert (recipe.compression.stages[0].part("scorer").name, recipe.compression.stages[0].keep) == ("pivots", None)


def test_a_ratio_replaces_drawn_keeps_and_phases(tmp_path: Path) -> None:
    recipe = _arms("vit_digits_elastic", "learned,learned@0.5", "training_keep.full=0.1")["learned@0.5"].load(0)
    assert recipe.budget is not None
    assert (recipe.budget.target, recipe.training_keep) == (0.5, None)
    phased = tmp_path / "phased.yaml"
    phased.write_text(
        "base: vit_digits_dense\nbaselines: []\ncompression: {stages: [{layer: 1, scorer: random, selector: top_k}]}\n"
        "phases: [{share: 0.5, keep: 0.5}, {}]\n"
    )
    arms = _arms(str(phased), "learned,pooled,pooled@0.6,learned@0.6", *QUICK, "phases.0.share=0.4")
    found = {name: arm.load(0) for name, arm in arms.items()}
    assert [recipe.phases is None for recipe in found.values()] == [False, True, True, True]
    assert found["learned@0.6"].budget is not None
    # It answers with all tokens.
    keeps = [found[name].compression.stages[0].keep for name in ("pooled", "pooled@0.6")]  # type: ignore[union-attr]
    assert keeps[0] == 1.0
    assert keeps[1] < 0.8
    with pytest.raises(RecipeError, match="llm_patch_level has no compression"):
        _arms("llm_patch_level", "learned@0.5")


def test_smaller_inputs_have_as_many_tokens_as_the_compressed_arm() -> None:
    small = [*QUICK, "budget.measure=keep", "budget.target=0.25"]
    arms = _arms("vit_digits", "learned,pooled,downsampled,downsampled@0.9,random", *small)
    found = {name: validate(arm.load(0)) for name, arm in arms.items()}
    # 16 of 64 patches, and the CLS token.
    assert found["learned"].tokens == found["pooled"].tokens == found["downsampled"].tokens == [17, 17]
    assert found["downsampled"].dense_macs < 0.35 * found["learned"].dense_macs
    assert found["learned"].tokens < found["downsampled@0.9"].tokens
    recipe = arms["downsampled"].load(0)
    task = task_named(recipe.task)
    drawn = task.open_data(load("vit_digits", QUICK).recipe, model_config(load("vit_digits", QUICK).recipe.model, task))
    few = task.open_data(recipe, model_config(recipe.model, task))
    whole, half = drawn.train[3]["pixel_values"], few.train.__getitems__([3])[0]["pixel_values"]  # type: ignore[attr-defined]
    assert half.shape == (1, 16, 16)
    # Not a crop: what is bright is at the same place.
    blocks = whole.unfold(1, 2, 2).unfold(2, 2, 2).mean((-1, -2))
    assert (blocks - half).abs().mean() < 0.05 < blocks.std()
    assert few.train[3]["labels"] == drawn.train[3]["labels"]


@pytest.mark.parametrize("name", ["pooled", "downsampled"])
def test_no_smaller_input_has_a_teacher(tmp_path: Path, name: str) -> None:
    path = tmp_path / "taught.yaml"
    path.write_text("base: vit_digits_elastic\ndistillation: {teacher: self, milder: {start: 0.2, end: 0.4}, weight: 0.5}\n")
    main = load(str(path), QUICK)
    assert main.recipe.distillation is not None
    assert load(str(path), smaller_input(main, name, [*QUICK, "distillation.weight=0.3"])).recipe.distillation is None


WRONG = [
    ("vit_digits", "lerned", [], r"vit_digits has no such arm: there are dense, learned, .*did you mean learned\?"),
    ("vit_digits_dense", "learned", [], "has no compression, so that it is the arm dense"),
    ("vit_digits", "dense@0.5", [], "vit_digits_dense has no compression"),
    ("vit_digits", "learned@2", [], "@2 must be a macs_ratio between 0 and 1"),
    ("llm_pretrain", "pooled", [], "--arms pooled: task = causal_lm has no images whose patches could be pooled"),
    ("segment_digits", "downsampled", [], "task = semantic_segmentation cannot be given smaller images"),
    ("vit_digits_dense", "downsampled", [], "vit_digits_dense has no compression"),
    ("vit_digits", "dense,dense", [], "give each arm once"),
    ("vit_digits", "a b=dense", [], "a label has letters"),
    ("vit_digits", "dense", ["learned:seed=1"], "is for the arm learned, which is not among --arms dense"),
    ("vit_digits", "dense", ["output=here"], "give --output"),
    ("vit_digits", "dense", ["dense:trainer.bench_rounds=3"], "measure no speed by themselves; remove it"),
    ("vit_digits", "dense,random", ["random:seed=7"], "give seed=7 for all arms, or --seeds"),
    ("vit_digits", "longer=vit_image_folder_dense", [], "its data differs from that of vit_digits.*, or leave the arm out"),
    (
        "vit_digits",
        "dense,learned",
        ["learned:data.train_samples=9"],
        "arm learned: data.train_samples is 9, and the recipe's is .*set it for all arms",
    ),
    ("vit_digits", "mine=there/no.yaml", [], r"vit_digits has no such arm"),
    (
        "vit_digits",
        "energy",
        ["compression.stages=[{layer: 3}]"],
        "not comparable with the stages of the overrides: it has stages of its own",
    ),
    ("vit_digits", "random", ["compression.stages=[{layer: 3, selector: gumbel}]"], "selector 'gumbel', which decides by more than scores"),
]


@pytest.mark.parametrize(("recipe", "names", "overrides", "message"), WRONG, ids=[row[1] + row[0] for row in WRONG])
def test_an_arm_that_a_recipe_cannot_have_is_refused_with_what_is_allowed(
    recipe: str, names: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        arms_of(recipe, names.split(","), overrides)


def test_settings_of_a_comparison_are_checked_before_anything_trains(tmp_path: Path) -> None:
    for options, message in (
        (Options(["learned"], reference="dense"), "--reference dense is not among --arms learned"),
        (Options(["learned"], equal="macs"), "--equal macs must be one of steps, time"),
    ):
        with pytest.raises(RecipeError, match=message):
            plan("vit_digits", QUICK, options)
    with pytest.raises(RecipeError, match="arm random: .*layer = 9 must be an integer from 0 to 1"):
        plan("vit_digits", [*QUICK, "random:compression.stages.0.layer=9"], Options(["random"]))
    with pytest.raises(RecipeError, match=r"--jobs 2: trainer.devices = 2 × trainer.num_nodes = 1 processes train one run"):
        check_at_once(load("vit_digits", ["trainer.devices=2"]).recipe.trainer, 2)
    assert int(environment(0, 2)["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)


def _report(quality: float, seconds: float, keep: float | None) -> dict[str, Any]:
    of = {} if keep is None else {"before_0": keep}
    return {
        "quality": {
            "metric": "accuracy",
            "higher_is_better": True,
            "split": "test",
            "dense": quality if keep is None else None,
            "compressed": None if keep is None else quality,
        },
        "keep": {"requested": of, "achieved": of},
        "macs_ratio": 1.0 if keep is None else keep,
        "train_seconds": seconds,
    }


def _job(folder: Path, arm: str, seed: int, script: str, recipe: Recipe | None = None) -> Job:
    run = RunFolder(folder / f"{arm}-{seed}")
    run.path.mkdir(parents=True, exist_ok=True)
    return Job(arm, seed, recipe or load("vit_digits").recipe, 10, run, ("sh", "-c", script))


def _write(job: Job, report: dict[str, Any]) -> None:
    job.run.path.mkdir(parents=True, exist_ok=True)
    job.run.report.write_text(json.dumps(report))


def test_a_damaged_report_of_a_run_is_named_with_the_cure(tmp_path: Path) -> None:
    job = _job(tmp_path, "dense", 0, "")
    for damaged in ({}, {**_report(1.0, 1, None), "macs_ratio": None}, {**_report(1.0, 1, None), "keep": []}):
        _write(job, damaged)
        with pytest.raises(
            DamagedFile, match=r"dense-0/report\.json is damaged, or of another version .*: delete .* and repeat the command"
        ):
            results_of("digits", [Arm("dense", "dense", "", ())], [job], {"dense": 1.0}, "dense", "steps")


def test_the_table_the_data_and_the_plot_say_mean_spread_and_paired_difference(tmp_path: Path) -> None:
    arms = [Arm(name, name.partition("@")[0], "", ()) for name in ("dense", "learned", "learned@0.5", "small")]
    jobs = []
    for seed, (dense, learned) in enumerate([(0.9, 0.88), (0.8, 0.79), (0.7, 0.67)]):
        for arm, report in zip(
            arms,
            (_report(dense, 50, None), _report(learned, 20, 0.3), _report(learned, 30, 0.5), _report(0.5, 10, None)),
            strict=True,
        ):
            jobs.append(_job(tmp_path, arm.name, seed, ""))
            _write(jobs[-1], report)
    found = results_of("digits", arms, jobs, {"dense": 1.0, "learned": 1.0, "learned@0.5": 1.0, "small": 0.25}, "dense", "steps")
    learned = found.arms["learned"]
    assert found.arms["dense"].difference is None
    assert learned.difference is not None
    assert learned.difference.mean == pytest.approx(-0.02)
    assert learned.difference.interval == pytest.approx(4.302653 * 0.01 / 3**0.5, rel=1e-6)
    assert (learned.quality.mean, learned.macs.mean, learned.step_seconds) == (pytest.approx(0.78), pytest.approx(0.3), 2.0)
    # Its model is dense, of a smaller input.
    assert found.arms["small"].macs.mean == 0.25
    assert json.loads(json.dumps(found.to_dict()))["arms"]["learned"]["values"] == [0.88, 0.79, 0.67]
    assert found.csv().splitlines()[:2] == ["arm,seed,accuracy,macs_ratio,train_seconds,steps", "dense,0,0.9,1.0,50.0,10"]
    console = Console(width=160, record=True)
    console.print(found.table())
    assert "equal steps" in found.title
    longer = [replace(job, steps=20) if job.arm == "small" else job for job in jobs]
    assert "different steps" in results_of("digits", arms, longer, dict.fromkeys([arm.name for arm in arms], 1.0), "dense", "steps").title
    row = next(line for line in console.export_text().splitlines() if line.startswith("learned "))
    assert row.split()[1:] == [
        "0.7800",
        "0.6700",
        "–",
        "0.8800",
        "-0.0200",
        "±",
        "0.0248",
        "0.300",
        "0.300",
        "0.300",
        "10",
        "20",
        "2000",
        "ms",
    ]
    pictures = draw(found, tmp_path)
    assert [path.name for path in pictures] == ["compare.png", "compare.svg"]
    assert pictures[0].read_bytes().startswith(b"\x89PNG")
    assert "<svg" in pictures[1].read_text()


def test_whole_runs_are_kept_and_the_others_run_at_most_so_many_at_once(tmp_path: Path) -> None:
    def script(job: str) -> str:
        # Says how many runs it sees, itself included.
        return f"cd {tmp_path}; touch {job}/here; ls -d */here | wc -l > {job}/count; sleep 0.3; rm {job}/here; echo '{{}}' > {job}/report.json"

    jobs = [_job(tmp_path, "a", seed, script(f"a-{seed}")) for seed in range(5)]
    _write(jobs[1], {"kept": True})
    console = Console(width=200, record=True)
    run_all(jobs, 2, console)
    assert json.loads(jobs[1].run.report.read_text()) == {"kept": True}
    counts = {int((tmp_path / f"a-{seed}" / "count").read_text()) for seed in (0, 2, 3, 4)}
    assert max(counts) == 2
    said = console.export_text()
    assert "1 of 5 runs have ended before and are kept" in said
    assert said.count("begins") == 4
    assert "0 of 5 runs left" in said


def test_a_run_that_fails_is_named_with_what_it_said_and_the_others_are_asked_to_save(tmp_path: Path) -> None:
    jobs = [
        _job(tmp_path, "good", 0, f"trap 'touch {tmp_path}/saved; exit 143' TERM; for i in 1 2 3 4 5 6 7 8 9 10; do sleep 0.3; done"),
        _job(tmp_path, "bad", 3, "sleep 0.4; echo the data are gone >&2; exit 2"),
    ]
    with pytest.raises(Failed, match=r"(?s)bad, seed 3 ended with exit code 2\n.*\nthe data are gone"):
        run_all(jobs, 2, Console(quiet=True))
    assert (tmp_path / "saved").is_file()


def test_a_signal_lets_runs_save_and_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "StopSignals", lambda: StopAfter(4))
    jobs = [
        _job(tmp_path, "a", 0, f"trap 'touch {tmp_path}/saved; exit 143' TERM; for i in 1 2 3 4 5 6 7 8 9 10; do sleep 0.3; done"),
        _job(tmp_path, "a", 1, ""),
    ]
    with pytest.raises(Stopped, match="stopped by SIGTERM; repeat the same command to continue") as stopped:
        run_all(jobs, 1, Console(quiet=True))
    assert stopped.value.code == 143
    assert (tmp_path / "saved").is_file()


def test_time_left_is_that_of_runs_of_the_same_arm_and_is_shared_by_those_at_once() -> None:
    taken = [("dense", 100.0), ("learned", 20.0), ("dense", 120.0)]
    assert time_left(["dense", "learned"], [], taken, 1) == pytest.approx(130)
    # An arm that has not ended yet takes the mean of all.
    assert time_left(["other"], [("learned", 15.0)], taken, 2) == pytest.approx((80 + 5) / 2)
    assert time_left([], [], taken, 2) == 0


def test_a_run_with_other_settings_is_refused_by_the_key(tmp_path: Path) -> None:
    def jobs(*more: str) -> list[Job]:
        return jobs_of(arms_of("vit_digits", ["dense", "learned"], [*QUICK, *more])[1], [0], {"dense": 2, "learned": 2}, tmp_path)

    run = RunFolder(tmp_path / "learned-0")
    run.path.mkdir()
    _write(jobs()[1], {})
    run.recipe.write_text(dump(jobs()[1].recipe))
    assert [job.done for job in jobs("trainer.log_every=7")] == [False, True]
    with pytest.raises(RecipeError, match=r"cannot resume .*learned-0: trainer.max_steps was 2 and is now 3"):
        jobs("trainer.max_steps=3")
    with pytest.raises(RecipeError, match=r"learned-0: compression.stages.0.layer was 0 and is now 1;"):
        jobs("compression.stages.0.layer=1")
    # The dense arm has not begun: what is its own may change.
    assert len(jobs("dense:optimizer.lr=0.1")) == 2


@pytest.mark.slow
def test_a_comparison_keeps_the_whole_run_resumes_the_interrupted_one_and_writes_its_results(tmp_path: Path, console: Console) -> None:
    overrides = [*(item for item in QUICK if "max_steps" not in item), "trainer.max_steps=4", "trainer.checkpoint_every=2"]
    arms = _arms("vit_digits", "dense,learned", *overrides)
    folders = {name: tmp_path / f"{name}-0" for name in arms}
    given = {name: [*arm.overrides, "baselines=[]", "trainer.bench_rounds=0", f"output={folders[name]}"] for name, arm in arms.items()}
    train(load(arms["dense"].source, given["dense"]), given["dense"], console)
    train_until(2, load("vit_digits", given["learned"]), folders["learned"], console)
    kept = RunFolder(folders["dense"]).report.stat().st_mtime_ns
    done = CliRunner().invoke(
        app, ["compare", "vit_digits", "--arms", "dense,learned", "--seeds", "1", "--output", str(tmp_path), *overrides]
    )
    assert done.exit_code == 0, done.output
    assert RunFolder(folders["dense"]).report.stat().st_mtime_ns == kept
    assert "learned, seed 0: begins, goes on" in done.output
    log = RunFolder(folders["learned"]).log.read_text()
    assert [line.split("step ")[1][0] for line in log.splitlines() if "  step " in line and "loss" in line] == ["1", "2", "3", "4"]
    result = json.loads((tmp_path / "compare.json").read_text())
    assert set(result["arms"]) == {"dense", "learned"}
    assert {path.name for path in tmp_path.glob("compare.*")} == {f"compare.{kind}" for kind in ("json", "csv", "png", "svg", "html")}
    page = (tmp_path / "compare.html").read_text()
    # The reference is marked, and the plot is in the page.
    assert re.search(r'<tr class="marked"><th [^>]*>dense</th>', page)
    assert "<h1>Comparison of vit_digits</h1>" in page
    assert "the runs of seed 0, side by side" in page
    assert page.index("Comparison") < page.index("Curves")
    assert "data:image/png;base64" in page
    # Again: nothing is left to train.
    again = CliRunner().invoke(
        app, ["compare", "vit_digits", "--arms", "dense,learned", "--seeds", "1", "--output", str(tmp_path), *overrides, "--json"]
    )
    assert again.exit_code == 0
