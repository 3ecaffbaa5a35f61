"""Runs that take seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from laconic.data.embedded import function_prompts, python_passages
from tests.clean import CleanProcesses

QUICK = [
    "trainer.max_steps=2",
    "trainer.log_every=1",
    "trainer.bench_rounds=0",
    "model.config.hidden_size=16",
    "model.config.num_hidden_layers=2",
    "model.config.intermediate_size=32",
    "data.batch_size=8",
    "data.train_samples=64",
    "data.eval_samples=16",
]


@pytest.fixture
def quick(tmp_path: Path) -> list[str]:
    """Overrides that make a digit recipe tiny and keep its run in the test's folder."""
    return [*QUICK, f"output={tmp_path / 'run'}"]


@pytest.fixture
def console() -> Console:
    return Console(stderr=True, width=160)


@pytest.fixture
def few_passages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded passages are cut from a small part of the library: tokenizing all of it takes seconds, every time."""
    for name in ("_OF_CLASS", "_AROUND"):
        most = getattr(python_passages, name)
        monkeypatch.setattr(python_passages, name, most // 5)


@pytest.fixture
def few_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded prompts are about functions of few files: parsing all of the library takes seconds, every time."""
    files = function_prompts.library_files
    monkeypatch.setattr(function_prompts, "library_files", lambda split, root=None: files(split, 12, root))


@pytest.fixture
def quick_exports(clean: CleanProcesses, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports are verified in clean processes that start at once. One test of each format starts them as users do, without this."""
    monkeypatch.setattr("laconic.trainer.export.verify.run_python", clean.python)


@pytest.fixture(scope="session")
def two_processes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of all that tests want of two processes, in one launch. Modules that need it are in one group, so in one worker."""
    from tests.trainer.two_ranks import launch

    modules = {item.module.__name__.rpartition(".")[2] for item in request.session.items if isinstance(item, pytest.Function)}
    wanted = {
        "strategies": "test_strategies",
        "settings": "test_strategy_settings",
        "lora": "test_lora_ranks",
        "recipes": "test_recipes_ranks",
    }
    folder = tmp_path_factory.mktemp("two")
    launch(folder, [part for part, module in wanted.items() if module in modules])
    return folder
