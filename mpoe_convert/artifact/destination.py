"""The repository that a push goes to: whether the token may write there, and what it holds."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..errors import CheckpointError, HubError, RequestError, few
from ..options import called, switched
from ..source.hub import SINGLE, shard_names
from ..source.hub_errors import explain_writing
from ..source.json_files import read_json_object
from .layout import CARD_FILE, REPORT_FILE, is_weights, listed_files
from .weight_files import INDEX_FILE

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo


# What a repository may hold and still be empty: the Hub and its web page make them.
OF_THE_HUB = frozenset({".gitattributes", CARD_FILE})
WEIGHTS = SINGLE[".safetensors"]


@dataclass(frozen=True)
class Destination:
    """The repository that a push goes to, and what the push may do there.

    Attributes:
        repo_id: "owner/name".
        private: make the repository private, if it has to be made.
        create_pr: open a pull request instead of committing; nothing there changes then.
        branch: to commit to, made from the main one if it is not there.
        overwrite: commit also over a repository that holds something else.

    Raises:
        RequestError: `repo_id` is not a valid repository name, or a pull request is asked for with a branch.
    """

    repo_id: str
    private: bool = False
    create_pr: bool = False
    branch: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        if not isinstance(self.repo_id, str):
            raise RequestError(f"the repository is {self.repo_id!r}; expected USER/NAME")
        if self.branch is not None and not (isinstance(self.branch, str) and self.branch.strip()):
            raise RequestError(f"{called('branch')} is {self.branch!r}; expected the name of a branch")
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise RequestError(
                f"'{self.repo_id}' cannot be a repository; expected USER/NAME of letters, digits, '-', '_' "
                "and '.', with at most 96 characters"
            ) from error
        if "/" not in self.repo_id:
            raise RequestError(f"'{self.repo_id}' names no owner: expected USER/NAME or ORGANIZATION/NAME")
        if self.create_pr and self.branch:
            raise RequestError(
                "a pull request is opened against the main branch: leave out "
                f"{called('branch')} or {called('create_pr')}"
            )


@dataclass(frozen=True)
class Found:
    """What the destination holds; where its branch does not exist yet, what the main branch holds."""

    is_new: bool
    lacks_branch: bool
    commit: str | None = None
    files: frozenset[str] = frozenset()
    is_artifact: bool = False


def check_destination(to: Destination, token: str | None = None) -> None:
    """Check before any work that a push could go to this destination. Changes nothing there.

    Raises:
        HubError: nobody is logged in, the token may not write there, or the repository holds something else.
    """
    survey(to, make_api(token))


def make_api(token: str | None) -> HfApi:
    """A client of the Hub that names this tool; the token is by default HF_TOKEN or the stored login."""
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="mpoe-convert", library_version=__version__)


def survey(to: Destination, api: HfApi) -> Found:
    """Ask the Hub who is logged in and what the destination holds. Raises HubError if a push would fail."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    with explained(to.repo_id):
        user = api.whoami()
        _check_role(user, to)
        try:
            info = api.model_info(to.repo_id)
        except RepositoryNotFoundError:
            _check_new(user, to)
            return Found(is_new=True, lacks_branch=to.branch is not None)
        if not to.create_pr:  # a pull request needs read access only
            api.auth_check(to.repo_id, write=True)
        _check_visibility(info, to)
        lacks_branch = False
        try:
            info = api.model_info(to.repo_id, revision=to.branch) if to.branch else info
        except RevisionNotFoundError:
            if to.branch and to.branch.startswith("refs/"):
                raise
            lacks_branch = True
    files = frozenset(file.rfilename for file in info.siblings or ())
    found = Found(False, lacks_branch, info.sha, files)
    is_artifact = "config.json" in files and "mpoe" in _object(_fetch(to.repo_id, "config.json", found, api))
    found = replace(found, is_artifact=is_artifact)
    if not (found.is_artifact or files <= OF_THE_HUB or to.overwrite or to.create_pr):
        there = few(sorted(files - OF_THE_HUB), 4)
        raise HubError(
            f"'{to.repo_id}' holds something else ({there}): choose another name, or pass "
            f"{switched('overwrite')} to commit over it"
        )
    return found


def _check_role(user: dict, to: Destination) -> None:
    token = (user.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":  # the Hub itself checks fine-grained tokens
        raise HubError(
            f"the token of {user['name']} may only read, and a push writes to '{to.repo_id}': make one with "
            f"write permission and use it by `hf auth login` or {called('token')}"
        )


def _check_visibility(info: ModelInfo, to: Destination) -> None:
    if to.private and not info.private:
        raise HubError(
            f"'{to.repo_id}' is there already and public: make it private on its settings page, or leave "
            f"{called('private')} out"
        )


def _check_new(user: dict, to: Destination) -> None:
    if to.create_pr:
        raise HubError(
            f"there is no repository '{to.repo_id}' to propose anything to: leave out "
            f"{called('create_pr')} to make it"
        )
    owner = to.repo_id.partition("/")[0]
    owners = [user["name"], *(org["name"] for org in user.get("orgs", ()) if org.get("roleInOrg") != "read")]
    if owner not in owners:
        raise HubError(
            f"'{to.repo_id}' is not there and {user['name']} cannot make it: expected an owner out of "
            f"{', '.join(owners)}"
        )


def check_nothing_hides(repo_id: str, files: Collection[str], found: Found) -> None:
    """Raise HubError for a repository where transformers would load something other than what is pushed."""
    hiding = {"adapter_config.json", *([] if WEIGHTS in files else [WEIGHTS])}
    if not found.is_artifact and (there := sorted(hiding & found.files)):
        raise HubError(
            f"'{repo_id}' holds {there[0]}, which transformers would load instead of this artifact's "
            "weights: delete it there, or choose another name"
        )


def left_by_an_artifact(repo_id: str, found: Found, api: HfApi) -> frozenset[str]:
    """The files of an artifact that the destination holds: those its report lists, and its weights.

    Raises:
        HubError: a file that says so cannot be read.
    """
    if not found.is_artifact:
        return frozenset()
    names = {WEIGHTS, INDEX_FILE}
    if REPORT_FILE in found.files:
        names |= set(listed_files(_object(_fetch(repo_id, REPORT_FILE, found, api))))
    if INDEX_FILE in found.files:
        names |= {name for name in shard_names(_fetch(repo_id, INDEX_FILE, found, api)) if is_weights(name)}
    return found.files & names - OF_THE_HUB


def _fetch(repo_id: str, name: str, found: Found, api: HfApi) -> Path:
    """Download a small file of the destination into the usual cache. Raises HubError."""
    with explained(repo_id):
        return Path(api.hf_hub_download(repo_id, name, revision=found.commit))


def _object(path: Path) -> dict:
    """The JSON object that a file holds; {} if it holds none."""
    try:
        return read_json_object(path)
    except CheckpointError:
        return {}


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Turn whatever `huggingface_hub` raises inside the block into a HubError of one line."""
    try:
        yield
    except HubError:
        raise
    except Exception as exc:
        raise explain_writing(exc, repo_id) from exc
