"""What ``laconic inspect`` writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from laconic import Trace
from laconic.trainer.evaluate import inspect_run
from laconic.trainer.recipe.files import load
from laconic.trainer.run import train_arm
from laconic.trainer.run_folder import RunFolder
from laconic.trainer.show.inspection import kept_by_stage, page
from tests.matrix import METHODS, compressed, images, inputs


def test_the_page_of_kept_tokens_says_what_every_stage_did() -> None:
    model, trace = compressed("vit", METHODS[0], 0.5, 0.6), Trace()
    with torch.no_grad():
        model(**inputs(model, images(2)), trace=trace)
    kept = kept_by_stage(trace)
    assert trace.state is not None
    assert list(kept) == list(trace.routings)
    last = trace.routings[list(kept)[-1]]
    assert [int(row.sum()) for row in kept[last.stage]] == [last.decision.index.shape[1]] * 2
    text = page("a <b>", ["if", " x<", " y"], {"one": [True, False, True], "two": [True, False, False]}, {"one": 0.5, "two": 0.25})
    assert "a &lt;b&gt;" in text
    assert 'title="token 0: one, two">if</span>' in text
    assert 'title="token 1: no stage"> x&lt;</span>' in text
    assert "<td>two</td><td>0.250</td><td>0.333</td><td>1 of 3</td>" in text


def test_pictures_of_a_run_on_images_show_what_it_keeps(tmp_path: Path, quick: list[str], console: Console) -> None:
    arm = train_arm(load("vit_digits", quick), "arm", tmp_path / "run", console).arm
    run = str(tmp_path / "run")
    kept = inspect_run(run, RunFolder.open(run).read_recipe(), None, tmp_path / "kept.png")
    assert kept == pytest.approx(arm.keep["achieved"])
    assert Image.open(tmp_path / "kept.png").size[0] > 100
    with pytest.raises(ValueError, match=r"--to .*kept.html: pictures of kept tokens need the suffix .png"):
        inspect_run(run, RunFolder.open(run).read_recipe(), None, tmp_path / "kept.html")
    with pytest.raises(ValueError, match="--input is for text"):
        inspect_run(run, RunFolder.open(run).read_recipe(), "some text", tmp_path / "kept.png")
