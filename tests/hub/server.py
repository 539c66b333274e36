"""Serves a folder of repositories with the endpoints of the hub that its libraries call, to read and to upload.

A file of a repository is at `{models|datasets}/{owner}/{name}/{revision, quoted}/{path}` of the folder.
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
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_stand_in"  # may upload
_REPOSITORY = r"(?P<repository>[^/]+(?:/[^/]+)?)"
_API = re.compile(
    rf"/api/(?P<kind>models|datasets)/{_REPOSITORY}"
    r"(?:/(?P<what>revision|tree|paths-info)/(?P<name>[^/]+)(?:/(?P<path>.+))?)?"
)
_UPLOAD = re.compile(rf"/api/models/{_REPOSITORY}/(?P<what>preupload|commit)/main")
_FILE = re.compile(rf"/(?:(?P<kind>datasets)/)?{_REPOSITORY}/resolve/(?P<name>[^/]+)/(?P<path>.+)")


class RefusedError(Exception):
    """What the hub answers instead, with the code that its clients read."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def commit(revision: Path) -> str:
    """Stands for the revision's commit: the same in every session, as the content is."""
    return hashlib.sha1("/".join(revision.parts[-4:]).encode()).hexdigest()


def blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    root: Path
    protocol_version = "HTTP/1.1"  # clients keep a connection open

    def do_GET(self) -> None:
        # The body is read even where nothing uses it: the next request of the connection comes after it.
        body = self._body().decode()
        form, path = parse_qs(body), urlsplit(self.path).path
        try:
            if ".." in unquote(path):
                raise RefusedError(404, "EntryNotFound", "Nothing outside the repositories is served")
            if self.headers.get("Host", "").startswith("datasets-server."):
                raise RefusedError(404, "ResponseNotFound", "The dataset viewer of the stand-in has seen no dataset.")
            if asked := _API.fullmatch(path):
                self._information(**asked.groupdict(), form=form)
            elif asked := _FILE.fullmatch(path):
                self._file(**asked.groupdict())
            elif path == "/api/repos/create":
                self._create(**json.loads(body))
            elif path == "/api/validate-yaml":
                yaml.safe_load(json.loads(body)["content"].split("---")[1])
                self._json({"errors": [], "warnings": []})
            elif asked := _UPLOAD.fullmatch(path):
                self._upload(**asked.groupdict(), body=body)
            else:
                raise RefusedError(404, "", f"The stand-in has no {path}")
        except RefusedError as refused:
            self._send(refused.status, b"", {"X-Error-Code": refused.code, "X-Error-Message": str(refused)})

    do_HEAD = do_POST = do_GET

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
            raise RefusedError(401, "", "Invalid username or password.")
        repository = f"{organization or 'me'}/{name}"
        folder = self.root / "models" / repository
        if not folder.exists():
            (folder / "main").mkdir(parents=True)
            folder.with_suffix(".visibility").write_text(visibility)
        self._json({"url": f"http://{self.headers['Host']}/{repository}"})

    def _upload(self, repository: str, what: str, body: str) -> None:
        revision = self._revision("models", repository, "main")
        if what == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            self._json({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
            return
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                path = revision / line["value"]["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(line["value"]["content"]))
        about = f"http://{self.headers['Host']}/{repository}/commit/{commit(revision)}"
        self._json({"success": True, "commitOid": commit(revision), "commitUrl": about})

    def _revision(self, kind: str, repository: str, name: str) -> Path:
        """The folder of a revision, which is named as it is or by its commit."""
        folder = self.root / kind / repository
        if not folder.is_dir():
            # The hub does not tell strangers whether a repository is missing or private.
            raise RefusedError(401, "RepoNotFound", "Repository not found")
        for revision in folder.iterdir():
            if name in (revision.name, commit(revision)):
                return revision
        raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {unquote(name)}")

    def _information(
        self,
        kind: str,
        repository: str,
        what: str | None,
        name: str | None,
        path: str | None,
        form: dict[str, list[str]],
    ) -> None:
        revision = self._revision(kind, repository, name or "main")
        if what == "paths-info":
            asked = [revision / each for each in form.get("paths", [])]
            self._json([_entry(each, revision) for each in asked if each.exists()])
        elif what == "tree":
            folder = revision / unquote(path or "")
            if not folder.is_dir():
                raise RefusedError(404, "EntryNotFound", f"{path} does not exist on {unquote(revision.name)}")
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() == "true"
            self._json(
                [_entry(each, revision) for each in sorted(folder.rglob("*") if recursive else folder.iterdir())]
            )
        else:
            files = [each.relative_to(revision).as_posix() for each in sorted(revision.rglob("*")) if each.is_file()]
            about = {"private": False, "gated": False, "disabled": False, "tags": []}
            siblings = [{"rfilename": file} for file in files]
            self._json({"id": repository, "sha": commit(revision), **about, "siblings": siblings})

    def _file(self, kind: str | None, repository: str, name: str, path: str) -> None:
        revision = self._revision(kind or "models", repository, name)
        if not (revision / unquote(path)).is_file():
            raise RefusedError(404, "EntryNotFound", "Entry not found")
        content = (revision / unquote(path)).read_bytes()
        headers = {"X-Repo-Commit": commit(revision), "ETag": f'"{blob(content)}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            self._send(200, content, headers)
            return
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._send(206, content[first : last + 1], headers)

    def _json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: the tests' output is for what fails."""


def _entry(path: Path, revision: Path) -> dict[str, Any]:
    name = path.relative_to(revision).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0}
    content = path.read_bytes()
    return {"type": "file", "path": name, "oid": blob(content), "size": len(content)}


@contextmanager
def serving(root: Path) -> Iterator[str]:
    """Serve the repositories of `root` on a free port; gives the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("_Handler", (Handler,), {"root": root}))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
