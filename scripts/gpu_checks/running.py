"""Runs parts one after another, writes what each finds as soon as it ends, and leaves out what an earlier run has found."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from laconic.modules.checkpoints.whole_files import write_json
from laconic.trainer.measure.environment import environment

from .measuring import release
from .part import REAL, TINY, NotHereError, Part, Setting


def run_parts(
    parts: Mapping[str, Part], rounds: int, rehearsal: bool, seconds: float, folder: Path | None = None, again: bool = False
) -> dict[str, Any]:
    """Results by name: ``passed``, ``skipped`` with a reason or ``error``, what the part found, and its seconds.

    Args:
        parts: what to run.
        rounds: paired rounds of a timed step.
        rehearsal: tiny sizes.
        seconds: time of a part, after which no further round begins.
        folder: gets ``NAME.json`` of each part with the environment. Parts that passed there with such sizes are not run again.
        again: run these too.
    """
    results, around = {}, {"environment": environment(), "rehearsal": rehearsal}
    for name, part in parts.items():
        file = None if folder is None else folder / f"{name}.json"
        stands = None if file is None or again else _read(file, rehearsal)
        if stands is not None:
            print(f"{name}: stands in {file}", file=sys.stderr, flush=True)
            results[name] = stands
            continue
        results[name] = _run(part, Setting(TINY if rehearsal else REAL, rounds, time.perf_counter() + seconds, rehearsal))
        print(f"{name}: {json.dumps(results[name])[:300]}", file=sys.stderr, flush=True)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, {"part": name, **around, **results[name]})
        release()
    return results


def _run(part: Part, setting: Setting) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        found = {"passed": True, **part(setting)}
    except NotHereError as error:
        found = {"passed": True, "skipped": str(error)}
    except Exception as error:
        found = {"passed": False, "error": f"{type(error).__name__}: {str(error)[:2000]}"}
    return {**found, "seconds": round(time.perf_counter() - start, 1)}


def _read(file: Path, rehearsal: bool) -> dict[str, Any] | None:
    """What an earlier run found, if the part was run, and passed, at such sizes."""
    try:
        found: dict[str, Any] = json.loads(file.read_text("utf-8"))
        stands = found["passed"] and "skipped" not in found and found["rehearsal"] == rehearsal
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if stands else None
