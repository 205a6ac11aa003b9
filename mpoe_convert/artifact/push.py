"""Push an artifact to the Hub: its own files, in one commit, never over other files."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..request import as_path, check_token
from ..source.json_files import json_text, read_json_object
from ..source.texts import BUILDERS
from .block import checked_artifact
from .card_file import for_repository
from .destination import Destination, check_nothing_hides, explained, left_by_an_artifact, make_api, survey
from .layout import (
    CARD_FILE,
    EVALUATION_REPORT_FILE,
    RECIPE_FILE,
    REPORT_FILE,
    TRAINING_REPORT_FILE,
    file_names,
    own_files,
    read_artifact,
)

# Fields that name the converted model, and those that name other models and texts.
_BASES = {"base_model", "model"}
_PLACES = {*_BASES, "calibrate", "data", "eval_data", "other", "teacher", "tokenizer"}
REPORTS = {REPORT_FILE, TRAINING_REPORT_FILE, EVALUATION_REPORT_FILE}


@dataclass(frozen=True)
class Pushed:
    """The result of `push`.

    Attributes:
        repo_id: the repository.
        url: of the commit; of the repository's last commit, if nothing had `changed`.
        commit: its hash.
        pull_request: its URL, if one was opened.
        changed: whether the push made a commit.
        files: the artifact's files.
        deleted: files of an earlier artifact that the commit removed.
        left_out: files and folders beside the artifact that do not belong to it.
        num_bytes: of all `files`; those that the Hub has already are not sent.
    """

    repo_id: str
    url: str
    commit: str
    pull_request: str | None
    changed: bool
    files: tuple[str, ...]
    deleted: tuple[str, ...]
    left_out: tuple[str, ...]
    num_bytes: int


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    branch: str | None = None,
    overwrite: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
) -> Pushed:
    """Push an artifact to a model repository of the Hub, which is created if it does not exist.

    Only the artifact's own files are sent (`layout.own_files`), in one commit, which also deletes the files
    of an earlier artifact that this one does not have. Weight files that have arrived are not sent again when
    a failed push is repeated. In the card on the Hub the snippets load `repo_id`, and reports and the recipe
    name no folders of this machine; the local files are not changed.

    Args:
        folder: an artifact.
        repo_id, private, create_pr, branch, overwrite: as for `Destination`.
        commit_message: first line of the commit.
        token: by default HF_TOKEN or the stored login.

    Raises:
        RequestError: as for `Destination`.
        CheckpointError: the folder is no artifact, is incomplete, or has tensors that do not
            fit its config.json.
        HubError: the Hub refuses, cannot be reached, or holds something else there.

    >>> from mpoe_convert import push
    >>> push("out", "me/gpt2-experts", private=True).url  # doctest: +SKIP
    'https://huggingface.co/me/gpt2-experts/commit/...'
    """
    from huggingface_hub import CommitOperationDelete

    to = Destination(repo_id, private, create_pr, branch, overwrite)
    folder = as_path("folder", folder)
    check_token(token)
    files = own_files(folder)
    checked_artifact(folder)
    api = make_api(token)
    found = survey(to, api)
    check_nothing_hides(repo_id, files, found)
    stale = sorted(left_by_an_artifact(repo_id, found, api) - set(files))
    with explained(repo_id):
        if found.is_new:
            api.create_repo(repo_id, private=private or None)
        if branch is not None and found.lacks_branch:
            api.create_branch(repo_id, branch=branch, revision=found.commit)
        commit = api.create_commit(
            repo_id,
            [*_additions(folder, files, repo_id), *(CommitOperationDelete(name) for name in stale)],
            commit_message=commit_message or _message(folder),
            revision=branch,
            create_pr=create_pr,
            parent_commit=found.commit,
        )
    return Pushed(
        repo_id=repo_id,
        url=str(commit.commit_url),
        commit=commit.oid,
        pull_request=commit.pr_url,
        changed=commit.oid != found.commit,
        files=tuple(files),
        deleted=tuple(stale),
        left_out=tuple(sorted(_tops(file_names(folder)) - _tops(files))),
        num_bytes=sum((folder / name).stat().st_size for name in files),
    )


def _additions(folder: Path, files: Collection[str], repo_id: str) -> list:
    from huggingface_hub import CommitOperationAdd

    is_local = read_json_object(folder / REPORT_FILE).get("revision") is None
    added = []
    for name in files:
        content: bytes | str = str(folder / name)
        if name == CARD_FILE:
            content = for_repository((folder / name).read_text(encoding="utf-8"), repo_id).encode()
        elif name in REPORTS:
            values = _without_folders(read_json_object(folder / name), is_local)
            content = json_text(values | ({"base_path": None} if "base_path" in values else {})).encode()
        elif name == RECIPE_FILE:
            content = _recipe_without_folders((folder / name).read_text(encoding="utf-8"), is_local).encode()
        added.append(CommitOperationAdd(name, content))
    return added


def _without_folders(value: Any, base_is_local: bool, field: str = "") -> Any:
    """The value of a report without the folders of this machine: of a path its last name is left.

    Args:
        base_is_local: the model that was converted is a folder.
        field: that holds the value, or its list.
    """
    if isinstance(value, dict):
        return {key: _without_folders(each, base_is_local, key) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_folders(each, base_is_local, field) for each in value]
    if not isinstance(value, str):
        return value
    is_path = Path(value).is_absolute() or (field in _BASES and base_is_local)
    return Path(value).name if is_path or (field in _PLACES and _is_local(value)) else value


def _is_local(place: str) -> bool:
    """Whether models or texts that are named so are on this machine, not on the Hub."""
    path = Path(place)
    return (
        path.exists()
        or place.startswith((".", "~"))
        or len(path.parts) > 2
        or path.suffix.lower() in BUILDERS
    )


def _recipe_without_folders(text: str, base_is_local: bool) -> str:
    """The same of a recipe; one that names no such path, or is damaged, stays as it is."""
    import yaml

    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    kept = _without_folders(values, base_is_local)
    comments = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    return text if kept == values else comments + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)


def _tops(names: Collection[str]) -> set[str]:
    return {name.partition("/")[0] for name in names}


def _message(folder: Path) -> str:
    config, report = read_artifact(folder)
    base = report["base_model"] if report["revision"] else Path(report["base_model"]).name or "A model"
    return f"{base} as a mixture of {config['mpoe']['num_experts']} experts, by mpoe-convert {__version__}"
