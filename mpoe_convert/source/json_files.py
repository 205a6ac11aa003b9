"""Read and write JSON files, and files that other processes may read meanwhile."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from ..errors import CheckpointError


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON in UTF-8. Raises OSError."""
    path.write_text(json_text(value), encoding="utf-8")


def json_text(value: object) -> str:
    """A value as `write_json` writes it."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that no other process sees before it is whole. Raises OSError; then nothing is left."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        unfinished = Path(scratch, path.name)
        unfinished.write_bytes(content)
        os.replace(unfinished, path)


def read_json_object(
    path: Path, expected: str = "an object", remedy: str = "repair it or fetch it again"
) -> dict:
    """The JSON object that a file holds.

    Args:
        path: the file.
        expected: what it should hold, for the message.
        remedy: the end of the message.

    Raises:
        CheckpointError: it holds something else.
        OSError: it cannot be read.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"'{path}' is not JSON ({exc}): {remedy}") from exc
    if not isinstance(value, dict):
        raise CheckpointError(f"'{path}' holds a JSON {type(value).__name__}, expected {expected}: {remedy}")
    return value
