"""As much of the hub's API as creating a repository, committing to it and loading from it take, on this machine."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the stand-in was told.

    Attributes:
        url: to reach it by.
        files: content by path in the repository.
        created: bodies of the requests that made repositories.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    created: list[dict[str, Any]] = field(default_factory=list)


@contextlib.contextmanager
def hub() -> Iterator[Hub]:
    """A hub with no repository yet, for as long as the context lasts."""
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            """Says nothing."""

        def _answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for key, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _json(self, data: Any) -> None:
            self._answer(200, json.dumps(data).encode())

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.path.startswith("/api/repos/create"):
                asked = json.loads(body)
                state.created.append(asked)
                self._json({"url": f"{state.url}/{asked.get('organization') or 'me'}/{asked['name']}"})
            elif self.path == "/api/validate-yaml":
                self._json({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                files = [{"path": item["path"], "uploadMode": "regular", "shouldIgnore": False} for item in json.loads(body)["files"]]
                self._json({"files": files})
            elif "/commit/" in self.path:
                for line in body.decode().splitlines():
                    item = json.loads(line)
                    if item["key"] == "file":
                        state.files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
                self._json({"commitUrl": f"{state.url}/me/model/commit/{COMMIT}", "commitOid": COMMIT, "success": True})
            else:
                self._answer(404, b"{}")

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            _, found, rest = path.partition("/resolve/")
            name = rest.partition("/")[2]
            if found and name in state.files:
                content = state.files[name]
                etag = f'"{hashlib.sha256(content).hexdigest()}"'
                self._answer(200, content, ETag=etag, X_Repo_Commit=COMMIT, Content_Type="application/octet-stream")
            elif found:
                self._answer(404, b"{}", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            elif "/tree/" in path:
                self._json([{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in state.files.items()])
            elif path.startswith("/api/models/"):
                siblings = [{"rfilename": name} for name in state.files]
                self._json({"id": "me/model", "modelId": "me/model", "sha": COMMIT, "siblings": siblings, "private": True, "tags": []})
            else:
                self._answer(404, b"{}")

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
