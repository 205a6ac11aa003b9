"""Checkpoints of a run: written whole or not at all, found again, and compared with the run that goes on."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..artifact.folder import check_kind
from ..artifact.layout import file_names
from ..errors import CheckpointError, OutputError, one_line
from ..options import by_name, called, default_of, switched
from ..source.json_files import read_json_object, write_json
from .request import Finetuning

# Beside a checkpoint's weights: what its run depends on, and the size of every file.
RECORD_FILE = "finetuning.json"
# Where a checkpoint is written, inside the output, and where the result is made; moving either into place
# takes no room.
PARTIAL = ".checkpoint-being-written"
SCRATCH = ".being-written"
# Fields of a request that change nothing about the result.
FREE = {"report_to", "trust_remote_code"}
# What a disk that is full or may not be written answers.
REFUSALS = {
    getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EFBIG", "EIO")
}


@dataclass(frozen=True)
class Record:
    """What the result of a run depends on.

    Attributes:
        request: the fields of `Finetuning`, as JSON has them.
        contents: {field that names files: hash of what was read from them}; their names may change. None:
            nothing was read yet.
        processes: how many processes train together.
    """

    request: Mapping[str, Any]
    contents: Mapping[str, str] | None
    processes: int

    @classmethod
    def of(cls, run: Finetuning, contents: Mapping[str, str] | None, processes: int) -> Record:
        return cls(json.loads(json.dumps(asdict(run), default=str)), contents, processes)

    def differences(self, before: Record) -> list[str]:
        """What differs from an earlier run, with both values: "--seed is 1, was 0" on the command line.

        Other contents under the same names are told if nothing else differs: other options make other
        examples of the same files.
        """
        found, unnamed = [], []
        then = before.contents or {}
        contents = then if self.contents is None else self.contents
        for name, now in self.request.items():
            was = before.request.get(name, _plain(default_of(by_name(Finetuning)[name])))
            is_read = name in contents and name in then
            hashes = (contents[name], then[name]) if is_read else ("", "")
            if name in FREE or (hashes[0] == hashes[1] and (is_read or now == was)):
                continue
            said = [f" (sha256 {digest[:8]})" if is_read else "" for digest in hashes]
            texts = f"{json.dumps(now)}{said[0]}", f"{json.dumps(was)}{said[1]}"
            told = unnamed if now == was else found
            told.append(f"{called(by_name(Finetuning)[name])} is {texts[0]}, was {texts[1]}")
        if self.processes != before.processes:
            found.append(f"the number of processes is {self.processes}, was {before.processes}")
        return found or unnamed


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


# ---------------------------------------------------------------------------------------------------
# In a folder


def find_checkpoint(output: Path) -> Path | None:
    """The newest whole checkpoint in a folder."""
    return next(filter(_is_whole, checkpoint_folders(output)), None)


def checkpoint_folders(output: Path) -> list[Path]:
    """Folders that are named as a run names its checkpoints, the newest first; others are the user's."""
    found = [path for path in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(filter(Path.is_dir, found), key=lambda path: int(path.name.partition("-")[2]), reverse=True)


def _is_whole(checkpoint: Path) -> bool:
    """Whether all files are there in the size that they were written in."""
    try:
        sizes = _read(checkpoint)["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, CheckpointError, KeyError):
        return False


def _read(checkpoint: Path) -> dict:
    return read_json_object(checkpoint / RECORD_FILE, "the record of a run")


def write_record(checkpoint: Path, record: Record) -> None:
    """Write what a checkpoint's run depends on beside it, as the last of its files."""
    sizes = {name: (checkpoint / name).stat().st_size for name in file_names(checkpoint)}
    write_json(checkpoint / RECORD_FILE, asdict(record) | {"files": sizes})


def check_place(output: Path, resume: bool) -> Path | None:
    """Check before any work that a run may write into a folder.

    Args:
        output: folder to write.
        resume: a checkpoint in it is continued.

    Returns:
        The checkpoint that is continued.

    Raises:
        OutputError: the folder cannot be written, holds something, or no checkpoint that can be continued.
    """
    check_kind(output)
    place = output if output.exists() else next(p for p in output.absolute().parents if p.exists())
    if not os.access(place, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write '{output}': '{place}' is not writable; choose another output")
    found = find_checkpoint(output)
    if resume:
        if found is None:
            raise OutputError(_why_none(output))
        return found
    if output.exists() and {path.name for path in output.iterdir()} - {PARTIAL, SCRATCH}:
        what = (
            f"checkpoints of a run: continue it with {switched('resume')}"
            if found
            else "something: choose another folder"
        )
        raise OutputError(f"'{output}' already holds {what}")
    return None


def _why_none(output: Path) -> str:
    if old := [path for path in checkpoint_folders(output) if not (path / RECORD_FILE).exists()]:
        return (
            f"{old[0]} has no record of the run that wrote it, because an earlier release did, so nobody can "
            f"tell whether it belongs to this run; finish it with that release, or train on from its weights "
            "as MODEL, into another folder"
        )
    return f"'{output}' holds no checkpoint to resume from; expected one that a run has left"


def check_same_run(checkpoint: Path, record: Record) -> None:
    """Raises OutputError if a checkpoint was written by another run; names what differs, with both values."""
    try:
        values = _read(checkpoint)
        before = Record(values["request"], values["contents"], values["processes"])
    except (KeyError, CheckpointError) as error:
        raise OutputError(f"'{checkpoint}' has no record of its run ({one_line(error)})") from None
    if differences := record.differences(before):
        raise OutputError(
            f"'{checkpoint}' belongs to another run: {'; '.join(differences)}; go on with the values from "
            "before, or start anew in another folder"
        )
    if record.request["arguments"].get("save_only_model"):
        raise OutputError(f"'{checkpoint}' holds weights alone (save_only_model), so it cannot be continued")


def remove_leftovers(output: Path) -> list[str]:
    """Remove what a killed run has not finished writing; returns its names."""
    halves = [p for p in checkpoint_folders(output) if (p / RECORD_FILE).exists() and not _is_whole(p)]
    found = [path for path in (output / PARTIAL, output / SCRATCH, *halves) if path.exists()]
    for path in found:
        shutil.rmtree(path)
    return [path.name for path in found]


def what_is_left(output: Path, *, may_be_spoilt: bool = False) -> str:
    """The end of a failed run's message; a run that left the rails may have done so before it was seen."""
    if last := find_checkpoint(output):
        return f"{last} is the newest{'; it may be spoilt already' if may_be_spoilt else ''}"
    return "no checkpoint was saved before, so nothing is left"


@contextmanager
def writing_into(output: Path) -> Iterator[None]:
    """Leave no empty folder, and turn what a full or read-only disk answers into one line.

    Raises:
        OutputError: a file cannot be written.
    """
    made = [path for path in (output, *output.parents) if not path.exists()]
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        where = error.filename or output
        raise OutputError(
            f"cannot write {where} ({one_line(error.strerror or error)}); {what_is_left(output)}; free some "
            "space or repair this, then run again"
        ) from error
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()  # which succeeds if it is empty
