"""Runs compared answer by answer."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from laconic.data.chats.splits import ChatColumns, ChatData, ChatRows
from laconic.modules.checkpoints.whole_files import DamagedFile
from laconic.trainer.cli.app import app
from laconic.trainer.errors import RecipeError
from laconic.trainer.losses.answer_loss import AnswerLoss
from laconic.trainer.measure.answers import compare, read_answers, write_answers
from laconic.trainer.metrics.answers import AnswerAccuracy
from laconic.trainer.metrics.quality import Answered
from laconic.trainer.run_folder import RunFolder


def _run(folder: Path, right: str, reference: str = "It is that one.") -> str:
    """A run with four rows of two answers each, of which those marked 1 are right."""
    folder.mkdir()
    kinds = ("reading", "counting")
    write_answers(
        RunFolder(folder).answers,
        [
            Answered(at // 2, at % 2, kinds[at % 2], mark == "1", (at if mark == "1" else 100,), f"Which number is {at}?", reference)
            for at, mark in enumerate(right)
        ],
    )
    return str(folder)


def test_single_answers_are_noted_with_row_turn_kind_tokens_and_texts(tmp_path: Path) -> None:
    logits = torch.eye(4)[[3, 1, 2, 0]]
    # Row 7: an answer of two tokens and one of one; row 9: one answer.
    out = AnswerLoss(
        torch.tensor(1.0), logits, torch.tensor([True, False, True, True]), torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 0]), logits
    )
    one, other = AnswerAccuracy(), AnswerAccuracy()
    one.add(out, {"kinds": torch.tensor([[1, 0], [0, -1]]), "sample_ids": torch.tensor([9, 7])})
    other.merge(one)
    chat = [
        {"role": "system", "content": "Look."},
        {"role": "user", "content": "<image>\nHow many? "},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": [{"type": "text", "text": "Which?"}]},
        {"role": "assistant", "content": "3 and 5."},
    ]
    rows = ChatRows([{"messages": chat}] * 10, ChatColumns("messages", None), None, tmp_path)  # type: ignore[arg-type]
    data = ChatData(rows, rows, rows, processor=None, length=8, kinds=("reading", "counting"))
    assert other.answered(data) == [
        Answered(7, 0, "reading", True, (0,), "Look.\nHow many?", "Two."),
        Answered(9, 0, "counting", False, (3, 1), "Look.\nHow many?", "Two."),
        Answered(9, 1, "reading", True, (2,), "Which?", "3 and 5."),
    ]


def test_differences_are_paired_and_hard_questions_are_those_that_smaller_images_lose(tmp_path: Path) -> None:
    dense, routed = _run(tmp_path / "dense", "11111101"), _run(tmp_path / "routed", "11101100")
    small = _run(tmp_path / "small", "10101000")
    found = compare(dense, [routed], small)
    assert found[dense].difference == 0.0
    assert (found[dense].interval, found[dense].agreement, found[dense].hard, found[dense].easy) == (0.0, 1.0, 1.0, 1.0)
    paired = found[routed]
    assert paired.accuracy == {"all": 5 / 8, "counting": 2 / 4, "reading": 3 / 4}
    assert paired.difference == -2 / 8
    # Hard: answers 1, 3, 5, 7; easy: 0, 2, 4. Answer 6 is wrong in the dense model.
    assert (paired.hard, paired.easy) == (2 / 4, 3 / 3)
    assert paired.agreement == 6 / 8
    # By row the differences are 0, -1, 0, -1 of two answers each.
    residuals = [0.5, -0.5, 0.5, -0.5]
    assert paired.interval == pytest.approx(1.96 * math.sqrt(sum(x * x for x in residuals) * 4 / 3) / 8)


def test_other_questions_and_runs_without_answers_are_refused(tmp_path: Path) -> None:
    dense = _run(tmp_path / "dense", "1111")
    with pytest.raises(RecipeError, match="different questions"):
        compare(dense, [_run(tmp_path / "other", "111111")])
    with pytest.raises(
        RecipeError, match=r"row 0, answer 0: 'Which number is 0\?' \('Neither.'\) and 'Which number is 0\?' \('It is that one.'\)"
    ):
        compare(dense, [_run(tmp_path / "corrected", "1111", "Neither.")])
    (tmp_path / "none").mkdir()
    with pytest.raises(RecipeError, match=r"has no answers\.jsonl"):
        read_answers(tmp_path / "none")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"line 1: Invalid JSON"),
        ("{}\n", r"line 1: row: Field required"),
        ("[1]\n", r"line 1: Input should be an object"),
        ('{"row": 0, "turn": 0, "kind": "", "right": tr', r"line 1: Invalid JSON"),
        ("GOOD" + '{"row": "x", "turn": 0, "kind": "", "right": true, "tokens": [1], "question": "", "reference": ""}\n', r"line 5: row: "),
    ],
)
def test_damaged_answers_are_named_with_their_line(content: str, message: str, tmp_path: Path) -> None:
    path = RunFolder(Path(_run(tmp_path / "run", "1111"))).answers
    path.write_text(content.replace("GOOD", path.read_text()))
    with pytest.raises(DamagedFile, match=rf"answers\.jsonl is damaged in {message}.*train again"):
        read_answers(tmp_path / "run")


def test_a_share_of_no_answers_is_none(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", "1111")
    # The smaller model has all of them right: no question is hard.
    result = CliRunner().invoke(app, ["answers", run, run, "--downsampled", run])
    assert result.exit_code == 0, result.output
    assert "–  1.000" in result.stdout
    assert compare(run, [], run)[run].hard is None


def test_the_command_prints_a_table(tmp_path: Path) -> None:
    dense, routed = _run(tmp_path / "dense", "1111"), _run(tmp_path / "routed", "1101")
    result = CliRunner().invoke(app, ["answers", dense, routed])
    assert result.exit_code == 0
    assert "-0.250 ± 0.490" in result.stdout
