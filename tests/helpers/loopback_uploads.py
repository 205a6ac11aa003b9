"""The half of the loopback Hub that is written to: who is who, creation, LFS objects, commits, branches."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

WRITTEN = "info|preupload|commit|branch|paths-info"
LARGE = (".safetensors", ".bin", ".png")


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def oid(path: str, data: bytes) -> str:
    """What preupload says of a file that is there."""
    return hashlib.sha256(data).hexdigest() if path.endswith(LARGE) else git_oid(data)


def wrong_fields(front: object) -> list[str]:
    """The fields of a model card's front matter that are not what the Hub's specification says they are.

    https://github.com/huggingface/hub-docs/blob/main/modelcard.md
    """
    if not isinstance(front, dict):
        return ["front matter"]
    texts = ("library_name", "pipeline_tag", "license_name", "license_link")
    lists = ("license", "language", "base_model", "datasets", "tags")
    wrong = [name for name in texts if not isinstance(front.get(name, ""), str)]
    for name in lists:
        values = front.get(name, [])
        values = values if isinstance(values, list) else [values]
        wrong += [name] if not all(isinstance(value, str) for value in values) else []
    for model in front.get("model-index", []):
        for result in model["results"]:
            named = [
                model["name"],
                result["task"]["type"],
                result["dataset"]["type"],
                result["dataset"]["name"],
            ]
            named += [metric["type"] for metric in result["metrics"]]
            valued = all(isinstance(metric["value"], (int, float, str)) for metric in result["metrics"])
            wrong += ["model-index"] if not (valued and all(isinstance(n, str) for n in named)) else []
    return wrong


class Uploads:
    """Methods of the request handler; the Hub's own refusals with its own statuses."""

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        value = None if "/commit/" in path else json.loads(self.body)
        if path == "/api/validate-yaml":
            return self._validate(value["content"])
        if path == "/api/repos/create":
            return self._create(value)
        if stored := re.fullmatch(r"/objects/(\w+)/verify", path):
            whole = len(self.hub.objects.get(stored[1], b"")) == value["size"]
            return self._json({}) if whole else self._refuse(400, None, "The object has another size")
        found = re.fullmatch(
            rf"/(?:api/)?(?:models/)?(?P<id>.+?)(?:\.git)?/(?P<what>{WRITTEN})/(?P<rest>.+)", path
        )
        if found is None or found["id"] not in self.hub.repos:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        proposed = "create_pr" in parse_qs(urlsplit(self.path).query)
        reads = proposed or found["what"] == "paths-info"
        reads = reads or (found["what"] == "info" and "ref" not in value)  # objects for a pull request
        if not reads and not (self.user and self.user.may_write(found["id"])):
            return self._refuse(403, None, "You have read access but not write access")
        rest = unquote(found["rest"])
        if found["what"] == "info":
            return self._json({"objects": [self._lfs_object(each) for each in value["objects"]]})
        if found["what"] == "branch":
            return self._branch(found["id"], rest)
        repo = self.hub.repos[found["id"]]
        if repo.commit(rest) is None:
            return self._refuse(404, "RevisionNotFound", "Invalid rev id")
        if found["what"] == "commit":
            return self._commit(found["id"], rest, proposed)
        files = repo.files(repo.commit(rest))
        if found["what"] == "paths-info":
            from helpers.loopback_hub import listing

            return self._json(listing({name: files[name] for name in value["paths"] if name in files}))
        return self._json({"files": [_upload_mode(file["path"], files) for file in value["files"]]})

    def do_PUT(self) -> None:
        data = self.body[: len(self.body) // 2] if self.fault == "half" else self.body
        self.hub.objects[self.path.rpartition("/")[2]] = data
        self._json({})

    def answer_who(self, path: str) -> None:
        """Who somebody is, and whether a repository may be read or written by them."""
        if self.user is None:
            return self._refuse(401, None, "Invalid credentials in Authorization header")
        if path == "/api/whoami-v2":
            token = {"type": "access_token", "accessToken": {"displayName": "t", "role": self.user.role}}
            orgs = [{"name": name, "roleInOrg": "write"} for name in self.user.orgs]
            return self._json({"type": "user", "name": self.user.name, "orgs": orgs, "auth": token})
        repo_id = re.fullmatch(r"/api/models/(.+)/auth-check(/write)?", path)[1]
        if repo_id not in self.hub.repos:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        if path.endswith("/write") and not self.user.may_write(repo_id):
            return self._refuse(403, None, "You have read access but not write access")
        return self._json({})

    def _validate(self, content: str) -> None:
        try:
            front = yaml.safe_load(content.split("---", 2)[1]) if content.startswith("---") else {}
            errors = [{"message": f"{name} is not allowed to be that"} for name in wrong_fields(front)]
        except yaml.YAMLError as error:
            errors = [{"message": str(error)}]
        if errors:
            return self._send(400, json.dumps({"errors": errors, "warnings": []}).encode(), {})
        warnings = [] if front else [{"message": "empty or missing yaml metadata in repo card"}]
        return self._json({"errors": [], "warnings": warnings})

    def _create(self, asked: dict) -> None:
        from helpers.loopback_hub import Repo

        user = self.user
        if user is None:
            return self._refuse(401, None, "Invalid username or password.")
        repo_id = f"{asked.get('organization') or user.name}/{asked['name']}"
        if not user.may_write(repo_id):
            return self._refuse(403, None, "You don't have the rights to create a model under this namespace")
        if repo_id in self.hub.repos:
            url = {"error": "You already created this model repo", "url": f"{self.hub.endpoint}/{repo_id}"}
            return self._send(409, json.dumps(url).encode(), {})
        private = asked.get("visibility") == "private"
        self.hub.repos[repo_id] = Repo({"main": {".gitattributes": b"*.bin lfs\n"}}, private=private)
        return self._json({"url": f"{self.hub.endpoint}/{repo_id}", "id": repo_id})

    def _branch(self, repo_id: str, name: str) -> None:
        repo = self.hub.repos[repo_id]
        if name in repo.revisions:
            return self._refuse(409, None, "Reference already exists")
        repo.revisions[name], repo.commits[name] = repo.revisions["main"], repo.commits["main"]
        return self._json({})

    def _lfs_object(self, asked: dict) -> dict:
        """What is here already needs no action."""
        asked = {"oid": asked["oid"], "size": asked["size"]}
        if len(self.hub.objects.get(asked["oid"], b"")) == asked["size"]:
            return asked
        href = f"{self.hub.endpoint}/objects/{asked['oid']}"
        return asked | {"actions": {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}}

    def _commit(self, repo_id: str, branch: str, proposed: bool) -> None:
        repo = self.hub.repos[repo_id]
        lines = [json.loads(line) for line in self.body.splitlines()]
        parent = lines[0]["value"].get("parentCommit")
        if parent is not None and parent != repo.commit(branch):
            return self._refuse(412, None, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.revisions[branch])
        for line in lines[1:]:
            path, value = line["value"]["path"], line["value"]
            if line["key"] == "file":
                files[path] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile" and value["oid"] in self.hub.objects:
                files[path] = self.hub.objects[value["oid"]]
                assert hashlib.sha256(files[path]).hexdigest() == value["oid"]
            elif line["key"] == "deletedFile" and path in files:
                del files[path]
            else:
                return self._refuse(400, None, f"{line['key']} {path} is not there")
        number = sum(name.startswith("refs/pr/") for name in repo.revisions) + 1
        commit = repo.write(f"refs/pr/{number}" if proposed else branch, files)
        repo.messages[commit] = lines[0]["value"]["summary"]
        return self._json(
            {
                "commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{commit}",
                "commitOid": commit,
                "pullRequestUrl": f"{self.hub.endpoint}/{repo_id}/discussions/{number}" if proposed else None,
            }
        )


def _upload_mode(path: str, files: dict[str, bytes]) -> dict:
    return {
        "path": path,
        "uploadMode": "lfs" if path.endswith(LARGE) else "regular",
        "shouldIgnore": False,
        "oid": oid(path, files[path]) if path in files else None,
    }
