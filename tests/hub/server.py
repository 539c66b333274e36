"""Takes uploads of models as the hub does, with the endpoints that its libraries call.

A file of a model is at `{owner}/{name}/{path}` of the folder, and its visibility in `{owner}/{name}.visibility`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_stand_in"  # may upload
_UPLOAD = re.compile(r"/api/models/(?P<repository>[^/]+/[^/]+)/(?P<what>preupload|commit)/main")


class Handler(BaseHTTPRequestHandler):
    """One request."""

    root: Path
    protocol_version = "HTTP/1.1"  # clients keep a connection open

    def do_GET(self) -> None:
        # The body is read even where nothing uses it: the next request of the connection comes after it.
        body, path = self._body().decode(), unquote(urlsplit(self.path).path)
        if path == "/api/repos/create":
            self._create(**json.loads(body))
        elif path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---")[1])
            self._json({"errors": [], "warnings": []})
        elif asked := _UPLOAD.fullmatch(path):
            self._upload(**asked.groupdict(), body=body)
        else:
            # The hub does not tell strangers whether a repository is missing or private.
            self._json({}, 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})

    do_POST = do_GET

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _create(self, name: str, organization: str | None = None, visibility: str = "public", **_: Any) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._json({}, 401, {"X-Error-Message": "Invalid username or password."})
            return
        repository = f"{organization or 'me'}/{name}"
        folder = self.root / repository
        if not folder.exists():
            folder.mkdir(parents=True)
            folder.with_suffix(".visibility").write_text(visibility)
        self._json({"url": f"http://{self.headers['Host']}/{repository}"})

    def _upload(self, repository: str, what: str, body: str) -> None:
        if what == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            self._json({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
            return
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                path = self.root / repository / line["value"]["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(line["value"]["content"]))
        commit = hashlib.sha1(body.encode()).hexdigest()
        about = f"http://{self.headers['Host']}/{repository}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": about})

    def _json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        written = json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(written)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(written)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: the tests' output is for what fails."""


@contextmanager
def serving(root: Path) -> Iterator[str]:
    """Take uploads to `root` on a free port; gives the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("_Handler", (Handler,), {"root": root}))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
