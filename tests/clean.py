"""Clean Python processes at once, forked from one that has imported torch, transformers and the like, but nothing of Laconic.

A process that starts from nothing imports for ten seconds. What tests want of it, that no model and no setting of theirs is there and
that Laconic is imported anew, a fork of a process that never had them gives as well. Every way to start one for real, the export's
verifying process of each format and the command line, is started for real by some test too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class CleanProcesses:
    """Runs programs, one at a time; the server behind it starts with the first."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def python(
        self, program: str, arguments: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """As ``python -c program arguments``. The environment is this process's where none is given; PYTHONPATH has been read before."""
        return self._run({"program": program, "module": None}, arguments, environment)

    def module(self, name: str, arguments: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """As ``python -m name arguments``."""
        return self._run({"program": None, "module": name}, arguments, None)

    def _run(
        self, what: dict[str, str | None], arguments: Sequence[str], environment: Mapping[str, str] | None
    ) -> subprocess.CompletedProcess[str]:
        server = self._started()
        assert server.stdin is not None
        assert server.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            stdout, stderr = (Path(folder) / name for name in ("stdout", "stderr"))
            stdout.touch()
            stderr.touch()
            request = {
                **what,
                "arguments": list(arguments),
                "environment": {"OMP_NUM_THREADS": "1", **(os.environ if environment is None else environment)},
                "folder": os.getcwd(),
                "stdout": str(stdout),
                "stderr": str(stderr),
            }
            server.stdin.write(json.dumps(request) + "\n")
            server.stdin.flush()
            code = server.stdout.readline()
            if not code:
                raise RuntimeError("the server of clean processes has ended; what it said is on stderr")
            return subprocess.CompletedProcess(list(arguments), int(code), stdout.read_text(), stderr.read_text())

    def _started(self) -> subprocess.Popen[str]:
        if self._server is None:
            # Threads would not survive the fork.
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            self._server = subprocess.Popen(
                # What lies beside it is not for programs to import.
                [sys.executable, "-P", str(ROOT / "tests" / "clean_server.py")],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
            )  # fmt: skip
        return self._server

    def close(self) -> None:
        """Ends the server."""
        if self._server is not None:
            # It holds nothing that must be put away, and doing that takes seconds.
            self._server.kill()
            self._server.communicate()
