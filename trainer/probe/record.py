"""Record: measurements in a JSON file that is written after each of them, so that a probe goes on where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...modules.checkpoints.whole_files import write_json
from ..errors import RecipeError
from .meter import Measured


class Record:
    """Measurements by state of the model.

    Args:
        path: the file; an existing one is continued.
        settings: all that the measurements depend on.

    Raises:
        RecipeError: the file holds measurements of other settings, or is none.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, dict(settings)
        self.measured: dict[str, Measured] = {}
        self.updates: dict[str, tuple[float, float]] = {}
        self.ranks: list[float] = []
        self.plan: dict[str, Any] | None = None
        if path.is_file():
            self._read()

    def _read(self) -> None:
        try:
            data = json.loads(self.path.read_text("utf-8"))
            before = dict(data["settings"])
            self.measured = {key: Measured(float(value["loss"]), float(value["change"])) for key, value in data["measured"].items()}
            self.updates = {key: (float(size), float(influence)) for key, (size, influence) in data["updates"].items()}
            self.ranks = [float(rank) for rank in data["ranks"]]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RecipeError(f"--to {self.path} is no record of a probe: {error}; name another file, or delete it") from None
        now = json.loads(json.dumps(self.settings))
        differing = [key for key in now.keys() | before.keys() if now.get(key) != before.get(key)]
        if differing:
            key = sorted(differing)[0]
            raise RecipeError(
                f"--to {self.path} was measured with {key} = {before.get(key)!r}, and now it is {now.get(key)!r}: name another file, or "
                "delete it"
            )

    def add(self, key: str, measured: Measured) -> None:
        """Adds a measurement and writes the file."""
        self.measured[key] = measured
        self.write()

    def to_dict(self) -> dict[str, Any]:
        """Content of the file."""
        measured = {key: asdict(value) for key, value in self.measured.items()}
        return {"settings": self.settings, "measured": measured, "updates": self.updates, "ranks": self.ranks, "plan": self.plan}

    def write(self) -> None:
        """Writes the file, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.to_dict())
