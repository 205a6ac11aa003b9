"""Which weights a report is about: the hash of the weight files that lay beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import CheckpointError
from .layout import is_weights

# The key of reports that say which weights they are about.
KEY = "weights_sha256"


def sha256_of(paths: Iterable[Path]) -> str | None:
    """Hash of the contents of files, in this order; of one file as `sha256sum` prints it; None of no file."""
    digests = []
    for path in paths:
        with open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256"))
    if len(digests) < 2:
        return digests[0].hexdigest() if digests else None
    return hashlib.sha256(b"".join(each.digest() for each in digests)).hexdigest()


def weights_of(folder: Path) -> dict[str, str | None]:
    """{`KEY`: hash of a folder's weight files}, an entry for a report on them."""
    return {KEY: sha256_of(sorted(path for path in folder.iterdir() if is_weights(path.name)))}


def is_about(report: Mapping, weights: Mapping) -> bool:
    """Whether a report is about these weights (`weights_of`); reports of earlier releases do not say."""
    return report.get(KEY) in (None, weights[KEY])


def check_is_about(path: Path, report: Mapping) -> None:
    """Raises CheckpointError if a report is about other weights than those in its folder."""
    if not is_about(report, weights_of(path.parent)):
        raise CheckpointError(
            f"'{path}' is about other weights than those in its folder: write both with finetune, or delete "
            "the report"
        )
