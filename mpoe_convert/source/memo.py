"""What was learnt of a stock model, kept on disk: building the model again would import transformers for it.

The imports take seconds, and plans and conversions of one model ask the same again. Only what depends on
nothing but files of a checkpoint and on what is installed is kept. Whoever has transformers imported already
asks it, and neither reads nor writes here.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .json_files import json_text, write_whole

PACKAGE = Path(__file__).parents[1]
# What answers depend on: models, and the libraries that tokenizers are read with.
PACKAGES = (
    *("torch", "transformers", "tokenizers", "sentencepiece", "tiktoken", "mistral-common", "protobuf"),
)
# Larger answers are not kept.
MOST_CHARACTERS = 1_000_000


def remembered(what: str, of: object, learn: Callable[[], Any]) -> Any:
    """What `learn` returns, from the disk if it was learnt before with the same packages.

    Args:
        what: name of the question.
        of: everything that the answer depends on, beside what is installed; plain values.
        learn: finds the answer, a value that JSON has. What it raises is not kept.
    """
    if not _is_used():
        return learn()
    asked = json.dumps([what, of, _installed()], default=str)
    path = folder() / f"{hashlib.sha256(asked.encode()).hexdigest()[:32]}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["answer"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not learnt yet, or the file is damaged
    answer = learn()
    if len(json.dumps(answer)) <= MOST_CHARACTERS:
        _keep(path, {"question": what, "answer": answer})
    return answer


def folder() -> Path:
    """Where answers are kept: in the assets cache of the Hub's libraries."""
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE, "mpoe-convert", "stock-models")


@functools.cache
def _is_used() -> bool:
    return "transformers" not in sys.modules


@functools.cache
def _installed() -> list:
    """What an answer depends on beside the question: the packages, and when this one's files were changed."""
    changed = max(path.stat().st_mtime_ns for path in PACKAGE.rglob("*.py"))
    found = find_spec("transformers")
    return [found and found.origin, changed, *map(_version, PACKAGES)]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _keep(path: Path, value: object) -> None:
    """Write an answer; without a place to write, it is learnt anew each time."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json_text(value).encode())
