"""Results are saved before they are drawn, where nothing of a user's is written over, and names are shown as they are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from typer.testing import CliRunner

from laconic.trainer import run
from laconic.trainer.cli.app import app
from laconic.trainer.errors import RecipeError
from laconic.trainer.probe.planning import PlanOptions, check_plan
from laconic.trainer.recipe.files import load
from laconic.trainer.show.figures import plain, save
from laconic.trainer.show.optional import optional
from laconic.trainer.show.target import check_target
from tests.matrix import METHODS, compressed


@pytest.mark.parametrize("name", ["$\\frac$", "a$b$\\frac{c", "_x", "$", "\\$a$"])
def test_names_of_users_are_no_formulas_and_no_hidden_labels(name: str, tmp_path: Path) -> None:
    figure = Figure()
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([0, 1], label=plain(name))
    legend, title = axes.legend(), axes.set_title(plain(name))
    save(figure, [tmp_path / "a.png", tmp_path / "a.svg"], dpi=50)
    assert [len(legend.get_texts()), title._preprocess_math(title.get_text())] == [1, (plain(name).replace("\\$", "$"), False)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.svg"]


def test_a_figure_that_cannot_be_drawn_leaves_the_older_file_and_costs_one_line(tmp_path: Path) -> None:
    class Broken:
        def savefig(self, file: Any, **settings: Any) -> None:
            file.write(b"half")
            raise RuntimeError("no [font]")

    (tmp_path / "a.png").write_bytes(b"old")
    console = Console(record=True, width=80, file=(tmp_path / "shown").open("w"), markup=False)
    with optional("plot was drawn", console):
        save(Broken(), [tmp_path / "a.png"], dpi=50)
    assert console.export_text() == "no plot was drawn: RuntimeError: no [font]\n"
    assert (tmp_path / "a.png").read_bytes() == b"old"


def test_a_file_of_results_is_checked_before_they_are_measured(tmp_path: Path) -> None:
    check_target("--to", tmp_path / "new" / "a.json", ("points",))
    assert list((tmp_path / "new").iterdir()) == []
    report, earlier = tmp_path / "report.json", tmp_path / "earlier.json"
    report.write_text('{"quality": {}}')
    earlier.write_text('{"points": [], "unit": "tokens"}')
    check_target("--to", earlier, ("points",))
    for path, message in (
        (report, "exists, and no such command wrote it"),
        (tmp_path, "is a folder"),
        (report / "a.json", "cannot be written: (Not a directory|File exists)"),
    ):
        with pytest.raises(RecipeError, match=f"--to: {path} {message}"):
            check_target("--to", path, ("points",))
    options = PlanOptions.of("macs_ratio=0.5", report.rename(tmp_path / "mine.yaml"), None, True, "", "update")
    with pytest.raises(RecipeError, match="exists, and no plan wrote it"):
        check_plan(_Dense(), options, [])  # type: ignore[arg-type]


class _Dense:
    """What ``check_plan`` asks of a probe first."""

    meter = type("Meter", (), {"config": None})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "nowhere", "--keep", "0.5", "--plot", "{folder}/report.png"], "report.json exists, and no such command wrote it"),
        (["evaluate", "nowhere", "--keep", "0.5", "--plot", "{folder}/report.json/a.png"], "cannot be written"),
        (["bench", "vit_digits", "--to", "a.json"], "--to a.json is a file for the measurements at --lengths, and none are given"),
        (["bench", "vit_digits", "trainer.bench_rounds=5"], "trainer.bench_rounds=5 has no effect: bench measures --rounds rounds"),
        (["probe", "nowhere", "--to", "a.png"], "--to a.png must end in .json"),
        (["probe", "nowhere", "--shortcut", "linear"], "--shortcut is of a plan, and --plan is not given"),
        (["probe", "nowhere", "--no-halves"], "--no-halves is of a plan, and --plan is not given"),
        (["probe", "nowhere", "--base", "llm_lora"], "--base is of a plan, and --plan is not given"),
    ],
    ids=lambda given: " ".join(given[:6]) if isinstance(given, list) else "",
)
def test_options_without_effect_and_files_that_cannot_be_written_are_refused_first(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "report.json").write_text(json.dumps({"quality": 1}))
    done = CliRunner().invoke(app, [item.format(folder=tmp_path) for item in arguments])
    assert (done.exit_code, message in done.output) == (2, True), done.output
    assert os.listdir(tmp_path) == ["report.json"]


def test_a_closing_measurement_that_fails_costs_no_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(run, "bench_models", fails)
    trained: Any = SimpleNamespace(parts=SimpleNamespace(model=compressed("vit", METHODS[0], 0.5, 0.6)))
    console = Console(record=True, width=100, file=(tmp_path / "shown").open("w"))
    assert run._bench({"arm": trained}, load("vit_digits").recipe, console) is None
    assert console.export_text() == "no speed was measured: RuntimeError: CUDA out of memory\n"
