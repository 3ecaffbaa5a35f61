"""A page in headless Chromium, over its DevTools protocol: what it complains about, and how wide the page is."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


@dataclass
class Browser:
    """One tab. Messages go through two pipes, each ended by a zero byte.

    Attributes:
        complaints: messages of the console, errors, and resources that were refused.
    """

    written: BinaryIO
    read: BinaryIO
    session: str | None = None
    complaints: list[str] = field(default_factory=list)
    loaded: bool = False
    number: int = 0

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """Result of a command."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params} | ({"sessionId": self.session} if self.session else {})
        self.written.write(json.dumps(message).encode() + b"\0")
        self.written.flush()
        while (answer := self._next()).get("id") != self.number:
            pass
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def _next(self) -> dict[str, Any]:
        content = bytearray()
        while (byte := self.read.read(1)) != b"\0":
            assert byte, "the browser ended"
            content += byte
        message: dict[str, Any] = json.loads(content)
        method, params = message.get("method"), message.get("params", {})
        if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.complaints.append(json.dumps(params))
        self.loaded |= method == "Page.loadEventFired"
        return message

    def visit(self, page: Path, width: int, height: int = 900) -> None:
        """Opens a page in a window of so many pixels."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.loaded = False
        self.ask("Page.navigate", url=page.resolve().as_uri())
        while not self.loaded:
            self._next()

    def value(self, expression: str) -> Any:
        """Value of a JavaScript expression in the page."""
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser with a profile in a folder; the test is skipped where none is installed."""
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser is installed: one of {', '.join(NAMES)}")
    ours, theirs = os.pipe(), os.pipe()
    # Chromium reads from file descriptor 3 and writes to 4.
    shell = f'exec "$0" "$@" 3<&{ours[0]} 4>&{theirs[1]}'
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"]
    process = subprocess.Popen(
        ["bash", "-c", shell, program, *options], pass_fds=(ours[0], theirs[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(ours[0])
    os.close(theirs[1])
    with open(ours[1], "wb") as written, open(theirs[0], "rb") as read:
        try:
            tab = Browser(written, read)
            target = next(item for item in tab.ask("Target.getTargets")["targetInfos"] if item["type"] == "page")["targetId"]
            tab.session = tab.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log"):
                tab.ask(f"{domain}.enable")
            yield tab
        finally:
            process.terminate()
            process.wait(30)
