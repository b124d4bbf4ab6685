"""A local HTTP server with the endpoints of the Hugging Face Hub that downloads and uploads of models use."""

import base64
import contextlib
import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test"
"""The token that may read private and gated repositories, and write."""


@dataclasses.dataclass
class Repository:
    """A model repository: its files at each revision; "main" is the default branch."""

    revisions: dict[str, dict[str, bytes]]
    private: bool = False
    gated: bool = False

    def find(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """(commit, files) of a branch, a tag or a commit."""
        for name, files in self.revisions.items():
            commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
            if revision in (name, commit):
                return commit, files
        return None


def folder_files(folder: Path) -> dict[str, bytes]:
    """{relative path: content} of a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@dataclasses.dataclass
class Hub:
    """The server's repositories and other files, and its requests."""

    repositories: dict[str, Repository] = dataclasses.field(default_factory=dict)
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    """Files outside of repositories, by path below the address."""
    md5: dict[str, str] = dataclasses.field(default_factory=dict)
    """Content-MD5 headers of these files, where the server states one."""
    types: dict[str, str] = dataclasses.field(default_factory=dict)
    """Their Content-Type headers."""
    ranges: bool = True
    """Whether the server sends parts of files."""
    breaks: int = 0
    """Number of transfers that end after half of the content."""
    failing: int = 0
    """Status of every answer, unless 0."""
    requests: list[str] = dataclasses.field(default_factory=list)
    """METHOD PATH [RANGE] of every request."""
    url: str = ""

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, request) is not None for request in self.requests)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self._record()
        path = unquote(urlsplit(self.path).path)
        if self.hub.failing:
            self._error(self.hub.failing)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._info(found[1], found[2] or "main")
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(.+)", path):
            self._tree(found[1], found[2])
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(*found.groups())
        elif (name := path.removeprefix("/")) in self.hub.files:
            known = {"Content-MD5": self.hub.md5, "Content-Type": self.hub.types}
            headers = {header: values[name] for header, values in known.items() if name in values}
            self._content(self.hub.files[name], headers)
        else:
            self._error(404)

    def do_POST(self) -> None:
        self._record()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/validate-yaml":
            self._json({"warnings": [], "errors": []})
        elif not self._authorized:
            self._error(401)
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/main", self.path):
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            self._json({"files": [{"path": each["path"], **modes} for each in json.loads(body)["files"]]})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
            self._commit(found[1], [json.loads(line) for line in body.splitlines()])
        else:
            self._error(404)

    def _record(self) -> None:
        extra = f" {self.headers['Range']}" if self.headers["Range"] else ""
        self.hub.requests.append(f"{self.command} {self.path}{extra}")

    @property
    def _authorized(self) -> bool:
        return self.headers["Authorization"] == f"Bearer {TOKEN}"

    def _find(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self._authorized):
            self._error(401, "RepoNotFound")
            return None
        found = repository.find(revision)
        if found is None:
            self._error(404, "RevisionNotFound")
        return found

    def _info(self, name: str, revision: str) -> None:
        if found := self._find(name, revision):
            siblings = [{"rfilename": path, "size": len(content)} for path, content in found[1].items()]
            self._json({"id": name, "sha": found[0], "siblings": siblings})

    def _tree(self, name: str, revision: str) -> None:
        if found := self._find(name, revision):
            oids = {path: hashlib.sha1(content).hexdigest() for path, content in found[1].items()}
            entries = [{"path": path, "size": len(found[1][path]), "oid": oid} for path, oid in oids.items()]
            self._json([{"type": "file", **entry} for entry in entries])

    def _resolve(self, name: str, revision: str, path: str) -> None:
        if not (found := self._find(name, revision)):
            return
        if self.hub.repositories[name].gated and not self._authorized:
            self._error(403 if self.headers["Authorization"] else 401, "GatedRepo")
        elif path not in found[1]:
            self._error(404, "EntryNotFound")
        else:
            self._content(found[1][path], {"X-Repo-Commit": found[0]})

    def _content(self, content: bytes, headers: dict[str, str]) -> None:
        start = int(match[1]) if (match := re.match(r"bytes=(\d+)-", self.headers["Range"] or "")) else 0
        partial = bool(start) and self.hub.ranges
        rest = content[start:] if partial else content
        self.send_response(206 if partial else 200)
        etag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        size = {"Content-Length": str(len(rest))}
        if partial:
            size["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        for key, value in {**etag, **size, **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.breaks and len(rest) > 1000:
            self.hub.breaks -= 1
            self.wfile.write(rest[: len(rest) // 2])
            self.close_connection = True
        else:
            self.wfile.write(rest)

    def _create(self, wanted: dict[str, str]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        exists = name in self.hub.repositories
        if not exists:
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            self.hub.repositories[name] = Repository({"main": {}}, private=private)
        self._json({"url": f"{self.hub.url}/{name}"}, 409 if exists else 200)

    def _commit(self, name: str, lines: list[dict]) -> None:
        files = self.hub.repositories[name].revisions["main"]
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        oid = self.hub.repositories[name].find("main")[0]
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, "success": True})

    def _json(self, value: object, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _error(self, status: int, code: str = "") -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """A running server on the loopback."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
