"""The Hugging Face Hub: download a checkpoint, or only its headers.

`huggingface_hub` is imported inside the functions: the command's `--help` must not wait for it. The
cache, the endpoint, the stored token and offline mode are whatever `huggingface_hub` makes of its
environment variables.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from typing import NamedTuple

from ..errors import HubError, one_line
from .hub_errors import damaged, explain, is_connection, is_offline
from .paths import is_dir
from .sentence_encoder import ENCODER_PATTERNS, module_files

# Companions: files that travel with the weights unchanged. The Hub matches case-sensitively, hence the
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
    *ENCODER_PATTERNS,
)
# Named chat templates, in the folder where transformers looks for them.
CHAT_TEMPLATES = "additional_chat_templates/*.jinja"
GENERATE_FILE = "custom_generate/generate.py"  # where transformers looks for custom generation
# Neither downloaded by `download` nor copied: code, pickles and the weights of other frameworks. For trusted
# custom code see `download_code` and `custom_code.files`.
NEVER_PATTERNS = (
    *("*.py", "*.pyc", "*.pkl", "*.pickle", "*.pt", "*.pth", "*.ckpt", "*.npz", "*.npy"),
    *("*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.gguf", "*.ggml", "*.tflite", "*.ot", "*.mlmodel"),
)
SINGLE = {".safetensors": "model.safetensors", ".bin": "pytorch_model.bin"}
INDEX = ".index.json"
# Files that hold the weights, or say which shards do, by transformers' order of preference.
WEIGHT_FILES = tuple(name for single in SINGLE.values() for name in (single, single + INDEX))


def download(
    model_id: str, *, revision: str | None, token: str | None, weights: Sequence[str] = WEIGHT_FILES
) -> tuple[Path, str]:
    """Download a repository's top-level files into the usual cache; return (folder, commit).

    Only what a conversion needs: JSON files, tokenizer files, chat templates (named ones are in a
    subfolder), licences, the modules of a sentence encoder in their folders, and one set of weights: the
    first that is there of `weights`, files or indexes of shards. Never code, other frameworks' weights, or
    weight variants. `weights=()` stops before the weights, so that a repository that is going to be refused
    is refused after a few kilobytes.

    Raises:
        HubError: the Hub or the connection fails; the message is one line.
        CheckpointError: the list of a sentence encoder's modules is damaged.
    """
    small = ["*.json", "README.md", *COMPANION_PATTERNS]  # the card names the licence
    ignore = [*NEVER_PATTERNS, "*/*", "*.bin", "*.safetensors"]
    folder, commit = _snapshot(model_id, revision, token, small, ignore)
    if any(fnmatchcase(name, CHAT_TEMPLATES) for name in listing(model_id, commit)):
        _snapshot(model_id, commit, token, [CHAT_TEMPLATES], [*NEVER_PATTERNS, "*/*/*"])
    download_modules(model_id, folder, commit, token, weights=bool(weights))
    if weights:
        _fetch_weights(model_id, folder, commit, token, weights)
    return folder, commit


def download_modules(model_id: str, folder: Path, commit: str, token: str | None, *, weights: bool) -> None:
    """Download the modules of a sentence encoder, if it is one, into its snapshot's folder.

    Args:
        weights: their weights as well.

    Raises:
        HubError: the Hub or the connection fails.
        CheckpointError: the list of modules is damaged.
    """
    if modules := module_files(folder, listing(model_id, commit), weights=weights):
        _snapshot(model_id, commit, token, [escape(name) for name in modules], None)


def download_except_weights(model_id: str, token: str | None = None) -> Path:
    """Download all files of an artifact except its weights: reports, recipe, card, code, companions.

    Companions in subfolders are among them: chat templates, and the modules of a sentence encoder.

    Returns:
        Their folder in the usual cache.

    Raises:
        HubError: the Hub refuses or cannot be reached.
    """
    patterns = ["*.json", "*.yaml", "*.md", "*.py", *COMPANION_PATTERNS]
    folder, commit = _snapshot(model_id, None, token, patterns, ["*/*", "*.safetensors.index.json"])
    names = listing(model_id, commit)
    kept = (CHAT_TEMPLATES, GENERATE_FILE)
    below = [name for name in names if any(fnmatchcase(name, each) for each in kept)]
    below += module_files(folder, names)
    if below:
        _snapshot(model_id, commit, token, [escape(name) for name in below], None)
    return folder


def download_code(model_id: str, revision: str | None = None, token: str | None = None) -> Path:
    """Download the Python files of a repository; return their folder. Raises HubError.

    No other function here downloads code.
    """
    return _snapshot(model_id, revision, token, ["*.py"], ["*/*"])[0]


@contextmanager
def asked_once(name: str) -> Iterator[None]:
    """Inside the block other libraries load something that may be on the Hub.

    They ask for every file again and again, for minutes, if there is no connection. So it is tried once
    before, and without one they go by the cache alone.

    Args:
        name: of what they load, a Hub id; for a folder nothing is asked.

    Raises:
        HubError: there is no connection, or offline mode is on, and the cache lacks what the block needs.
    """
    reason = None if is_dir(name) else _why_not_asked()
    with _by_the_cache(reason is not None):
        try:
            yield
        except Exception as exc:
            if reason is not None and (isinstance(exc, ConnectionError) or is_offline(exc)):
                raise explain(reason, name) from exc
            raise


def check_available(model_id: str, revision: str | None = None) -> None:
    """Check that a model is in the cache, or that there is a Hub to ask for it.

    Raises:
        HubError: neither.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model_id, "config.json", revision=revision)
    except HFValidationError as error:
        raise explain(error, model_id) from error
    if not isinstance(cached, str) and (reason := _why_not_asked()):
        raise explain(reason, model_id, revision)


def check_dataset_available(dataset_id: str) -> None:
    """Check that a cache knows a dataset, or that there is a Hub to ask for it. Raises HubError: neither."""
    from huggingface_hub import constants

    prepared = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME, "datasets"))
    downloaded = Path(constants.HF_HUB_CACHE, f"datasets--{dataset_id.replace('/', '--')}")
    known = [path.name for path in prepared.iterdir()] if prepared.is_dir() else []
    # `datasets` writes owner___some_name for owner/SomeName.
    is_prepared = any(_plain(name) == _plain(dataset_id) for name in known)
    if not (is_prepared or downloaded.is_dir()) and (reason := _why_not_asked()):
        raise explain(reason, dataset_id)


def _plain(name: str) -> str:
    return name.replace("_", "").replace("/", "").lower()


def _why_not_asked() -> Exception | None:
    """Why nobody can be asked for what a cache lacks: the connection, or offline mode; None: the Hub can."""
    from huggingface_hub import is_offline_mode
    from huggingface_hub.errors import OfflineModeIsEnabled

    return OfflineModeIsEnabled() if is_offline_mode() else unreachable()


def variables_for(model: str) -> dict[str, str]:
    """Environment variables for a process that loads a model: offline mode, if the Hub cannot be reached."""
    return {} if is_dir(model) or unreachable() is None else {"HF_HUB_OFFLINE": "1"}


# Hubs that have answered this process: they are not asked again whether they do.
_REACHED: set[str] = set()


def unreachable() -> Exception | None:
    """Why the Hub cannot be reached now; None: it can, or offline mode is on and nobody will ask it."""
    from huggingface_hub import constants, get_session, is_offline_mode

    if is_offline_mode() or constants.ENDPOINT in _REACHED:
        return None
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        _REACHED.add(constants.ENDPOINT)
    except Exception as exc:  # of another kind: the request that follows meets it, and tells it
        slow = type(exc).__name__.startswith(("Read", "Write"))
        return exc if is_connection(exc) and not slow else None
    return None


@contextmanager
def _by_the_cache(offline: bool) -> Iterator[None]:
    """Offline mode inside the block, for huggingface_hub and what is made on it."""
    from huggingface_hub import constants

    homes = [constants, *filter(None, [sys.modules.get("datasets.config")])] if offline else []
    before = [(home, home.HF_HUB_OFFLINE) for home in homes]
    try:
        for home, _ in before:
            setattr(home, "HF_HUB_OFFLINE", True)  # noqa: B010  (of a module, for type checkers)
        yield
    finally:
        for home, value in before:
            setattr(home, "HF_HUB_OFFLINE", value)  # noqa: B010  (as above)


def _fetch_weights(
    model_id: str, folder: Path, commit: str, token: str | None, choices: Sequence[str]
) -> None:
    from huggingface_hub import is_offline_mode
    from huggingface_hub.errors import OfflineModeIsEnabled

    # The commit is known now: the listing is cached, so each further snapshot costs no request of
    # its own, and the branch cannot move between the files.
    names = listing(model_id, commit)
    for choice in choices:
        is_index = choice.endswith(INDEX)
        # A snapshot that matches nothing would warn on stderr; indexes are among the small files.
        if choice in names or not (names or is_index):
            _snapshot(model_id, commit, token, [escape(choice)], None)
        if not is_index:
            if (folder / choice).is_file():
                return
        elif shards := shard_names(folder / choice):
            _snapshot(model_id, commit, token, [escape(name) for name in shards], NEVER_PATTERNS)
            return
    if not names and is_offline_mode():  # a cache without a listing: nobody knows what else there is
        raise explain(OfflineModeIsEnabled(), model_id)


def weights_cached(folder: Path, names: list[str], choices: Sequence[str]) -> bool:
    """Whether `folder` already holds, whole, the weights that `download` would choose."""
    for choice in choices:
        if not choice.endswith(INDEX):
            if choice in names:
                return (folder / choice).is_file()
        elif shards := shard_names(folder / choice):
            return all((folder / name).is_file() for name in shards)
    return False


def shard_names(index: Path) -> list[str]:
    """The files an index names; [] if it is absent or damaged (opening the checkpoint reports that)."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({name for name in names if isinstance(name, str)})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def _snapshot(
    model_id: str, revision: str | None, token: str | None, allow: Iterable[str], ignore: Iterable[str] | None
) -> tuple[Path, str]:
    """(folder, commit) of a snapshot with the files that match. Raises HubError."""
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
    except Exception:  # used for messages only: an older cache without a listing is no error
        return []


class RemoteHeader(NamedTuple):
    """A tensor of a safetensors file on the Hub.

    Attributes:
        code: its dtype in safetensors' spelling: "BF16".
        shape: of the tensor.
        file: path in the repository.
        offsets: (begin, end) in the file's data.
    """

    code: str
    shape: tuple[int, ...]
    file: str
    offsets: tuple[int, int]


def remote_headers(
    model_id: str, revision: str | None, token: str | None, files: Sequence[str] | None = None
) -> dict[str, RemoteHeader] | None:
    """Read the header of every tensor, by name, without downloading weights.

    Makes at most two ranged requests per file.

    Args:
        files: with the weights; None: `model.safetensors`, or what its index names.

    Returns:
        None for a repository without `model.safetensors` or its index. The headers of `.bin` files are inside
        the pickle, so the caller has to download those.

    Raises:
        HubError: the Hub refuses or cannot be reached, or a header is damaged.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError

    api = HfApi(token=token, library_name="mpoe-convert")
    try:
        if files is None:
            found = api.get_safetensors_metadata(model_id, revision=revision).files_metadata
        else:
            found = {
                file: api.parse_safetensors_file_metadata(model_id, file, revision=revision) for file in files
            }
    except NotASafetensorsRepoError:
        return None
    except (KeyError, TypeError, AttributeError) as exc:  # the library trusts the header's entries
        raise HubError(damaged(f"'{model_id}'", f"{type(exc).__name__}: {one_line(exc)}")) from exc
    except Exception as exc:
        raise explain(exc, model_id, revision) from exc
    headers = {}
    for file, header in sorted(found.items()):
        for name, tensor in header.tensors.items():
            if not all(type(count) is int and count >= 0 for count in tensor.shape):
                what = f"'{file}': tensor {name!r} has the shape {tensor.shape}"
                raise HubError(damaged(f"'{model_id}'", what))
            headers[name] = RemoteHeader(tensor.dtype, tuple(tensor.shape), file, tensor.data_offsets)
    return headers
