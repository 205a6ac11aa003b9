"""Where the files of a model are: in a local folder, or in a snapshot of a Hub repository.

Both forms answer the same questions, so that opening a checkpoint does not ask which of the two it has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple

from ..errors import CheckpointError, HubError, RequestError
from ..options import called
from . import hub
from .hub_errors import damaged, no_id
from .paths import is_dir, is_file, is_path, is_written_like_a_path, local, suggest_path
from .ranges import RemoteWeights
from .safetensors_file import TensorInfo, tensor_info


class RemoteHeaders(NamedTuple):
    """What is known of the tensors of a repository whose weights stay there, and what reads them."""

    tensors: dict[str, TensorInfo]
    weights: RemoteWeights


@dataclass(frozen=True)
class Folder:
    """A local folder, which has all its files already.

    Attributes:
        source: what the user typed.
        folder: where the files are.
        revision: None, since a folder has no commits.
    """

    source: str
    folder: Path
    revision: ClassVar[None] = None

    def names(self) -> list[str]:
        """Names of the files and folders in it."""
        return [path.name for path in self.folder.iterdir()]

    def fetch_code(self) -> None:
        """Nothing to fetch."""

    def fetch_weights(self, choices: Sequence[str]) -> None:
        """Nothing to fetch."""

    def fetch_modules(self) -> None:
        """Nothing to fetch."""

    def remote_headers(self, choices: Sequence[str]) -> RemoteHeaders | None:
        """None: headers are read from the local files."""
        return None


@dataclass(frozen=True)
class HubSnapshot:
    """A commit of a Hub repository, of which small files are in the cache and others can be fetched.

    The methods raise HubError where the Hub refuses or cannot be reached.

    Attributes:
        source: the Hub id.
        folder: the snapshot's folder in the cache.
        revision: the commit.
        token: Hub token.
    """

    source: str
    folder: Path
    revision: str
    token: str | None = field(default=None, repr=False)

    def names(self) -> list[str]:
        """Paths of all files of the repository, or of those in the cache where there is no listing."""
        return hub.listing(self.source, self.revision) or [path.name for path in self.folder.iterdir()]

    def fetch_code(self) -> None:
        """Download the repository's Python files, if it has any, into the folder."""
        if any(name.endswith(".py") for name in self.names()):
            hub.download_code(self.source, self.revision, self.token)

    def fetch_weights(self, choices: Sequence[str]) -> None:
        """Download the weights into the folder: the first of the files, or indexes, that is there."""
        hub.download(self.source, revision=self.revision, token=self.token, weights=choices)

    def fetch_modules(self) -> None:
        """Download the modules of a sentence encoder with their weights, which are copied as they are."""
        hub.download_modules(self.source, self.folder, self.revision, self.token, weights=True)

    def remote_headers(self, choices: Sequence[str]) -> RemoteHeaders | None:
        """The header of every tensor, read from the Hub without downloading weights.

        Args:
            choices: as for `fetch_weights`.

        None where the weights are in the cache already, or are `.bin` files, which have no remote headers.
        """
        if hub.weights_cached(self.folder, self.names(), choices):
            return None
        files = None
        if choices != hub.WEIGHT_FILES:
            [choice] = choices
            files = hub.shard_names(self.folder / choice) if choice.endswith(hub.INDEX) else [choice]
        headers = hub.remote_headers(self.source, self.revision, self.token, files)
        if headers is None:
            return None
        tensors = {
            name: tensor_info(self.source, name, header.code, header.shape, header.file)
            for name, header in headers.items()
        }
        offsets = {name: header.offsets for name, header in headers.items()}
        for name, (begin, end) in offsets.items():
            if end - begin != tensors[name].num_bytes:
                what = f"tensor {name!r} spans {end - begin} bytes, expected {tensors[name].num_bytes}"
                raise HubError(damaged(f"'{self.source}'", what))
        return RemoteHeaders(tensors, RemoteWeights(self.source, self.revision, offsets, self.token))


Repository = Folder | HubSnapshot


def find_repository(model: str, revision: str | None = None, token: str | None = None) -> Repository:
    """The folder of that name, or a snapshot of the Hub repository with its small files downloaded.

    Args:
        model: a folder if one of that name exists or if it is written like a path; otherwise a Hub id.
        revision: branch, tag or commit of a Hub id.
        token: Hub token.

    Raises:
        CheckpointError: there is no such folder.
        HubError: the Hub refuses or cannot be reached.
        RequestError: a revision is given with a folder.
    """
    folder = local_folder(model)
    if folder is None:
        with suggesting(model):
            folder, commit = hub.download(model, revision=revision, token=token, weights=())
        return HubSnapshot(model, folder, commit, token)
    if revision is not None:
        raise RequestError(
            f"{called('revision')} {revision!r} was given, but {model!r} is a local folder: "
            f"drop {called('revision')}, or pass a Hub id"
        )
    return Folder(model, folder)


def check_model(model: str, revision: str | None = None) -> None:
    """Check that there is a folder of that name, or that a Hub id could be looked up.

    Raises:
        CheckpointError: as `local_folder`.
        HubError: the Hub cannot be reached, and the model is not in the cache.
    """
    if local_folder(model) is None:
        with suggesting(model):
            hub.check_available(model, revision)


@contextmanager
def suggesting(model: str) -> Iterator[None]:
    """Add to a HubError inside the block the name here that may have been meant."""
    try:
        yield
    except HubError as error:
        raise HubError(f"{error}{suggest_path(model)}") from error


def local_folder(model: str) -> Path | None:
    """The folder of that name; None: it may be a Hub id.

    Raises:
        CheckpointError: there is a file of that name, or the name means a folder that is not there.
        HubError: it is no folder, and cannot be an id.
    """
    path = local(model)
    if is_dir(path) and model.strip():  # Path("") would be the current folder
        return path
    if is_file(path):
        raise CheckpointError(
            f"{model!r} is a file, expected a folder with config.json and weights, or a Hub id: "
            f"pass its folder, '{path.parent}'"
        )
    if is_written_like_a_path(model):
        raise CheckpointError(
            f"there is no folder {model!r}: check the path, or pass a Hub id{suggest_path(model)}"
        )
    if is_path(model):
        raise HubError(f"{no_id(model)}{suggest_path(model)}")
    return None
