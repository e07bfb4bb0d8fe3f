"""A hub on loopback for the real client libraries: repositories in memory, tokens, and faults on demand.

Files are written as the real hub has it: it says which go as large files, takes these by themselves (Git LFS), then a
commit with the others in it.

Weights are answered with a redirect to another host (`localhost`, the hub itself being 127.0.0.1), as the real hub
does, so a token that follows the redirect is seen.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import urllib.parse
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any, Literal

TOKEN, STRANGER = "hf_" + "goodTokenOfTheTests0123456789", "hf_" + "tokenWithoutAccess0123456789ab"
LARGE = (".safetensors", ".bin", ".parquet", ".zst")
WRITER = f"Bearer {TOKEN}"
"""What may write; its user is `me`."""
CREATE, WHO, VALIDATE = "/api/repos/create", "/api/whoami-v2", "/api/validate-yaml"
WRITE = re.compile(r"/api/models/([\w.-]+/[\w.-]+)/(preupload|commit|branch)/(.+)")
BATCH = re.compile(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch")
ROUTE = re.compile(r"/api/(model|dataset)s/([\w.-]+/[\w.-]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
FILE = re.compile(r"/(?:(dataset)s/)?([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)")


@dataclass
class Repo:
    """One repository; `files` are those of main."""

    files: dict[str, bytes]
    gated: bool = False
    disabled: bool = False
    private: bool = False
    card: dict[str, Any] = field(default_factory=dict)
    branches: dict[str, dict[str, bytes]] = field(default_factory=dict)

    @property
    def commit(self) -> str:
        return hashlib.sha1(b"".join(name.encode() + data for name, data in sorted(self.files.items()))).hexdigest()

    @property
    def folders(self) -> set[str]:
        return {str(folder) for name in self.files for folder in PurePosixPath(name).parents} - {"."}

    def entries(self, paths: list[str]) -> list[dict[str, Any]]:
        found = [
            {"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in paths if path in self.folders
        ]
        return found + [entry(path, self.files[path]) for path in paths if path in self.files]


def entry(path: str, data: bytes) -> dict[str, Any]:
    """A file in a listing."""
    large = {"lfs": {"oid": etag(path, data), "size": len(data), "pointerSize": 120}} if path.endswith(LARGE) else {}
    return {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": path, **large}


def etag(path: str, data: bytes) -> str:
    return (hashlib.sha256 if path.endswith(LARGE) else hashlib.sha1)(data).hexdigest()


@dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD path" a pattern is found in."""

    where: str
    what: Literal["status", "cut", "hang"]
    status: int = 503
    times: int = 1000


@dataclass
class Hub:
    """What is served, what goes wrong, and what was asked: (host, "METHOD path", Authorization)."""

    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)
    """Large files by SHA-256, whether committed or not."""

    def __enter__(self) -> Hub:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads, self.closed = True, threading.Event()
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def fault(self, request: str) -> Fault | None:
        found = next((fault for fault in self.faults if fault.times and re.search(fault.where, request)), None)
        if found is not None:
            found.times -= 1
        return found


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        path, request = urllib.parse.unquote(url.path), f"{self.command} {urllib.parse.unquote(self.path)}"
        self.host, self.token = self.headers["Host"].partition(":")[0], self.headers["Authorization"]
        self.hub.asked.append((self.host, request, self.token))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.broken = self.hub.fault(request)
        if self.broken and self.broken.what == "hang":
            self.hub.closed.wait(60)
            self.close_connection = True
        elif self.broken and self.broken.what == "status":
            self.answer(self.broken.status, b"not now")
        elif self.token is not None and self.token.removeprefix("Bearer ") not in (TOKEN, STRANGER):
            self.answer(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif self.command in ("POST", "PUT") and self.written(path, body):
            pass
        elif path == WHO:
            self.answer(200, json.dumps({"name": "me", "type": "user"}).encode())
        elif found := FILE.fullmatch(path):
            self.file(self.hub.repos.get((found[1] or "model", found[2])), found[3], found[4])
        elif found := ROUTE.fullmatch(path):
            kind, name, what, revision, below = found.groups()
            self.about(self.hub.repos.get((kind, name)), name, what, revision, below or "", url.query, body)
        else:
            self.answer(404, b"")

    do_HEAD = do_POST = do_PUT = do_GET

    def written(self, path: str, body: bytes) -> bool:
        """Answer what writes, or says what it is about to write; False where it is none of that."""
        if path.startswith("/lfs/"):
            digest = path.removeprefix("/lfs/")
            assert hashlib.sha256(body).hexdigest() == digest
            self.hub.stored[digest] = body
            self.answer(200, b"")
            return True
        batch, write = BATCH.fullmatch(path), WRITE.fullmatch(path)
        if not (path in (CREATE, VALIDATE) or batch or write):
            return False
        if path == VALIDATE:
            broken = "license: [" in json.loads(body)["content"]
            errors = [{"message": "license is no text"}] if broken else []
            self.answer(400 if broken else 200, json.dumps({"errors": errors, "warnings": []}).encode())
        elif self.token != WRITER:
            self.answer(403, b"", {"X-Error-Message": "You don't have the rights to do that."})
        elif path == CREATE:
            self.create(json.loads(body))
        elif batch:
            objects = [self.place(each) for each in json.loads(body)["objects"]]
            self.answer(200, json.dumps({"transfer": "basic", "objects": objects}).encode())
        elif write:
            self.change(self.hub.repos["model", write[1]], write[1], write[2], write[3], body)
        return True

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization'] or 'me'}/{wanted['name']}"
        if ("model", name) in self.hub.repos:
            self.answer(409, b"", {"X-Error-Message": "You already created this model repo"})
            return
        self.hub.repos["model", name] = Repo({}, private=wanted.get("visibility") == "private")
        self.answer(200, json.dumps({"url": f"{self.hub.url}/{name}"}).encode())

    def place(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Where a large file is to be sent; nowhere if it is there already."""
        if wanted["oid"] in self.hub.stored:
            return wanted
        href = f"http://localhost:{self.server.server_address[1]}/lfs/{wanted['oid']}"
        return {**wanted, "actions": {"upload": {"href": href, "header": {}}}}

    def change(self, repo: Repo, name: str, what: str, branch: str, body: bytes) -> None:
        files = repo.files if branch == "main" else repo.branches.get(branch)
        if what == "branch":
            repo.branches.setdefault(branch, dict(repo.files))
            self.answer(409 if files is not None else 200, b"{}")
        elif files is None:
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif what == "preupload":
            modes = [{"path": each["path"], "shouldIgnore": False,
                      "uploadMode": "lfs" if each["path"].endswith(LARGE) else "regular"}
                     for each in json.loads(body)["files"]]  # fmt: skip
            self.answer(200, json.dumps({"files": modes}).encode())
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    files[line["value"]["path"]] = self.hub.stored[line["value"]["oid"]]
                elif line["key"] == "deletedFile":
                    del files[line["value"]["path"]]
            done = {"commitUrl": f"{self.hub.url}/{name}/commit/{repo.commit}", "commitOid": repo.commit}
            self.answer(200, json.dumps(done).encode())

    def may(self, repo: Repo | None, revision: str | None) -> Repo | None:
        """The repository, unless it or its revision is not to be had: then that is answered."""
        if repo is None:
            self.answer(404 if self.token else 401, b"", {"X-Error-Code": "RepoNotFound"})
        elif repo.private and self.token != WRITER and self.host != "localhost":
            self.answer(401, b"", {"X-Error-Code": "RepoNotFound"})
        elif repo.disabled:
            self.answer(403, b"", {"X-Error-Message": "Access to this resource is disabled."})
        elif revision not in (None, "main", repo.commit):
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            return repo
        return None

    def about(self, repo: Repo | None, name: str, what: str | None, revision: str | None, below: str, query: str,
              body: bytes) -> None:  # fmt: skip
        if repo is not None and revision in repo.branches:
            repo, revision = replace(repo, files=repo.branches[revision], branches={}), "main"
        if (repo := self.may(repo, revision)) is None:
            return
        paths = [path for path in sorted({*repo.files, *repo.folders}) if path.startswith(f"{below}/" if below else "")]
        if what == "paths-info":
            form = urllib.parse.parse_qs(body.decode())
            paths = form.get("paths") or json.loads(body or b"{}").get("paths", [])
        elif what == "tree" and "recursive=true" not in query.lower():
            paths = [path for path in paths if "/" not in path[len(below) + 1 if below else 0 :]]
        if what == "tree" and below and not paths:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        about = {"id": name, "sha": repo.commit, "private": repo.private, "cardData": repo.card,
                 "disabled": False, "downloads": 0, "likes": 0,
                 "gated": "manual" if repo.gated else False, "tags": [],
                 "siblings": [{"rfilename": path, "size": len(data)} for path, data in repo.files.items()]}  # fmt: skip
        content = repo.entries(paths) if what in ("tree", "paths-info") else about
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def file(self, repo: Repo | None, revision: str, path: str) -> None:
        elsewhere = self.host == "localhost"
        if (repo := self.may(repo, revision)) is None:
            return
        if repo.gated and not elsewhere and self.token != f"Bearer {TOKEN}":
            self.answer(403 if self.token else 401, b"", {"X-Error-Code": "GatedRepo"})
            return
        data = repo.files.get(path)
        about = {"X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}
        if data is None:
            self.answer(404, b"", {**about, "X-Error-Code": "EntryNotFound"})
        elif path.endswith(LARGE) and not elsewhere:
            there = f"http://localhost:{self.server.server_address[1]}{self.path}"
            linked = {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{etag(path, data)}"', "Location": there}
            self.answer(302, b"", {**about, **linked})
        else:
            first, last = re.fullmatch(r"(?:bytes=(\d+)-(\d*))?", self.headers.get("Range") or "").groups()  # type: ignore[union-attr]
            about["ETag"] = f'"{etag(path, data)}"'
            if first is not None:
                end = min(int(last or len(data) - 1), len(data) - 1)
                about["Content-Range"] = f"bytes {first}-{end}/{len(data)}"
                data = data[int(first) : end + 1]
            self.answer(200 if first is None else 206, data, about)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.broken and self.broken.what == "cut":
            body, self.close_connection = body[: len(body) // 2], True
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass
