"""Texts for calibration, training and evaluation: local files and Hub datasets, made into token examples."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import ColumnError, DataError, HubError, counted, did_you_mean, few, one_line
from ..options import called
from .file_columns import column_names
from .hub import asked_once, check_dataset_available
from .paths import exists, is_dir, is_file, is_path, suggest_path

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


TASKS = ("causal", "masked", "seq2seq", "classification")
# Calibration text that every Python has: its language reference.
BUILTIN = "builtin"
TEXT = ("string", "large_string", "string_view")
# By file extension: the builder of `datasets` and its options. "null" and "NA" are text, not missing values.
BUILDERS = {
    ".txt": ("text", {"sample_by": "document"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".parquet": ("parquet", {}),
}


@dataclass(frozen=True)
class Columns:
    """Names of the columns that hold what a task needs."""

    text: str = "text"
    target: str = "target"
    label: str = "label"
    routed_by: str | None = None  # names the task by which routers choose

    def as_options(self) -> dict[str, str | None]:
        """Under the names that the options of a request have."""
        names = {"text_column": self.text, "target_column": self.target, "label_column": self.label}
        return names | {"routed_by": self.routed_by}

    def needed(self, task: str) -> tuple[str, ...]:
        """The columns that a task (one of `TASKS`) reads, without repetitions."""
        more = {"seq2seq": (self.target,), "classification": (self.label,)}.get(task, ())
        names = (self.text, *more, *([self.routed_by] if self.routed_by else ()))
        return tuple(dict.fromkeys(names))


def read(
    sources: Sequence[str],
    columns: Columns,
    task: str,
    split: str = "train",
    token: str | None = None,
    *,
    targets_needed: bool = True,
) -> Dataset:
    """The rows of files and Hub datasets, one after the other, with the columns that the task needs.

    Args:
        sources: paths of `.txt` (each file is one text), `.jsonl`/`.json`, `.csv`, `.tsv` and `.parquet`
            files, or Hub ids, as `owner/name` or `owner/name:subset`.
        split: of Hub datasets.
        token: for Hub datasets that are private or gated; by default the stored login.
        targets_needed: False reads texts alone where no source has a text column named "target" (the
            default of `columns.target`).

    Raises:
        ColumnError: a source lacks a column.
        DataError: a source is missing or cannot be read, or a column holds something else.
    """
    from datasets import concatenate_datasets

    if not sources:
        raise DataError("no data given; expected files (.txt, .jsonl, .csv, .tsv, .parquet) or a Hub dataset")
    parts = [_read_one(source, split, token) for source in sources]
    needed = columns.needed(task)
    default = columns.target == Columns.target
    if not targets_needed and default and not any(_holds_text(part, columns.target) for part in parts):
        needed = columns.needed("causal")
    who = f"task {task}" if targets_needed else "calibration"
    for source, part in zip(sources, parts, strict=True):
        _refuse_lacking(source, part.column_names, needed, who)
        for name in needed:
            _check_column(part, source, name, columns)
        if task == "classification":
            _check_classes(part, source, columns.label)
    return concatenate_datasets([part.select_columns(list(needed)) for part in parts])


def _refuse_lacking(source: str, found: Sequence[str], needed: Sequence[str], who: str) -> None:
    """Raises ColumnError if a source has not all columns that are needed."""
    if lacks := [name for name in needed if name not in found]:
        raise ColumnError(
            f"'{source}' has {_few(found, 'column')}; {who} needs {', '.join(lacks)} "
            f"(name the columns by {called('text_column')}, {called('target_column')}, "
            f"{called('label_column')}, {called('routed_by')}){did_you_mean(lacks[0], found)}"
        )


def _check_column(part: Dataset, source: str, name: str, columns: Columns) -> None:
    """Raises DataError unless every row has what belongs into a column."""
    if name in (columns.text, columns.target) and not _holds_text(part, name):
        where = f" ({fault})" if (fault := first_fault(source, [name])) else ""
        raise DataError(f"column {name} of '{source}' holds {_kind(part, name)}{where}; expected text")
    if missing := part.data.column(name).null_count:
        rows = counted(missing, "row")
        where = first_fault(source, [name]) or _first_without(part, name)
        raise DataError(f"'{source}' has {rows} without {name} ({where}); expected one in every row")
    _check_encoding(part, source, name)
    if name in (columns.label, columns.routed_by):
        _check_names(part, source, name)


def _kind(part: Dataset, name: str) -> str:
    """What a column holds, by the name of its type."""
    feature = part.features[name]
    return getattr(feature, "dtype", type(feature).__name__)


def _first_without(part: Dataset, name: str) -> str:
    """The row of the first null in a column, which has one."""
    return f"row {part.data.column(name).is_null().index(True).as_py() + 1}"


def _check_encoding(part: Dataset, source: str, name: str) -> None:
    """Raises DataError if a column of text is not in UTF-8; pyarrow looks only when it is asked."""
    from pyarrow import ArrowInvalid

    try:
        part.data.column(name).validate(full=True)
    except ArrowInvalid as error:
        where = first_fault(source) or one_line(error)
        raise DataError(f"'{source}' cannot be read: {where}") from None


def first_fault(source: str, columns: Sequence[str] = ()) -> str | None:
    """Where a local file of one JSON object per line goes wrong first, as "line 3 is not JSON (...)".

    Args:
        source: a file; of another kind, there is nothing to say.
        columns: that every line has to have, with text in them.
    """
    path = Path(source)
    if path.suffix.lower() not in (".jsonl", ".json") or not is_file(path):
        return None
    content = path.read_bytes()
    if not content.strip():
        return "it is empty"
    if path.suffix.lower() == ".json" and _is_document(content):
        return None
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip() and (fault := _fault(line, columns)):
            return f"line {number} {fault}"
    return None


def _is_document(content: bytes) -> bool:
    """Whether it is one JSON value as a whole, not one per line."""
    try:
        json.loads(content)
    except ValueError:
        return False
    return True


def _fault(line: bytes, columns: Sequence[str]) -> str | None:
    """What is wrong with a line that should be a JSON object with text in these columns."""
    try:
        value = json.loads(line)
    except UnicodeDecodeError as error:
        return f"is not in UTF-8 (byte {error.start + 1})"
    except json.JSONDecodeError as error:
        return f"is not JSON ({error.msg}, character {error.colno})"
    if not isinstance(value, dict):
        return f'holds a {type(value).__name__}, expected an object such as {{"text": ...}}'
    for name in columns:
        if value.get(name) is None:
            return f"has no {name}"
        if not isinstance(value[name], str):
            return f"holds {one_line(json.dumps(value[name]), 40)} as {name}"
    return None


def _few(names: Sequence[str], noun: str) -> str:
    """How many names there are, and the first of them."""
    return f"{counted(len(names), noun)} ({few(names, 8)})"


def _holds_text(part: Dataset, name: str) -> bool:
    return getattr(part.features.get(name), "dtype", None) in TEXT


def _check_names(part: Dataset, source: str, name: str) -> None:
    """Raises DataError if a column that names classes or tasks holds something else."""
    kind = _kind(part, name)
    if kind not in (*TEXT, "bool") and not kind.startswith(("int", "uint")):
        raise DataError(
            f"column {name} of '{source}' holds {kind}; expected one name in every row: text, a whole "
            "number, or true and false"
        )
    if "" in part.unique(name):
        raise DataError(f"'{source}' has rows with an empty {name}; expected one in every row")


def _check_classes(part: Dataset, source: str, name: str) -> None:
    """Raises DataError if classes are numbered from below 0. Splits of the Hub without labels hold -1."""
    if negative := [value for value in part.unique(name) if not isinstance(value, str) and value < 0]:
        raise DataError(
            f"'{source}' has rows whose {name} is {negative[0]}, which stands for an unknown class in splits "
            "without labels; expected classes from 0: name another split, or leave these rows out"
        )


def check_sources(sources: Sequence[str], needed: Sequence[str] = (), who: str = "") -> None:
    """Check that every source is a file with these columns, or a Hub dataset that could be looked up.

    Args:
        sources: as of `read`.
        needed: names of columns.
        who: needs them, for the message.

    Raises:
        ColumnError: a file lacks a column.
        DataError: a source is no file, or of no known kind.
    """
    for source in sources:
        if source == BUILTIN or _builder(source):
            continue
        try:
            check_dataset_available(source.partition(":")[0])
        except HubError as error:
            raise _unavailable(source, error) from error
    check_columns(sources, needed, who)


def check_columns(sources: Sequence[str], needed: Sequence[str], who: str) -> None:
    """Check the columns of those sources that are files, as far as a part of each tells them.

    Args: as of `check_sources`.

    Raises:
        ColumnError: a file lacks a column.
    """
    for source in sources:
        path = Path(source)
        if is_file(path) and (found := column_names(path, needed)) is not None:
            _refuse_lacking(source, found, needed, who)


def _unavailable(source: str, error: HubError) -> DataError:
    return DataError(f"'{source}' is no file here; {error}{suggest_path(source)}")


def _builder(source: str) -> tuple[str, dict[str, Any]] | None:
    """The builder of `datasets` for a file, and its options; None for a Hub dataset. Raises DataError."""
    path = Path(source)
    known = BUILDERS.get(path.suffix.lower())
    if is_file(path) and known:
        return known
    kinds = f"one of {', '.join(BUILDERS)}"
    if is_file(path):
        raise DataError(f"'{source}' is of an unknown kind; expected {kinds}")
    if is_dir(path):
        raise DataError(f"'{source}' is a folder; expected a file, {kinds}, or a Hub dataset")
    if exists(path) or known or is_path(source.partition(":")[0]):
        raise DataError(f"'{source}' is no file; expected {kinds}, or a Hub dataset{suggest_path(source)}")
    return None


def _read_one(source: str, split: str, token: str | None) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    builder = _builder(source)
    try:
        if builder:
            name, options = builder
            return load_dataset(name, data_files=[source], split="train", **options)
        name, _, subset = source.partition(":")
        with asked_once(name):
            return load_dataset(name, subset or None, split=split, token=token)
    except HubError as error:
        raise _unavailable(source, error) from error
    except DatasetNotFoundError as error:
        raise DataError(
            f"'{source}' is neither a file nor a dataset that can be reached: {error}{suggest_path(source)}"
        ) from None
    except (DatasetGenerationError, ConnectionError, ValueError, OSError, StopIteration) as error:
        cause = first_fault(source) or one_line(error.__cause__ or error)
        raise DataError(f"'{source}' cannot be read: {cause}") from error


# ---------------------------------------------------------------------------------------------------
# Into examples


@dataclass(frozen=True)
class Tasks:
    """The tasks by which routers choose, and the column that names the task of each row."""

    column: str
    names: tuple[str, ...]

    def indices(self, values: Sequence) -> list[int]:
        """The index in `names` of each value. Raises DataError for a name that is not known."""
        if strange := sorted({str(value) for value in values} - set(self.names)):
            raise DataError(
                f"column {self.column} names {few(strange)}; the routers know {_few(self.names, 'task')}"
                f"{did_you_mean(strange[0], self.names)}"
            )
        return [self.names.index(str(value)) for value in values]

    def add_to(self, encoded: Mapping, batch: Mapping) -> dict:
        """Encoded rows with the indices of their tasks as `task_ids`."""
        return {**encoded, "task_ids": self.indices(batch[self.column])}


def task_names(rows: Dataset, column: str) -> list[str]:
    """The distinct values of a column, sorted: the names of tasks."""
    return sorted({str(name) for name in rows[column]})


def language_blocks(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    column: str,
    length: int,
    tasks: Tasks | None = None,
) -> Dataset:
    """Concatenate texts and split them into blocks of `length` tokens, as `input_ids`.

    Every text ends once: with the tokens that the tokenizer itself puts behind a text, else with its
    end-of-text token, if it has one. The remainder of every batch of 1,000 texts is dropped. With tasks, a
    block holds texts of one task, named by `task_ids`.

    Raises:
        DataError: the texts, or those of one task, are shorter than a block, or a task is unknown.
    """
    named = tasks.indices(rows[tasks.column]) if tasks else []
    if tasks:  # sorted by task: otherwise every task would drop a remainder in every batch
        rows = rows.select(sorted(range(len(named)), key=named.__getitem__))
    end = _end(tokenizer)

    def blocks(batch: dict) -> dict:
        streams: dict[int, list[int]] = {}
        numbers = tasks.indices(batch[tasks.column]) if tasks else [0] * len(batch[column])
        for number, text in zip(numbers, batch[column], strict=True):
            ids = tokenizer(text, verbose=False)["input_ids"]
            streams.setdefault(number, []).extend(_without_end(ids, end) + end)
        pieces = [
            (stream[i : i + length], number)
            for number, stream in streams.items()
            for i in range(0, len(stream) // length * length, length)
        ]
        found = {"input_ids": [ids for ids, _ in pieces]}
        return found | {"task_ids": [number for _, number in pieces]} if tasks else found

    found = rows.map(blocks, batched=True, remove_columns=rows.column_names)
    if not len(found):
        raise DataError(
            f"the texts give no whole block of {length} tokens; expected more text or a smaller length"
        )
    if tasks and (short := sorted(set(named) - set(found["task_ids"]))):
        raise DataError(
            f"the texts of {[tasks.names[number] for number in short]} give no whole block of {length} "
            "tokens; expected more text or a smaller length"
        )
    return found


def pairs(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    columns: Columns,
    length: int,
    tasks: Tasks | None = None,
) -> Dataset:
    """Source and target texts as `input_ids` and `labels`, each truncated to `length` tokens.

    A target ends as a text of `language_blocks` does, also where it is truncated.

    Raises:
        DataError: a task is unknown.
    """
    limits: dict[str, Any] = {"truncation": True, "max_length": length}
    end = _end(tokenizer, of_target=True)

    def encode(batch: dict) -> Mapping:
        sources = tokenizer(batch[columns.text], **limits)["input_ids"]
        targets = tokenizer(text_target=batch[columns.target], **limits)["input_ids"]
        labels = [_without_end(ids, end)[: max(length - len(end), 0)] + end for ids in targets]
        found = {"input_ids": sources, "labels": labels}
        return tasks.add_to(found, batch) if tasks else found

    return rows.map(encode, batched=True, remove_columns=rows.column_names)


def answers(rows: Dataset, tokenizer: PreTrainedTokenizerBase, columns: Columns, length: int) -> Dataset:
    """Texts followed by their targets, truncated to `length` tokens; only the target's tokens have labels.

    The end of the target, as of a text of `language_blocks`, belongs to it; so does a token that spans the
    end of the text and the beginning of the target. Rows whose text alone fills `length` are dropped.

    Raises:
        DataError: no row is left.
    """
    end = _end(tokenizer)

    def encode(batch: dict) -> dict:
        found: dict[str, list] = {"input_ids": [], "labels": []}
        for text, target in zip(batch[columns.text], batch[columns.target], strict=True):
            given = _without_end(tokenizer(text, verbose=False)["input_ids"], end)
            ids = _without_end(tokenizer(text + target, verbose=False)["input_ids"], end) + end
            shared = len(os.path.commonprefix([given, ids]))
            if shared < min(len(ids), length):
                found["input_ids"].append(ids[:length])
                found["labels"].append(([-100] * shared + ids[shared:])[:length])
        return found

    found = rows.map(encode, batched=True, remove_columns=rows.column_names)
    if not len(found):
        raise DataError(f"every text alone fills {length} tokens; expected room for a target behind it")
    return found


def _end(tokenizer: PreTrainedTokenizerBase, *, of_target: bool = False) -> list[int]:
    """The tokens behind every text: those that the tokenizer itself puts there, else its end-of-text token.

    Args:
        tokenizer: the tokenizer.
        of_target: behind the target of an encoder-decoder, where some tokenizers put other ones.

    Returns:
        [] if the tokenizer puts none there and has no end-of-text token.
    """
    given: dict[str, Any] = {"text_target" if of_target else "text": "a", "verbose": False}
    whole = tokenizer(**given)["input_ids"]
    bare = tokenizer(**given, add_special_tokens=False)["input_ids"]
    places = range(len(whole) - len(bare) + 1)
    # A tokenizer without a token for "a" does not tell where the text is.
    start = next((place for place in places if bare and whole[place : place + len(bare)] == bare), None)
    own = [] if start is None else whole[start + len(bare) :]
    end = tokenizer.eos_token_id
    return own or ([] if end is None else [cast(int, end)])


def _without_end(ids: list[int], end: list[int]) -> list[int]:
    """The ids of a text without the end that its tokenizer puts there, and one that the text itself holds."""
    for _ in range(2):
        if end and ids[-len(end) :] == end:
            ids = ids[: -len(end)]
    return ids


def label_names(rows: Dataset, column: str) -> list[str]:
    """The names of the classes, in the order of their indices."""
    feature = rows.features[column]
    if hasattr(feature, "names"):
        return list(feature.names)
    return [str(name) for name in sorted(set(rows[column]))]


def labelled(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    columns: Columns,
    length: int,
    names: Sequence[str],
    tasks: Tasks | None = None,
) -> Dataset:
    """Texts truncated to `length` tokens, with the index of their class as `labels`.

    Raises:
        DataError: a class is not among `names`, or a task is unknown.
    """
    number = {name: i for i, name in enumerate(names)}
    feature = rows.features[columns.label]

    def encode(batch: dict) -> dict:
        found = [feature.int2str(v) if hasattr(feature, "names") else str(v) for v in batch[columns.label]]
        if strange := sorted(set(found) - set(number)):
            raise DataError(f"the labels {few(strange)} are not among the model's {_few(names, 'class')}")
        texts = tokenizer(batch[columns.text], truncation=True, max_length=length)
        encoded = {**texts, "labels": [number[name] for name in found]}
        return tasks.add_to(encoded, batch) if tasks else encoded

    return rows.map(encode, batched=True, remove_columns=rows.column_names)
