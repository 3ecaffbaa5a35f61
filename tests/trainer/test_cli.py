"""The command line: exit codes, one JSON object, and messages without tracebacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from laconic.trainer.cli.app import COST_COLUMNS
from laconic.trainer.recipe.files import SHIPPED, load
from tests.clean import CleanProcesses


def _laconic(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A process that starts from nothing, as a user's."""
    return subprocess.run(
        [sys.executable, "-m", "laconic", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


Laconic = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def laconic(clean: CleanProcesses) -> Laconic:
    """The command in a clean process that starts at once."""
    return lambda *arguments: clean.module("laconic", arguments)


def test_help_answers_in_under_a_second() -> None:
    times = []
    for _ in range(3):
        # Of computing: a machine that does something else at the same time answers later.
        start = os.times()
        done = _laconic("--help")
        end = os.times()
        times.append(end.children_user + end.children_system - start.children_user - start.children_system)
        assert done.returncode == 0
        assert all(verb in done.stdout for verb in ("recipes", "validate", "train", "evaluate", "export", "cost", "bench", "env"))
    assert min(times) < 1
    assert (
        "torch"
        not in subprocess.run([sys.executable, "-X", "importtime", "-m", "laconic", "--help"], capture_output=True, text=True, check=True)
        .stderr.replace("torch.", "torch")
        .split()
    )


def test_a_wrong_key_exits_2_with_one_message() -> None:
    done = _laconic("validate", "vit_digits", "trainer.max_stps=3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.strip().count("\n") == 0
    assert "trainer.max_stps" in done.stderr
    assert "max_steps" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "vit_digit"), "did you mean vit_digits"),
        (("train", "vit_digits", "--resume", "none.ckpt"), "there is no such checkpoint"),
        (("evaluate", "nowhere"), "nowhere is not a folder"),
        (("export", "nowhere", "--to", "x"), "nowhere is not a folder"),
        (("cost",), "name either a recipe or --model"),
        (("bench", "vit_digits_dense"), "bench compares compressed with dense steps"),
    ],
)
def test_wrong_input_exits_2(arguments: tuple[str, ...], message: str, laconic: Laconic) -> None:
    done = laconic(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_and_its_evaluation_speak_json(tmp_path: Path, quick: list[str], laconic: Laconic) -> None:
    done = laconic("train", "vit_digits", *quick, "baselines=[]", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "run" / "report.json").read_text())
    evaluated = json.loads(laconic("evaluate", str(tmp_path / "run"), "--json").stdout)
    assert evaluated["variants"]["compressed"]["keep"] == json.loads(done.stdout)["keep"]["achieved"]


@pytest.mark.slow
def test_an_export_and_the_cost_of_a_recipe_and_its_run_speak_json(tmp_path: Path, quick: list[str], laconic: Laconic) -> None:
    run = str(tmp_path / "run")
    assert laconic("train", "vit_digits", *quick, "baselines=[]").returncode == 0
    exported = laconic("export", run, "--to", str(tmp_path / "out"), "--json")
    assert json.loads(exported.stdout)["format"] == "merged"
    costs = [json.loads(laconic(*call, "--json").stdout) for call in (("cost", "vit_digits", *quick), ("cost", "--model", run))]
    assert costs[0] == costs[1]
    assert {len(row) for row in costs[0]["layers"]} == {len(COST_COLUMNS)}
    assert costs[0]["macs"] == costs[0]["embed_macs"] + costs[0]["head_macs"] + sum(
        row["macs"] + row["stage_macs"] for row in costs[0]["layers"]
    )


@pytest.mark.slow
def test_recipes_env_validate_bench_and_dry_run_speak_json(tmp_path: Path, quick: list[str], laconic: Laconic) -> None:
    assert "vit_digits" in json.loads(laconic("recipes", "--json").stdout)["image_classification"]
    assert json.loads(laconic("recipes", "vit_digits", "--json").stdout)["task"] == "image_classification"
    copied = tmp_path / "mine.yaml"
    assert laconic("recipes", "vit_digits", "--copy", str(copied)).returncode == 0
    assert set(json.loads(laconic("validate", str(copied), *quick, "--json").stdout)) == {"mine", "vit_digits_dense", "vit_digits_random"}
    assert json.loads(laconic("env", "--json").stdout)["torch"]
    sizes = [item for item in quick if not item.startswith("trainer.bench_rounds")]
    measured = json.loads(laconic("bench", "vit_digits", *sizes, "--rounds", "2", "--json").stdout)
    assert measured["rounds"] == 2
    assert set(json.loads(laconic("train", "vit_digits", *quick, "--dry-run", "--json").stdout)) >= {"vit_digits"}


def test_recipes_are_listed_by_task_and_control_arms_on_request(laconic: Laconic) -> None:
    files = {path.stem: path for path in SHIPPED.glob("*.yaml")}
    shown, whole = (json.loads(laconic("recipes", *options, "--json").stdout) for options in ((), ("--all",)))
    assert {name: line for lines in whole.values() for name, line in lines.items()} == {
        name: path.read_text().partition("\n")[0].lstrip("# ") for name, path in files.items()
    }
    assert all(load(name).recipe.task == task for task, lines in whole.items() for name in lines)
    arms = {arm for path in files.values() for arm in yaml.safe_load(path.read_text()).get("baselines", [])}
    arms |= {name for name, path in files.items() if path.read_text().startswith("# Control arm of ")}
    assert arms >= {"vit_digits_dense", "vit_digits_uniform", "vit_image_folder_random"}
    assert {name for lines in shown.values() for name in lines} == files.keys() - arms
    assert all(lines.items() <= whole[task].items() for task, lines in shown.items())
    printed = laconic("recipes").stdout.splitlines()
    assert [line for line in printed if not line.startswith(" ")] == [*shown, f"{len(arms)} control arms are not listed; --all lists them"]
    assert sum(line.startswith("  ") for line in printed) == len(files) - len(arms)


def test_listing_recipes_imports_neither_torch_nor_transformers() -> None:
    code = """
import sys
from laconic.trainer.cli.app import recipes
recipes(as_json=False)
recipes(with_controls=True)
assert not {"torch", "transformers", "lightning"} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "vit_digits_dense" in done.stdout


def test_a_failing_run_exits_1(tmp_path: Path, quick: list[str], laconic: Laconic) -> None:
    done = laconic("train", "vit_digits", *quick, "baselines=[]", "optimizer.lr=1e30", "trainer.max_steps=30", "trainer.clip=0")
    assert done.returncode == 1
    assert "not finite" in done.stderr
    assert "Traceback" not in done.stderr
