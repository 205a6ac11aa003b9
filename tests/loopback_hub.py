"""A Hub on 127.0.0.1 for tests: real `huggingface_hub` talks to it, nothing is mocked.

What downloads need (information, tree listing, file resolution with ranges, and the refusals) and what
uploads need (creation, preupload, LFS objects, commits on main), of models and, under
"datasets/owner/name", of datasets. It remembers every request with the bytes it sent, so that a test can say
what was *not* fetched.
Start it in the test process and run the client in a subprocess with `environment(...)`:
`huggingface_hub` reads its constants at import.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit


class Request(NamedTuple):
    """One answered request: `sent` counts the bytes of the body that went out."""

    method: str
    path: str
    status: int
    sent: int


@dataclass
class Repo:
    """A model repository: revision -> files.

    `refuse` = (status, X-Error-Code or None, message) answers everything; with `listed` the listing
    is public and only the files are refused, as for gated repositories; with `token` whoever has it
    is let in.
    """

    revisions: dict[str, dict[str, bytes]]
    refuse: tuple[int, str | None, str] | None = None
    listed: bool = False
    token: str | None = None
    commits: dict[str, str] = field(default_factory=dict)

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


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            repo_id = "/".join(filter(None, (json.loads(body).get("organization"), json.loads(body)["name"])))
            self.hub.repos.setdefault(repo_id, Repo({"main": {}}))
            return self._json({"url": f"{self.hub.endpoint}/{repo_id}", "id": repo_id})
        if path.endswith("/preupload/main"):
            return self._json({"files": [_upload_mode(file) for file in json.loads(body)["files"]]})
        if path.endswith("/info/lfs/objects/batch"):
            return self._json({"objects": [self._lfs_object(obj) for obj in json.loads(body)["objects"]]})
        asked = re.fullmatch(r"/api/(?:models/)?(?P<id>.+)/paths-info/(?P<rev>[^/]+)", path)
        if asked and asked["id"] in self.hub.repos:
            repo = self.hub.repos[asked["id"]]
            files = repo.files(repo.commit(asked["rev"]))
            wanted = json.loads(body)["paths"]
            return self._json(_listing({name: data for name, data in files.items() if name in wanted}))
        commit = re.fullmatch(r"/api/models/(?P<id>.+)/commit/main", path)
        if commit is None or commit["id"] not in self.hub.repos:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        repo = self.hub.repos[commit["id"]]
        oid = repo.write("main", repo.revisions["main"] | self._committed(body))
        url = f"{self.hub.endpoint}/{commit['id']}/commit/{oid}"
        return self._json({"commitUrl": url, "commitOid": oid, "pullRequestUrl": None})

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.objects[self.path.rpartition("/")[2]] = data
        self._json({})

    def _lfs_object(self, obj: dict) -> dict:
        upload = {"href": f"{self.hub.endpoint}/objects/{obj['oid']}"}
        return obj | {"actions": {"upload": upload}, "authenticated": True}

    def _committed(self, body: bytes) -> dict[str, bytes]:
        files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
                assert hashlib.sha256(files[value["path"]]).hexdigest() == value["oid"]
        return files

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self) -> None:
        quoted = urlsplit(self.path).path  # a slash in a revision is quoted, one in a path is not
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
        return self._json(_listing(files) if api["what"] == "tree" else _info(api["id"], commit, files))

    def _file(self, data: bytes | None, commit: str) -> None:
        if data is None:
            return self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        headers = {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
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
        self.hub.requests.append(Request(self.command, urlsplit(self.path).path, status, sent))
        if sent:
            self.wfile.write(body)


def _upload_mode(file: dict) -> dict:
    large = file["path"].endswith((".safetensors", ".bin"))
    return {
        "path": file["path"],
        "uploadMode": "lfs" if large else "regular",
        "shouldIgnore": False,
        "oid": None,
    }


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _listing(files: dict[str, bytes]) -> list[dict]:
    return [
        {"type": "file", "path": path, "size": len(data), "oid": _oid(data)}
        for path, data in sorted(files.items())
    ]


def _info(repo_id: str, commit: str, files: dict[str, bytes]) -> dict:
    siblings = [{"rfilename": path} for path in sorted(files)]
    return {"id": repo_id, "sha": commit, "siblings": siblings, "tags": [], "private": False}
