"""Failures of the Hugging Face Hub and the connection to it: each as one line that names the next step.

`huggingface_hub` is imported inside the functions: the command's `--help` must not wait for it.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from ..errors import HubError, one_line
from ..options import called

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError


RELATIVE = "a relative path counts from the current folder"  # where a folder may have been meant
NOT_TWICE = "weight files that have arrived are not sent again"


def damaged(repo: str, what: str) -> str:
    """The message for a repository with an invalid safetensors header."""
    return (
        f"{repo} holds a safetensors file whose header is not valid ({what}): the upload is "
        "damaged, tell its owner"
    )


def no_id(model_id: str | None) -> str:
    """The message about a name that is of no folder and cannot be an id."""
    return (
        f"{one_line(repr(model_id))} is neither a folder here nor a Hub id "
        f"(expected 'name' or 'owner/name'): check the path ({RELATIVE}) or the id"
    )


def explain(exc: BaseException, model_id: str | None = None, revision: str | None = None) -> HubError:
    """Turn anything that `huggingface_hub` raises while reading into one HubError of one line.

    No code outside this module knows the library's exception classes. The order of the checks matters: gated
    is a subclass of "not found", all HTTP errors are OSErrors, and LocalEntryNotFoundError keeps the reason
    in `__cause__`.

    Args:
        exc: what was raised.
        model_id: the repository that was asked for.
        revision: of it.
    """
    from huggingface_hub import errors

    repo = f"'{model_id}'" if model_id else "the repository"
    at = f" at revision '{revision}'" if revision else ""
    if isinstance(exc, HubError):
        return exc
    if isinstance(exc, errors.HFValidationError):
        return HubError(no_id(model_id))
    if isinstance(exc, errors.LocalEntryNotFoundError) and _reason(exc) is not exc:
        return explain(_reason(exc), model_id, revision)
    if isinstance(exc, errors.HfHubHTTPError):
        return HubError(_http(exc, repo, revision))
    if isinstance(exc, errors.OfflineModeIsEnabled):
        return HubError(
            f"{repo}{at} is not complete in the local cache and offline mode is on: unset "
            f"HF_HUB_OFFLINE, or download it first; if it is a folder: {RELATIVE}"
        )
    if isinstance(exc, errors.LocalEntryNotFoundError):
        return HubError(
            f"{repo}{at} is not complete in the local cache and the Hub cannot be asked: "
            "check the connection and HF_HUB_OFFLINE"
        )
    if isinstance(exc, errors.SafetensorsParsingError):
        return HubError(damaged(repo, one_line(exc)))
    if _is_disk_full(exc):
        return HubError(
            f"the disk filled up while downloading {repo}: free some space, or point HF_HOME at a "
            "larger disk, and run again (finished files are kept)"
        )
    if is_connection(exc):
        return HubError(
            f"no connection to the Hub for {repo} ({one_line(exc)}): check the network and HF_ENDPOINT, "
            f"or pass a local folder ({RELATIVE})"
        )
    return HubError(f"downloading {repo}{at} failed: {type(exc).__name__}: {one_line(exc)}")


def _http(exc: HfHubHTTPError, repo: str, revision: str | None) -> str:
    from huggingface_hub import errors

    status = exc.response.status_code
    if isinstance(exc, errors.GatedRepoError):
        return (
            f"{repo} is gated: accept its conditions on its Hub page, then run `hf auth login` "
            f"or pass {called('token')} of that account"
        )
    if isinstance(exc, errors.DisabledRepoError):
        return f"{repo} has been disabled on the Hub: choose another source"
    if isinstance(exc, errors.RevisionNotFoundError):
        return (
            f"{repo} has no revision '{revision or 'main'}': expected a branch, a tag or a full "
            "commit hash of that repository"
        )
    if isinstance(exc, errors.EntryNotFoundError):
        file = str(exc.response.request.url).split("/resolve/")[-1].partition("/")[2] or "a requested file"
        return f"{repo} has no file '{file}': check the id and {called('revision')}"
    if status == 401 and "credentials" in str(exc):
        return f"the Hub refused the token for {repo}: run `hf auth login` or pass a valid {called('token')}"
    if isinstance(exc, errors.RepositoryNotFoundError):
        return (
            f"{repo} is neither a folder here nor a repository on the Hub that you can see: check the "
            f"spelling ({RELATIVE}); if it is private, run `hf auth login` or pass {called('token')}"
        )
    if status in (401, 403):
        return (
            f"the Hub refused access to {repo} (HTTP {status}): run `hf auth login` or pass "
            f"{called('token')} of an account that may read it"
        )
    if status == 429:
        return f"the Hub's rate limit is reached (HTTP 429) for {repo}: log in, or wait and try again"
    if status >= 500:
        return f"the Hub failed with HTTP {status} for {repo}: try again later"
    return f"the Hub answered HTTP {status} for {repo}: {one_line(exc)}"


def explain_writing(exc: BaseException, repo_id: str) -> HubError:
    """Turn anything that `huggingface_hub` raises while writing into one HubError of one line."""
    from huggingface_hub import errors

    while isinstance(exc, RuntimeError) and exc.__cause__ is not None:  # the file that was being sent
        exc = exc.__cause__
    repo = f"'{repo_id}'"
    if isinstance(exc, errors.LocalTokenNotFoundError):
        return HubError(
            f"nobody is logged in to write to {repo}: run `hf auth login`, set HF_TOKEN or pass "
            f"{called('token')}"
        )
    if isinstance(exc, errors.HfHubHTTPError):
        return HubError(_http_writing(exc, repo))
    if isinstance(exc, errors.OfflineModeIsEnabled):
        return HubError(f"offline mode is on, nothing can be pushed to {repo}: unset HF_HUB_OFFLINE")
    if is_connection(exc):
        return HubError(
            f"the connection to the Hub failed for {repo} ({one_line(exc)}): check the network and "
            f"HF_ENDPOINT, then run again; {NOT_TWICE}"
        )
    return HubError(f"pushing to {repo} failed: {type(exc).__name__}: {one_line(exc)}")


def _http_writing(exc: HfHubHTTPError, repo: str) -> str:
    from huggingface_hub import errors

    status = exc.response.status_code
    said = f": {one_line(exc.server_message, 120)}" if exc.server_message else ""
    if isinstance(exc, errors.RevisionNotFoundError):
        return f"{repo} has no such branch{said}: expected one that is there, or a name for a new one"
    if status == 401 and not isinstance(exc, errors.RepositoryNotFoundError):
        return f"the Hub refused the token for {repo}: run `hf auth login` or pass a valid {called('token')}"
    if isinstance(exc, errors.RepositoryNotFoundError) or status == 404:
        return (
            f"there is no repository {repo} that this token may see: check the name, and the account by "
            "`hf auth whoami`"
        )
    if status in (402, 403):
        return (
            f"the Hub does not let this token write to {repo} (HTTP {status}{said}): use one with the "
            f"permission to write there, by `hf auth login` or {called('token')}"
        )
    if status in (409, 412):
        return f"{repo} was changed meanwhile (HTTP {status}{said}): look at it, then run again"
    if status == 413:
        return (
            f"the Hub refused a file for {repo} as too large (HTTP 413): convert again with a smaller "
            + called("max_shard_size")
        )
    if status == 429:
        return (
            f"the Hub's rate limit is reached (HTTP 429) for {repo}: wait some minutes and run again; "
            f"{NOT_TWICE}"
        )
    if status >= 500:
        return f"the Hub failed with HTTP {status} for {repo}: run again later; {NOT_TWICE}"
    return f"the Hub answered HTTP {status} for {repo}{said or f': {one_line(exc)}'}"


def is_offline(exc: BaseException | None) -> bool:
    """Whether a failure, or one that it came of, is that the cache lacks a file and nobody was asked."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    seen: set[int] = set()
    while exc is not None and id(exc) not in seen:
        if isinstance(exc, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
            return True
        seen.add(id(exc))
        exc = exc.__cause__ or exc.__context__
    return False


def _reason(exc: BaseException) -> BaseException:
    """The failure that made the library look into the cache: the first cause that is not about the cache."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while isinstance(exc, LocalEntryNotFoundError) and exc.__cause__ is not None:
        exc = exc.__cause__
    return exc


def _is_disk_full(exc: BaseException) -> bool:
    full = isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT)
    # The accelerated transfer reports a full disk only in words.
    return full or "no space left on device" in str(exc).lower()


def is_connection(exc: BaseException) -> bool:
    """Whether the network failed, and not the Hub."""
    # By module name: the HTTP library is huggingface_hub's choice and has changed before (requests,
    # httpx, httpx2).
    library = type(exc).__module__.partition(".")[0]
    return isinstance(exc, (ConnectionError, TimeoutError)) or library.startswith(
        ("httpx", "httpcore", "requests", "urllib3")
    )
