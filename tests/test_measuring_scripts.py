"""Scripts that measure, at tiny sizes: that they run, and say what their table has."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from laconic.trainer.measure import bench
from tests.loaded_script import loaded_script


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``scripts/oracle`` as a module, with small models."""
    monkeypatch.setattr(bench, "WARM_UP_ROUNDS", 0)
    module = loaded_script("oracle")
    module.VIT.update(width=32, heads=2, depth=4, image=32, rows=2)
    module.LLAMA.update(width=32, heads=2, kv_heads=2, mlp=48, depth=2, vocab=64, rows=2, length=48)
    return module


@pytest.mark.slow
def test_every_arm_is_measured_against_its_oracle(oracle: Any, capsys: pytest.CaptureFixture[str]) -> None:
    oracle.main(["--rounds", "1", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert set(found) == set(oracle.ARMS)
    for arm in found.values():
        assert arm["rounds"] == 1
        assert 0 < arm["of oracle"]["low"] <= arm["of oracle"]["high"]
        assert arm["memory"] > 0


@pytest.mark.slow
def test_compiled_steps_are_one_graph(oracle: Any, capsys: pytest.CaptureFixture[str]) -> None:
    oracle.main(["llama", "--rounds", "1", "--compiled"])
    assert "graphs 1 " in capsys.readouterr().out


def test_an_arm_that_does_not_exist_is_refused(oracle: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        oracle.main(["lamma"])
    assert "lamma: arms are tome, learned, evidence, threshold, llama" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        oracle.main(["threshold", "--compiled"])
    assert "threshold: arms with --compiled are tome, learned, evidence, llama" in capsys.readouterr().err


def test_the_ratio_script_runs_what_something_holds_and_tables_the_gaps() -> None:
    ratio = loaded_script("ratio")
    options = SimpleNamespace(
        selectors=["gumbel", "calibrated"], regularizers=["ratio_mse", "none"], controllers=["augmented_lagrangian", "fixed"]
    )
    kinds = ratio._kinds(options)
    # A fixed penalty of nothing holds nothing, and a threshold that follows its scores needs neither.
    assert kinds == [
        ("gumbel", "ratio_mse", "augmented_lagrangian"),
        ("gumbel", "ratio_mse", "fixed"),
        ("gumbel", "none", "augmented_lagrangian"),
        ("calibrated", "none", "none"),
    ]
    rows = [
        {"selector": selector, "regularizer": regularizer, "controller": controller, "target": target, "achieved": target + 0.01 * number}
        for number, (selector, regularizer, controller) in enumerate(kinds)
        for target in (0.1, 0.5)
    ]
    table = ratio._table(rows)
    assert [list(column.cells) for column in table.columns][-1] == ["+0.000", "+0.010", "+0.020", "+0.030"]
    figure = ratio._plot(rows)
    assert [axes.get_title() for axes in figure.axes] == ["gumbel", "holds the count itself"]
    assert [line.get_label() for line in figure.axes[0].lines] == [
        "ratio_mse, augmented_lagrangian",
        "ratio_mse, fixed",
        "augmented_lagrangian",
    ]
