"""Serves clean.py: a Python that has imported the libraries but nothing of Laconic, and forks for each program. Not a test itself.

Every line on stdin is one request, a JSON object; the answer is the exit code, on a line of stdout. What a program prints goes to files
that the request names.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import sys
import threading
import traceback
import types
from typing import Any

# Everything dear that some program imports. They start no threads with one thread a process, so forking is safe.
import datasets  # noqa: F401
import lightning  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import peft  # noqa: F401
import safetensors.torch  # noqa: F401
import torch
import torch.utils.tensorboard
import transformers
import transformers.generation
import transformers.modeling_utils
import transformers.models.auto
import typer  # noqa: F401


def serve() -> None:
    """Answers requests until stdin ends."""
    for line in sys.stdin:
        there = [name for name in sys.modules if name.partition(".")[0] == "laconic"]
        assert not there, there
        child = os.fork()
        if child == 0:
            os._exit(_run(json.loads(line)))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _run(request: dict[str, Any]) -> int:
    """Runs the program of a request as ``python -c`` or ``python -m`` would, to the end; returns its exit code."""
    for number, path in enumerate((os.devnull, request["stdout"], request["stderr"])):
        os.dup2(os.open(path, os.O_WRONLY if number else os.O_RDONLY), number)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    _settings_read_at_import()
    sys.path.insert(0, request["folder"] if request["module"] else "")
    sys.argv = [request["module"] or "-c", *request["arguments"]]
    code = 0
    try:
        if request["module"]:
            runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        else:
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(request["program"], "<clean process>", "exec"), main.__dict__)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    # What a process does at its end.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _settings_read_at_import() -> None:
    """Environment variables of a request that the libraries had already read when they were imported."""
    where = os.environ.get("HF_MODULES_CACHE")
    if where is not None:
        for module in list(sys.modules.values()):
            if "HF_MODULES_CACHE" in vars(module):
                vars(module)["HF_MODULES_CACHE"] = where
    if os.environ.get("TRANSFORMERS_VERBOSITY") == "error":
        transformers.logging.set_verbosity_error()
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


if __name__ == "__main__":
    serve()
