"""The Hugging Face Hub: fetch a checkpoint or only its headers, and tell each failure in one line.

`huggingface_hub` is imported inside the functions: the command's `--help` must not wait for it. The
cache, the endpoint, the stored token and offline mode are whatever `huggingface_hub` makes of its
environment variables.
"""

from __future__ import annotations

import errno
import json
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path

from .errors import HubError

# Files that travel with the weights unchanged. The Hub matches case-sensitively, hence the
# spellings.
COMPANION_PATTERNS = (
    "tokenizer*",
    "*tokenizer*.json",
    "tekken.json",
    "*vocab*",
    "merges*",
    "*merges.txt",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "*.codes",
    "sentencepiece*",
    "spiece*",
    "normalizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "*preprocessor_config.json",
    "*processor_config.json",
    "feature_extractor*.json",
    "chat_template*",
    "*.jinja",
    *("LICENSE*", "License*", "license*", "LICENCE*", "Licence*", "licence*"),
    *("NOTICE*", "Notice*", "notice*", "COPYING*", "USE_POLICY*"),
)
# Named chat templates, in the folder where transformers looks for them.
CHAT_TEMPLATES = "additional_chat_templates/*.jinja"
# What no download and no copy may ever take: code, pickles and the weights of other frameworks.
NEVER_PATTERNS = (
    *("*.py", "*.pyc", "*.pkl", "*.pickle", "*.pt", "*.pth", "*.ckpt", "*.npz", "*.npy"),
    *(
        "*.h5",
        "*.msgpack",
        "*.onnx",
        "*.onnx_data",
        "*.gguf",
        "*.ggml",
        "*.tflite",
        "*.ot",
        "*.mlmodel",
    ),
)
RELATIVE = "a relative path counts from the current folder"  # where a folder may have been meant
SINGLE = {".safetensors": "model.safetensors", ".bin": "pytorch_model.bin"}


def download(
    model_id: str, *, revision: str | None, token: str | None, weights: bool = True
) -> tuple[Path, str]:
    """Fetch a repository's top-level files into the usual cache; return (folder, commit).

    Only what a conversion needs: JSON files, tokenizer files, chat templates (named ones are in a
    subfolder), licences, and one set of weights:
    `model.safetensors`, else the shards its index names, else `pytorch_model.bin`, else the shards
    of that. Never code, other frameworks' weights, or weight variants. `weights=False` stops before
    the weights, so that a repository that is going to be refused is refused after a few kilobytes.

    Raises HubError, in one line, for whatever the Hub or the connection does.
    """
    small = ["*.json", "README.md", *COMPANION_PATTERNS]  # the card names the licence
    ignore = [*NEVER_PATTERNS, "*/*", "*.bin", "*.safetensors"]
    folder, commit = _snapshot(model_id, revision, token, small, ignore)
    if any(fnmatchcase(name, CHAT_TEMPLATES) for name in listing(model_id, commit)):
        _snapshot(model_id, commit, token, [CHAT_TEMPLATES], [*NEVER_PATTERNS, "*/*/*"])
    if weights:
        _fetch_weights(model_id, folder, commit, token)
    return folder, commit


def download_papers(model_id: str) -> Path:
    """Fetch what lies beside an artifact's weights: reports, recipe, card, code. Raises HubError."""
    papers = ["*.json", "*.yaml", "*.md", "*.py", *COMPANION_PATTERNS]
    return _snapshot(model_id, None, None, papers, ["*/*", "*.safetensors.index.json"])[0]


def _fetch_weights(model_id: str, folder: Path, commit: str, token: str | None) -> None:
    # The commit is known now: the listing is cached, so each further snapshot costs no request of
    # its own, and the branch cannot move between the files.
    names = listing(model_id, commit)
    for single in SINGLE.values():
        if single in names or not names:  # a snapshot that matches nothing says so on stderr
            _snapshot(model_id, commit, token, [single], None)
        if (folder / single).is_file():
            return
        shards = _shard_names(folder / f"{single}.index.json")
        if shards:
            _snapshot(model_id, commit, token, [escape(name) for name in shards], NEVER_PATTERNS)
            return


def weights_cached(folder: Path, names: list[str]) -> bool:
    """Whether `folder` already holds, whole, the weights that `download` would choose."""
    for single in SINGLE.values():
        if single in names:
            return (folder / single).is_file()
        shards = _shard_names(folder / f"{single}.index.json")
        if shards:
            return all((folder / name).is_file() for name in shards)
    return False


def _shard_names(index: Path) -> list[str]:
    """The files an index names; [] if it is absent or damaged (opening the checkpoint says how)."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({name for name in names if isinstance(name, str)})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def _snapshot(model_id, revision, token, allow, ignore) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            model_id,
            revision=revision,
            token=token,
            allow_patterns=list(allow),
            ignore_patterns=list(ignore) if ignore else None,
            library_name="mpoe-convert",
        )
    except Exception as exc:
        raise explain(exc, model_id, revision) from exc
    # Snapshots live in `snapshots/<commit>`: the folder's name is the resolved revision.
    return Path(folder), Path(folder).name


def listing(model_id: str, commit: str) -> list[str]:
    """All files of the repository at `commit`, from the listing that `download` cached, or []."""
    from huggingface_hub import get_cached_repo_tree

    try:
        return sorted(file.path for file in get_cached_repo_tree(model_id, revision=commit))
    except Exception:  # only used to word messages: an older cache without a listing is no error
        return []


def remote_headers(
    model_id: str, revision: str | None, token: str | None
) -> dict[str, tuple[str, tuple[int, ...], str]] | None:
    """Read tensor name -> (safetensors dtype code, shape, file) without downloading weights.

    Two ranged requests per file at most. None for a repository without `model.safetensors` or its
    index: the headers of `.bin` files are inside the pickle, so the caller has to download those
    (they go to the usual cache, where the conversion finds them).

    Raises HubError.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        found = HfApi(token=token, library_name="mpoe-convert").get_safetensors_metadata(
            model_id, revision=revision
        )
    except NotASafetensorsRepoError:
        return None
    except (KeyError, TypeError, AttributeError) as exc:  # the library trusts the header's entries
        raise HubError(_damaged(f"'{model_id}'", f"{type(exc).__name__}: {_line(exc)}")) from exc
    except Exception as exc:
        raise explain(exc, model_id, revision) from exc
    headers = {}
    for file, header in sorted(found.files_metadata.items()):
        for name, tensor in header.tensors.items():
            if not all(type(count) is int and count >= 0 for count in tensor.shape):
                what = f"{file}: tensor {name!r} has the shape {tensor.shape}"
                raise HubError(_damaged(f"'{model_id}'", what))
            headers[name] = (tensor.dtype, tuple(tensor.shape), file)
    return headers


def _damaged(repo: str, what: str) -> str:
    return (
        f"{repo} holds a safetensors file whose header is not valid ({what}): the upload is "
        "damaged, tell its owner"
    )


def explain(exc: BaseException, model_id: str | None = None, revision: str | None = None) -> HubError:
    """Turn anything that `huggingface_hub` raises into one HubError of one line.

    The one place that knows these classes. Their order matters: gated is a kind of "not found", all
    HTTP errors are OSErrors, and what cannot be fetched or found in the cache hides the reason in
    `__cause__`.
    """
    from huggingface_hub import errors

    repo = f"'{model_id}'" if model_id else "the repository"
    at = f" at revision '{revision}'" if revision else ""
    if isinstance(exc, HubError):
        return exc
    if isinstance(exc, errors.HFValidationError):
        return HubError(
            f"{repo} is neither a folder here nor a Hub id (expected 'name' or 'owner/name'): "
            f"check the path ({RELATIVE}) or the id"
        )
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
        return HubError(_damaged(repo, _line(exc)))
    if _is_disk_full(exc):
        return HubError(
            f"the disk filled up while downloading {repo}: free some space, or point HF_HOME at a "
            "larger disk, and run again (finished files are kept)"
        )
    if _is_connection(exc):
        return HubError(
            f"no connection to the Hub for {repo} ({_line(exc)}): check the network and HF_ENDPOINT, "
            f"or pass a local folder ({RELATIVE})"
        )
    return HubError(f"downloading {repo}{at} failed: {type(exc).__name__}: {_line(exc)}")


def _http(exc, repo: str, revision: str | None) -> str:
    from huggingface_hub import errors

    status = exc.response.status_code
    if isinstance(exc, errors.GatedRepoError):
        return (
            f"{repo} is gated: accept its conditions on its Hub page, then run `hf auth login` "
            "or pass --token of that account"
        )
    if isinstance(exc, errors.DisabledRepoError):
        return f"{repo} has been disabled on the Hub: choose another source"
    if isinstance(exc, errors.RevisionNotFoundError):
        return (
            f"{repo} has no revision '{revision or 'main'}': expected a branch, a tag or a full "
            "commit hash of that repository"
        )
    if isinstance(exc, errors.EntryNotFoundError):
        file = str(exc.request.url).split("/resolve/")[-1].partition("/")[2] or "a requested file"
        return f"{repo} has no file '{file}': check the id and --revision"
    if status == 401 and "credentials" in str(exc):
        return f"the Hub refused the token for {repo}: run `hf auth login` or pass a valid --token"
    if isinstance(exc, errors.RepositoryNotFoundError):
        return (
            f"{repo} is neither a folder here nor a repository on the Hub that you can see: check the "
            f"spelling ({RELATIVE}); if it is private, run `hf auth login` or pass --token"
        )
    if status in (401, 403):
        return (
            f"the Hub refused access to {repo} (HTTP {status}): run `hf auth login` or pass --token of "
            "an account that may read it"
        )
    if status == 429:
        return f"the Hub's rate limit is reached (HTTP 429) for {repo}: log in, or wait and try again"
    if status >= 500:
        return f"the Hub failed with HTTP {status} for {repo}: try again later"
    return f"the Hub answered HTTP {status} for {repo}: {_line(exc)}"


def _reason(exc: BaseException) -> BaseException:
    """What went wrong before the cache was tried: the first cause that is not about the cache."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while isinstance(exc, LocalEntryNotFoundError) and exc.__cause__ is not None:
        exc = exc.__cause__
    return exc


def _is_disk_full(exc: BaseException) -> bool:
    full = isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT)
    # The accelerated transfer reports a full disk only in words.
    return full or "no space left on device" in str(exc).lower()


def _is_connection(exc: BaseException) -> bool:
    # By module name: the HTTP library is huggingface_hub's choice and has changed before (requests,
    # httpx, httpx2).
    library = type(exc).__module__.partition(".")[0]
    return isinstance(exc, (ConnectionError, TimeoutError)) or library.startswith(
        ("httpx", "httpcore", "requests", "urllib3")
    )


def _line(exc: BaseException, limit: int = 200) -> str:
    text = " ".join(str(exc).split()) or type(exc).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
