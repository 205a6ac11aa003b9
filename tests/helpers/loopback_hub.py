"""A Hub on 127.0.0.1 for tests: real `huggingface_hub` talks to it, nothing is mocked.

What downloads need (information, tree listing, file resolution with ranges, and the refusals), here, and
what uploads need, in loopback_uploads.py, of models and, under "datasets/owner/name", of datasets. It
remembers every request with the bytes it sent, so that a test can say what was *not* fetched, and has faults
when a test asks for them.
Start it in the test process and run the client in a subprocess with `environment(...)`:
`huggingface_hub` reads its constants at import.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from helpers.loopback_uploads import Uploads, git_oid


class Request(NamedTuple):
    """One answered request.

    `sent` counts the bytes of the body that went out; `token`: that it came with, or empty.
    """

    method: str
    path: str
    status: int
    sent: int
    token: str = ""


@dataclass
class Fault:
    """What happens, so many times, to requests of this method whose path ends in `suffix`.

    A number is a status; "cut" closes the connection without an answer, "short" in the middle of a body;
    "half" answers with, or keeps, half of the file. A function is called before the answer.
    """

    method: str
    suffix: str
    what: int | str | Callable[[], object]
    times: int = 1


@dataclass(frozen=True)
class User:
    """Who has a token: the name ("*": may do everything), the token's role, and organisations."""

    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()

    def owns(self, repo_id: str) -> bool:
        return self.name == "*" or repo_id.removeprefix("datasets/").partition("/")[0] in (
            self.name,
            *self.orgs,
        )

    def may_write(self, repo_id: str) -> bool:
        return self.role != "read" and self.owns(repo_id)


@dataclass
class Repo:
    """A model repository: revision -> files.

    `refuse` = (status, X-Error-Code or None, message) answers everything; with `listed` the listing
    is public and only the files are refused, as for gated repositories; with `token` whoever has it
    is let in. A private one is hidden from all but its owner.
    """

    revisions: dict[str, dict[str, bytes]]
    refuse: tuple[int, str | None, str] | None = None
    listed: bool = False
    token: str | None = None
    private: bool = False
    commits: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)  # by commit

    def __post_init__(self) -> None:
        for name, files in self.revisions.items():
            self.write(name, files)

    def write(self, revision: str, files: dict[str, bytes]) -> str:
        """Make these the files of a revision; its commit."""
        digest = hashlib.sha1(revision.encode())
        for path, data in sorted(files.items()):
            digest.update(path.encode() + data)
        self.revisions[revision], self.commits[revision] = files, digest.hexdigest()
        return self.commits[revision]

    def commit(self, revision: str) -> str | None:
        if revision in self.commits.values():
            return revision
        return self.commits.get(revision)

    def files(self, commit: str) -> dict[str, bytes]:
        return next(self.revisions[name] for name, sha in self.commits.items() if sha == commit)


class LoopbackHub:
    """`with LoopbackHub() as hub: hub.add("owner/name", files)`; `hub.requests` is the log."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.objects: dict[str, bytes] = {}  # uploaded by LFS, by SHA-256
        self.users: dict[str, User] = {}  # by token; without any, everybody may do everything
        self.faults: list[Fault] = []
        self.storage: LoopbackHub | None = None  # to which requests for weights are sent on
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LoopbackHub:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(self, repo_id: str, files: dict[str, bytes] | None = None, **options) -> Repo:
        """Add a repository: `files` on main, other branches in `revisions`, and Repo's options."""
        revisions = {"main": files or {}, **options.pop("revisions", {})}
        self.repos[repo_id] = Repo(revisions, **options)
        return self.repos[repo_id]

    def fault(self, *args, **options) -> None:
        """Add a `Fault`."""
        self.faults.append(Fault(*args, **options))

    def fault_for(self, method: str, path: str):
        """What is to happen to this request; it counts as done."""
        for fault in self.faults:
            if fault.method == method and path.endswith(fault.suffix) and fault.times:
                fault.times -= 1
                return fault.what
        return None

    def fetched(self, suffix: str = "") -> list[Request]:
        """The GETs of files whose path ends in `suffix`."""
        gets = [request for request in self.requests if request.method == "GET"]
        return [get for get in gets if "/resolve/" in get.path and get.path.endswith(suffix)]

    def bytes_sent(self) -> int:
        return sum(request.sent for request in self.requests)


def environment(home: Path, endpoint: str, **more: str) -> dict[str, str]:
    """Variables for a client process that knows this server only and writes under `home` only."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {
        **kept,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "127.0.0.1",
        **more,
    }


class _Handler(Uploads, BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    fault: int | str | None = None

    def parse_request(self) -> bool:
        """Before any answer: the faults that the test has asked for."""
        if not super().parse_request():
            return False
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.fault = self.hub.fault_for(self.command, path)
        if callable(self.fault):
            self.fault()
            self.fault = None
        if isinstance(self.fault, int):
            self._refuse(self.fault, None, "This is a fault", {"Retry-After": "0"})
        elif self.fault == "cut":
            self.close_connection = True
        return self.fault in (None, "short", "half")

    @property
    def user(self) -> User | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return self.hub.users.get(token) if self.hub.users else User("*")

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self) -> None:
        quoted = urlsplit(self.path).path  # a slash in a revision is quoted, one in a path is not
        if quoted == "/api/whoami-v2" or "/auth-check" in quoted:
            return self.answer_who(quoted)
        api = re.fullmatch(
            r"/api/(?:models/)?(?P<id>.+?)(?:/(?P<what>revision|tree)/(?P<rev>[^/]+)(?P<under>/.+)?)?", quoted
        )
        file = re.fullmatch(
            r"/(?P<id>(?:datasets/)?[^/]+(?:/[^/]+)?)/resolve/(?P<rev>[^/]+)/(?P<file>.+)", quoted
        )
        found = file or api
        repo = self.hub.repos.get(found["id"]) if found else None
        if repo is None:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        let_in = repo.token and self.headers.get("Authorization") == f"Bearer {repo.token}"
        if repo.private and not (self.user and self.user.owns(found["id"])):
            return self._refuse(401, "RepoNotFound", "Repository not found")
        if repo.refuse and not let_in and not (repo.listed and api):
            return self._refuse(*repo.refuse)
        commit = repo.commit(unquote(found["rev"] or "main"))
        if commit is None:
            return self._refuse(404, "RevisionNotFound", "Invalid rev id")
        files = repo.files(commit)
        if file:
            return self._file(files.get(unquote(file["file"])), commit)
        if api["under"]:
            return self._refuse(404, "EntryNotFound", "no folders here")
        if api["what"] == "tree":
            return self._json(listing(files))
        return self._json(_info(api["id"], commit, files) | {"private": repo.private})

    def _file(self, data: bytes | None, commit: str) -> None:
        if data is None:
            return self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        headers = {"ETag": f'"{git_oid(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if self.hub.storage and self.path.endswith(".safetensors"):
            linked = {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(data))}
            place = {"Location": self.hub.storage.endpoint + self.path, "X-Repo-Commit": commit}
            return self._send(302, b"", place | linked)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if self.fault == "half" and self.command == "GET":
            data = data[: len(data) // 2]
        if not asked:
            return self._send(200, data, headers)
        first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return self._send(206, data[first : last + 1], headers)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str | None, message: str, more: dict | None = None) -> None:
        headers = {"X-Error-Message": message, **(more or {})}
        if code:
            headers["X-Error-Code"] = code
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        sent = 0 if self.command == "HEAD" else len(body)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.hub.requests.append(Request(self.command, urlsplit(self.path).path, status, sent, token))
        if sent and self.fault == "short":
            self.close_connection = True
            self.wfile.write(body[: sent // 2])
        elif sent:
            self.wfile.write(body)


def listing(files: dict[str, bytes]) -> list[dict]:
    return [
        {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
        for path, data in sorted(files.items())
    ]


def _info(repo_id: str, commit: str, files: dict[str, bytes]) -> dict:
    siblings = [{"rfilename": path} for path in sorted(files)]
    return {"id": repo_id, "sha": commit, "siblings": siblings, "tags": [], "private": False}
