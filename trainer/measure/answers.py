"""Runs compared answer by answer on the same held-out questions: accuracy, agreement and paired differences, hard and easy questions apart."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from ...modules.checkpoints.whole_files import DamagedFile, write_file
from ..errors import RecipeError, first_fault
from ..metrics.quality import Answered
from ..run_folder import RunFolder

# Two-sided 95 % of a normal distribution.
_NORMAL = 1.96
# Characters of a text in a message.
_SHOWN = 60
Answers = Mapping[tuple[int, int], Answered]
_ANSWER = TypeAdapter(Answered)


@dataclass(frozen=True)
class Paired:
    """A run beside the reference.

    Attributes:
        accuracy: share of right answers, by kind of question; ``all`` for all of them.
        agreement: share of the answers whose tokens are those of the reference, right or wrong.
        difference: accuracy minus that of the reference, in all answers.
        interval: half of the width of the difference's 95 % interval; the answers of one row are not taken for independent.
        hard: share of right answers among those that the reference has right and the down-sampled model wrong; None without such answers
            or without such a model.
        easy: likewise among those that both have right.
    """

    accuracy: Mapping[str, float]
    agreement: float
    difference: float
    interval: float
    hard: float | None
    easy: float | None


def write_answers(path: Path, answers: Sequence[Answered]) -> None:
    """Writes single answers, one JSON object a line."""
    write_file(path, "".join(json.dumps(asdict(answer)) + "\n" for answer in answers))


def read_answers(folder: str | Path) -> Answers:
    """The answers of a run on held-out data, by row and turn.

    Raises:
        RecipeError: it has none.
        DamagedFile: a line is no answer.
    """
    path = RunFolder.of(folder).answers
    if not path.is_file():
        raise RecipeError(f"{folder} has no {path.name}: it is written at the end of laconic train by tasks with chats")
    found: dict[tuple[int, int], Answered] = {}
    # Texts may hold other ends of lines, which JSON leaves as they are.
    for number, line in enumerate(path.read_bytes().removesuffix(b"\n").split(b"\n"), 1):
        try:
            answer = _ANSWER.validate_json(line)
        except ValidationError as error:
            raise DamagedFile(f"{path} is damaged in line {number}: {first_fault(error)}; get it again, or train again") from None
        found[answer.row, answer.turn] = answer
    return found


def compare(reference: str, runs: Sequence[str], downsampled: str | None = None) -> dict[str, Paired]:
    """Runs beside a reference on the same questions.

    Args:
        reference: run folder, of the dense model for example.
        runs: run folders.
        downsampled: run folder of a model on smaller images, which sorts hard from easy questions (VTC, arXiv 2510.07143).

    Returns:
        By folder, the reference first.

    Raises:
        RecipeError: a run has no answers, or it was asked other questions.
        DamagedFile: a file of answers is damaged.
    """
    base = read_answers(reference)
    small = None if downsampled is None else _same(base, downsampled, reference)
    return {folder: _paired(base, _same(base, folder, reference), small) for folder in (reference, *runs)}


def _same(base: Answers, folder: str, reference: str) -> Answers:
    found = read_answers(folder)
    for place in sorted(found.keys() | base.keys()):
        here, there = found.get(place), base.get(place)
        if here is None or there is None or _asked(here) != _asked(there):
            raise RecipeError(
                f"{folder} and {reference} have answers to different questions, first in row {place[0]}, answer {place[1]}: {_shown(here)} and "
                f"{_shown(there)}; name runs on the same held-out data"
            )
    return found


def _asked(answer: Answered) -> tuple[str, str, str]:
    return answer.kind, answer.question, answer.reference


def _shown(answer: Answered | None) -> str:
    """The question of an answer and its right answer, in short."""
    return "none" if answer is None else f"{answer.question[-_SHOWN:]!r} ({answer.reference[:_SHOWN]!r})"


def _paired(base: Answers, found: Answers, small: Answers | None) -> Paired:
    kinds = sorted({answer.kind for answer in base.values()} - {""})
    by_kind = {kind: _share(found, lambda place, kind=kind: kind in ("all", found[place].kind)) for kind in ("all", *kinds)}  # type: ignore[misc]
    accuracy = {kind: share for kind, share in by_kind.items() if share is not None}
    by_row: dict[int, list[int]] = defaultdict(list)
    for place, answer in found.items():
        by_row[place[0]].append(answer.right - base[place].right)
    mean = sum(map(sum, by_row.values())) / len(found)
    # Rows are drawn independently, answers within a row are not.
    spread = sum((sum(row) - mean * len(row)) ** 2 for row in by_row.values()) * len(by_row) / max(1, len(by_row) - 1)
    same = sum(answer.tokens == base[place].tokens for place, answer in found.items())
    return Paired(
        accuracy=accuracy,
        agreement=same / len(found),
        difference=mean,
        interval=_NORMAL * math.sqrt(spread) / len(found),
        hard=None if small is None else _share(found, lambda place: base[place].right and not small[place].right),
        easy=None if small is None else _share(found, lambda place: base[place].right and small[place].right),
    )


def _share(found: Answers, counts: Callable[[tuple[int, int]], bool]) -> float | None:
    """Share of right answers among those that count; None if none does."""
    right = [answer.right for place, answer in found.items() if counts(place)]
    return sum(right) / len(right) if right else None
