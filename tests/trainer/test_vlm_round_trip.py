"""From training to an adapter, merged weights and a standalone folder: the same greedy answers, also where there is no Laconic."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoProcessor

import laconic
from laconic.data.embedded.digit_questions import DigitQuestions
from laconic.trainer.export.export import export
from laconic.trainer.recipe.files import load
from laconic.trainer.run import train
from tests.trainer.small_recipes import small
from tests.trainer.test_vision_language import QUICK

pytestmark = pytest.mark.slow
_GENERATE = """
import sys
import torch
sys.modules["laconic"] = None
from transformers import AutoModelForImageTextToText
given = torch.load(sys.argv[2], weights_only=True)
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
torch.save(model.generate(**given, max_new_tokens=6, min_new_tokens=6, do_sample=False), sys.argv[3])
"""


@pytest.mark.parametrize("stages", [[], ["compression.method=pyramiddrop", "compression.layer=0.5"]])
def test_an_adapter_merged_weights_and_a_folder_without_laconic_give_the_same_answers(
    stages: list[str], tmp_path: Path, console: Console
) -> None:
    overrides = [*small("vlm_digits", tmp_path, QUICK), *stages, "lora={r: 4}", f"output={tmp_path / 'run'}"]
    train(load("vlm_digits", overrides), overrides, console)
    assert (tmp_path / "run" / "adapter").is_dir()
    assert (tmp_path / "run" / "kept_tokens.png").is_file()
    for form in ("merged", "standalone"):
        export(str(tmp_path / "run"), str(tmp_path / form), form)
    processor = AutoProcessor.from_pretrained(tmp_path / "merged", backend="pil")
    rows = [DigitQuestions("test", 6)[index] for index in range(4)]
    processor.tokenizer.padding_side = "left"
    texts = [processor.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True) for row in rows]
    # Rows of different lengths: the last one asks for more.
    texts[-1] = texts[-1].replace("digits", "digits, if any,")
    given = dict(processor(text=texts, images=[row["images"] for row in rows], padding=True, return_tensors="pt"))
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    answers = [laconic.from_pretrained(tmp_path / name).eval().generate(**given, **how) for name in ("run", "merged")]
    assert torch.equal(*answers)
    torch.save(given, tmp_path / "given.pt")
    arguments = [str(tmp_path / name) for name in ("standalone", "given.pt", "made.pt")]
    done = subprocess.run(
        [sys.executable, "-c", _GENERATE, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.equal(torch.load(tmp_path / "made.pt", weights_only=True), answers[0])
