"""The columns of data files by their first lines or footer, without the libraries that read them whole."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

# What `datasets` makes of a file of text.
_TEXT_COLUMNS = ["text"]


def column_names(path: Path, wanted: Collection[str]) -> list[str] | None:
    """The names of a file's columns; None if they cannot be told without reading it whole.

    Args:
        path: a file of a kind that `texts.BUILDERS` knows.
        wanted: rows of JSON, which may differ in their columns, are read until all of these are found.
    """
    try:
        return _READERS[path.suffix.lower()](path, wanted)
    except (OSError, ValueError, csv.Error, ImportError):  # who reads the whole file says what is wrong
        return None


def _of_text(path: Path, wanted: Collection[str]) -> list[str]:
    return _TEXT_COLUMNS


def _of_csv(path: Path, wanted: Collection[str]) -> list[str] | None:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as file:
        return next(filter(None, csv.reader(file, delimiter=delimiter)), None)


def _of_json(path: Path, wanted: Collection[str]) -> list[str] | None:
    names: dict[str, None] = {}
    for row in _rows(path):
        if not isinstance(row, dict):
            return None
        names |= dict.fromkeys(row)
        if names.keys() >= {*wanted}:
            break
    return list(names) or None


def _rows(path: Path) -> Iterator[Any]:
    """The objects of a file with one per line, or the items of one JSON list."""
    with path.open("rb") as file:
        lines = filter(None, map(bytes.strip, file))
        first = next(lines, b"")
        if _is_object(first):
            yield json.loads(first)
            yield from map(json.loads, lines)
        else:
            file.seek(0)
            document = json.load(file)
            yield from document if isinstance(document, list) else ()


def _is_object(line: bytes) -> bool:
    """Whether a line is a whole JSON object."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _of_parquet(path: Path, wanted: Collection[str]) -> list[str]:
    from pyarrow.parquet import read_schema

    return read_schema(path).names


_READERS: dict[str, Callable[[Path, Collection[str]], list[str] | None]] = {
    ".txt": _of_text,
    ".csv": _of_csv,
    ".tsv": _of_csv,
    ".json": _of_json,
    ".jsonl": _of_json,
    ".parquet": _of_parquet,
}
