"""The page of ``laconic report``."""

from __future__ import annotations

import itertools
import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from rich.console import Console
from tensorboard.summary.writer import event_file_writer

from laconic.modules.checkpoints.whole_files import DamagedFile
from laconic.trainer.errors import RecipeError
from laconic.trainer.measure.report import Arm, Report
from laconic.trainer.report_page.curves import POINTS, curves_of
from laconic.trainer.report_page.page import write_page
from laconic.trainer.run import _write_page
from laconic.trainer.run_folder import RunFolder
from tests.trainer.browser import browser

ATTACK = "<script>document.title='taken'</script>\"'><img src=x onerror=document.title='taken'>&amp;"
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Elements of a page with their attributes, and its text; fails where tags are not closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(path.read_text())
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data + "\n"

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def _layer(index: int) -> dict[str, object]:
    return {
        "stack": None, "layer": str(index), "stage": "before_1" if index == 1 else None, "tokens": 65 - 30 * index, "mlp_tokens": 65 - 30 * index,
        "macs": 1000 - 400 * index, "dense_macs": 1000, "stage_macs": 10 * index,
    }  # fmt: skip


def _run(folder: Path, name: str = "run", *, ended: bool = True, text: str = "plain", lr: float = 0.1, steps: int = 12) -> Path:
    """A run folder as training leaves it, with one control arm."""
    where = folder / name
    for path, loss in ((where, 1.0), (where / "baselines" / "the_dense", 2.0)):
        path.mkdir(parents=True)
        (path / "recipe.yaml").write_text(yaml.safe_dump({"task": text, "seed": 0, "optimizer": {"lr": lr}, "note": text}))
        logger = TensorBoardLogger(path, name="tensorboard", version="")
        for step in range(1, steps + 1):
            scalars = {"train/loss": loss / step, "before_1/keep_requested": 0.5, "before_1/keep_achieved": 0.5 + 0.1 / step}
            logger.log_metrics({**scalars, "train/lr": lr, "budget/penalty/before_1": 10.0, "new/one": math.nan if step < 3 else 1.0}, step)
        logger.finalize("success")
    if ended:
        arm = Arm("the_dense", 0.7, {"requested": {}, "achieved": {}}, 1.0, 1.0, 3.0, step_seconds=0.02, speedup=1.0, remarks=[text])
        Report(
            recipe=text, task="image_classification", seed=0, macs_ratio=0.6, mean_token_fraction=0.7, train_seconds=2.0,
            quality={"metric": "accuracy", "split": "test", "dense": 0.7, "compressed": 0.6543, "iou": {text: 0.25}, "loss": 1.5},
            keep={"requested": {"before_1": 0.5}, "achieved": {"before_1": 0.51}}, step_time={"compressed": 0.01, "speedup": 2.0, "paired": None},
            peak_memory={"kind": "saved_for_backward", "compressed": 2**20}, baselines={"dense": vars(arm)}, versions={"torch": text},
            cost={"macs_ratio": 0.6, "mean_token_fraction": 0.7, "layers": [_layer(0), _layer(1)]}, data={"classes": [text]}, bad_rows=text,
        ).save(where / "report.json")  # fmt: skip
        Image.new("RGB", (400, 60), "white").save(where / "kept_tokens.png")
    return where


def test_a_page_needs_no_other_file_and_is_well_formed(tmp_path: Path) -> None:
    run = _run(tmp_path)
    write_page([run], run / "report.html")
    page = Page(run / "report.html")
    addresses = [value for _, attributes in page.elements for key, value in attributes.items() if key in ("src", "href", "srcset", "data")]
    assert all(address is not None and address.startswith(("#", "data:image/png;base64,")) for address in addresses)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {f"#{name}" for name in ids} == {attributes["href"] for attributes in page.all("a")}
    assert all(attributes.get("alt") for attributes in page.all("img"))
    levels = [int(tag[1]) for tag, _ in page.elements if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(levels))
    assert levels.count(1) == 1


def test_a_run_is_shown_with_its_control_arms_curves_cost_and_recipe(tmp_path: Path) -> None:
    run = _run(tmp_path)
    write_page([run], run / "report.html")
    page = Page(run / "report.html")
    for shown in (
        "0.6543",
        "0.7000",
        "2.00×",
        "1.0 MiB",
        "before_1/keep",
        "run, requested",
        "dense, achieved",
        "optimizer.lr",
        "61 % of dense",
    ):
        assert shown in page.text or any(shown in str(attributes.get("aria-label")) for _, attributes in page.elements), shown
    lines = [attributes for attributes in page.all("polyline") if "dashed" in str(attributes["class"])]
    # Requested keep of the run and of its control arm, in two colours.
    assert [str(line["class"]).split()[1] for line in lines] == ["c0", "c1"]
    assert [attributes["aria-label"] for attributes in page.all("svg") if str(attributes.get("aria-label")).startswith("train/loss")] == [
        "train/loss over training steps; at the end: run 0.08333, dense 0.1667"
    ]
    assert "new/one" in page.text


def test_an_unknown_cost_of_training_is_left_out(tmp_path: Path) -> None:
    run = _run(tmp_path)
    written = json.loads((run / "report.json").read_text())
    assert written["baselines"]["dense"]["train_macs_ratio"] == 1.0
    written["baselines"]["dense"]["train_macs_ratio"] = None
    (run / "report.json").write_text(json.dumps(written))
    write_page([run], run / "report.html")
    assert "macs_ratio, mean over training" not in Page(run / "report.html").text


def test_text_of_runs_stays_text(tmp_path: Path) -> None:
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    run = _run(folder, text=ATTACK)
    write_page([run], run / "report.html")
    page = Page(run / "report.html")
    assert not page.all("script")
    assert [attributes.get("onerror") for attributes in page.all("img")] == [None]
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    # Remark, class in two tables, recipe in two keys, version, bad rows.
    assert page.text.count(ATTACK) >= 6
    assert "<img src=x onerror=alert(1)>" in page.text


def test_several_runs_share_charts_and_one_table_and_their_differences_are_marked(tmp_path: Path) -> None:
    runs = [_run(tmp_path / "one", "run"), _run(tmp_path / "two", "run", lr=0.2), _run(tmp_path, "third", ended=False)]
    write_page(runs, tmp_path / "all.html")
    page = Page(tmp_path / "all.html")
    assert page.text.count("train/loss") == 1
    losses = next(attributes["aria-label"] for attributes in page.all("svg") if str(attributes.get("aria-label")).startswith("train/loss"))
    # Runs whose folders are named alike are told apart by their paths.
    assert str(losses).count(" 0.08333") == 3
    assert all(f"{name} 0.08333" in str(losses) for name in (runs[0], runs[1], "third"))
    assert f"{runs[0]}: dense" in page.text
    differing = page.text[page.text.index("Keys that differ") : page.text.index("Recipe\n")]
    assert "optimizer.lr" in differing
    assert "0.2" in differing
    assert "seed" not in differing
    assert sum(attributes.get("class") == "marked" for attributes in page.all("tr")) == 1
    assert "the run has not ended, or is a control arm" in page.text


def test_what_is_no_run_or_damaged_is_refused_with_its_place(tmp_path: Path) -> None:
    run = _run(tmp_path)
    with pytest.raises(RecipeError, match=r"nothing has no recipe.yaml: name the folder of a run"):
        write_page([run, tmp_path / "nothing"], tmp_path / "page.html")
    with pytest.raises(RecipeError, match="run is given twice"):
        write_page([run, run / "."], tmp_path / "page.html")
    report = RunFolder(run).report
    report.write_text(report.read_text().replace('"macs": 600', '"macs": "many"'))
    with pytest.raises(DamagedFile, match=r"report.json is damaged, or of another version: 1.macs: .*train again"):
        write_page([run], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_page_that_cannot_be_written_is_one_line_and_no_error(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("seed: 0\n")
    (tmp_path / "report.json").write_text("[]")
    console = Console(record=True, width=200, file=(tmp_path / "shown").open("w"))
    assert _write_page(RunFolder(tmp_path), console) is None
    assert console.export_text().startswith("no page was written: DamagedFile: ")


def test_a_resumed_runs_curves_hold_each_step_once_as_it_was_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, (first, value) in enumerate(((1, 1.0), (3, 2.0))):
        logger = TensorBoardLogger(tmp_path, name="tensorboard", version="")
        # As of the ninth and tenth file of a process, whose names are in another order.
        monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(9 + number))
        for step in range(first, first + 4):
            logger.log_metrics({"train/loss": math.inf if first == 3 and step in (4, 6) else value}, step)
        logger.finalize("success")
    curve = curves_of(RunFolder(tmp_path))["train/loss"]
    # Not the value that the run had at step 4 before it went back.
    assert (curve.steps, curve.values) == ([1, 2, 3, 5], [1, 1, 2, 2])


def test_long_curves_are_means_of_neighbours_and_csv_files_serve_too(tmp_path: Path) -> None:
    number = 4 * POINTS
    logger = CSVLogger(tmp_path, name="csv")
    for step in range(number):
        logger.log_metrics({"train/loss": float(step % 4)}, step)
    logger.save()
    curve = curves_of(RunFolder(tmp_path))["train/loss"]
    assert curve.steps == [4 * group + 1.5 for group in range(POINTS)]
    assert curve.values == [1.5] * POINTS
    assert curve.last == 3


@pytest.mark.slow
def test_a_browser_shows_the_page_without_complaint_at_the_width_of_a_phone_and_of_a_desk(tmp_path: Path) -> None:
    run = _run(tmp_path, text=ATTACK + "long" * 200)
    write_page([run], run / "report.html")
    with browser(tmp_path / "profile") as tab:
        for width in (390, 1280):
            tab.visit(run / "report.html", width)
            assert tab.value("innerWidth") == width
            assert tab.value("document.documentElement.scrollWidth") <= width
            assert tab.value("document.title") == "run: report of Laconic"
            # What is too wide scrolls in its own box.
            assert tab.value("[...document.querySelectorAll('.scroll')].some(box => box.scrollWidth > box.clientWidth)")
            assert tab.value("[...document.images].every(image => image.naturalWidth > 0)")
    assert tab.complaints == []


def test_lines_of_a_csv_file_that_a_kill_has_cut_are_left_out(tmp_path: Path) -> None:
    for version in ("version_0", "version_x"):
        (tmp_path / "csv" / version).mkdir(parents=True)
        (tmp_path / "csv" / version / "metrics.csv").write_bytes(b"train/loss,step\n3.0,1\n2.0,2\n1.0\nx,3\n1.0,y\n4,5,6\n\0\xff")
    curve = curves_of(RunFolder(tmp_path))["train/loss"]
    assert (curve.steps, curve.values) == ([1, 2, 5], [3.0, 2.0, 4.0])
