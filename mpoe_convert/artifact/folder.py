"""Write an artifact's folder as a transaction: whole or not at all, and never over other files."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import CheckpointError, OutputError
from ..source.json_files import read_json_object
from .layout import EXPORT_REPORT_FILE, is_artifact, read_artifact


def check_output(output: Path, overwrite: bool) -> None:
    """Check before any work that the output can be written.

    Args:
        output: folder to write.
        overwrite: an artifact or export of this tool there may be replaced.

    Raises:
        OutputError: it would replace files that this tool did not write, or its parent is not writable.
    """
    try:
        target = Path(os.path.realpath(output))  # which takes a loop of links as it is
        _check_kind(output, target)
        if target == Path.cwd():
            raise OutputError(f"the output {output} is the current folder; name one that can be replaced")
        if output.is_dir() and any(output.iterdir()):
            _check_replaceable(output, overwrite)
        parent = _existing_parent(target)
        if not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(f"cannot write '{output}': '{parent}' is not writable; choose another output")
    except OSError as error:
        raise _output_error(error, output) from error


def _check_kind(output: Path, target: Path) -> None:
    """Raises OutputError if the output or a folder on its path is a file, or the output a link to nothing."""
    link = f"'{output}' is a link to '{target}', which" if output.is_symlink() else f"'{output}'"
    if output.is_symlink() and not output.exists():
        raise OutputError(f"{link} is not there; make that folder, or choose another output")
    if output.exists() and not output.is_dir():
        raise OutputError(f"{link} exists and is not a folder; choose another output")
    parent = _existing_parent(target)
    if not parent.is_dir():
        raise OutputError(f"cannot write '{output}': '{parent}' is a file; choose another output")


def check_space(output: Path, source: Path | None, num_bytes: int) -> None:
    """Check that output and source folder do not overlap, and that the disk has room.

    Args:
        output: folder to write.
        source: folder of the source; None if it is in the Hub's cache.
        num_bytes: that the artifact needs.

    Raises:
        OutputError: they overlap, or the disk is too full; names both folders, or both sizes.
    """
    target = output.resolve()
    if source is not None:
        source = source.resolve()
        if target == source or source in target.parents or target in source.parents:
            raise OutputError(
                f"the output {output} and the source {source} lie inside each other; choose a folder "
                "outside the source"
            )
    parent = _existing_parent(target)
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise OutputError(
            f"the artifact needs {num_bytes / 1e6:,.1f} MB and {parent} has {free / 1e6:,.1f} MB free; "
            "free some space or choose another output"
        )


def _existing_parent(target: Path) -> Path:
    return next((parent for parent in target.parents if parent.exists()), target)


def _check_replaceable(output: Path, overwrite: bool) -> None:
    is_export = (output / EXPORT_REPORT_FILE).is_file()
    if not is_export and not is_artifact(output):
        raise OutputError(
            f"{output} is not empty and not an artifact of mpoe-convert; nothing in it is touched, "
            "choose another output"
        )
    if not overwrite:
        what = "export" if is_export else "artifact"
        raise OutputError(f"{output} already holds an {what}; pass --overwrite to replace it")
    try:
        report = read_json_object(output / EXPORT_REPORT_FILE) if is_export else read_artifact(output)[1]
        files = [Path(name) for name in report.get("files", ())]
    except CheckpointError as error:
        raise OutputError(f"{error}; nothing in it is touched, choose another output") from None
    written = {*files, *(parent for file in files for parent in file.parents)}
    entries = (path.relative_to(output) for path in output.rglob("*"))
    foreign = sorted(entry.as_posix() for entry in entries if entry not in written)
    if foreign:
        raise OutputError(
            f"{output} also holds {', '.join(foreign[:4])}, which mpoe-convert did not write; move "
            "them away or choose another output"
        )


@contextmanager
def staged(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `output` if the block succeeds, and is removed if it raises.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    output = output.resolve() if output.is_symlink() else output  # the folder itself is replaced
    with scratch(output) as folder:
        yield folder
        mask = _umask()  # temporary folders and safetensors files are private to their owner
        folder.chmod(0o777 & ~mask)
        for path in folder.rglob("*"):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        _move_into_place(folder, output, overwrite)


@contextmanager
def scratch(output: Path) -> Iterator[Path]:
    """A temporary folder beside the output, removed when the block ends.

    Its name is always the same, because transformers caches an artifact's code by the name of its folder.

    Raises:
        OutputError: as `staged`.
    """
    outer = None
    made = [parent for parent in output.parents if not parent.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        outer = _sibling(output, ".partial")
        folder = outer / "artifact"
        folder.mkdir()
        yield folder
    except OSError as error:
        raise _output_error(error, output) from error
    finally:
        if outer is not None:
            shutil.rmtree(outer, ignore_errors=True)
        for parent in made:  # rmdir fails, as wanted, on those that now hold the artifact
            with suppress(OSError):
                parent.rmdir()


def _sibling(output: Path, suffix: str) -> Path:
    """A new hidden folder beside the output; a long name is truncated, since the new one is longer."""
    return Path(tempfile.mkdtemp(prefix=f".{output.name[:40]}.", suffix=suffix, dir=output.parent))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _move_into_place(folder: Path, output: Path, overwrite: bool) -> None:
    """Replace `output` by `folder`; an old artifact is moved aside first and restored on failure."""
    if not output.exists():
        os.replace(folder, output)
        return
    if any(output.iterdir()):
        _check_replaceable(output, overwrite)  # again: it may have changed meanwhile
    aside = _sibling(output, ".old")
    try:
        os.replace(output, aside)
        os.replace(folder, output)
    finally:
        if not output.exists():  # the second replacement failed
            os.replace(aside, output)
        shutil.rmtree(aside, ignore_errors=True)


def _output_error(error: OSError, output: Path) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"the disk is full; nothing was left at {output}: free some space and run again")
    reason = error.strerror or str(error)
    where = f" ({Path(error.filename).name})" if error.filename else ""
    return OutputError(
        f"cannot write {output}: {reason}{where}; nothing was left there, repair this or choose another"
    )
