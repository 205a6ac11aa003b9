"""Write an artifact's folder as a transaction: whole or not at all, and never over other files."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import CheckpointError, OutputError, few
from ..options import switched
from ..source.json_files import read_json_object
from .layout import EXPORT_REPORT_FILE, is_artifact, read_artifact

try:
    import fcntl
except ImportError:  # Windows, where what a killed run leaves stays
    fcntl = None

# Beside an output while it is written: ".out.abcdefgh.partial", which holds these.
SUFFIX = ".partial"
MADE = "artifact"
REPLACED = "replaced"  # the artifact that was there before, while the new one takes its place
LOCK = "lock"  # locked by the run as long as it lives
RUN = "run.json"  # of a run that can be resumed: what it makes
DONE = "done"  # of the same: a file for each weight file that is finished


def check_output(output: Path, overwrite: bool) -> None:
    """Check before any work that the output can be written.

    Args:
        output: folder to write.
        overwrite: an artifact or export of this tool there may be replaced.

    Raises:
        OutputError: it would replace files that this tool did not write, or its parent is not writable.
    """
    try:
        target = Path(os.path.realpath(output))
        check_kind(output)
        if target == Path.cwd():
            raise OutputError(f"the output '{output}' is the current folder; name one that can be replaced")
        if output.is_dir() and any(output.iterdir()):
            _check_replaceable(output, overwrite)
        parent = _existing_parent(target)
        if not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(f"cannot write '{output}': '{parent}' is not writable; choose another output")
    except OSError as error:
        raise output_error(error, output) from error


def check_kind(output: Path) -> None:
    """Raises OutputError if the output or a folder on its path is a file, or the output a link to nothing."""
    target = Path(os.path.realpath(output))  # which takes a loop of links as it is
    link = f"'{output}' is a link to '{target}', which" if output.is_symlink() else f"'{output}'"
    if output.is_symlink() and not output.exists():
        raise OutputError(f"{link} is not there; make that folder, or choose another output")
    if output.exists() and not output.is_dir():
        raise OutputError(f"{link} exists and is not a folder; choose another output")
    parent = _existing_parent(target)
    if not parent.is_dir():
        raise OutputError(f"cannot write '{output}': '{parent}' is a file; choose another output")


def check_apart(output: Path, source: Path) -> None:
    """Check that a folder to write and the folder of the source do not overlap.

    Raises:
        OutputError: they do; names both.
    """
    target, source = output.resolve(), source.resolve()
    if target == source or source in target.parents or target in source.parents:
        raise OutputError(
            f"the output '{output}' and the source '{source}' lie inside each other; choose a folder outside "
            "the source"
        )


def check_space(
    output: Path, num_bytes: int, what: str = "the artifact", instead: str = "choose another output"
) -> None:
    """Check that the disk has room.

    Args:
        output: folder to write.
        num_bytes: that is needed.
        what: needs them.
        instead: what else helps than to free some.

    Raises:
        OutputError: there is less; names both sizes.
    """
    parent = _existing_parent(output.resolve())
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise OutputError(
            f"{what} needs {num_bytes / 1e6:,.1f} MB and {parent} has {free / 1e6:,.1f} MB free; "
            f"free some space or {instead}"
        )


def _existing_parent(target: Path) -> Path:
    return next((parent for parent in target.parents if parent.exists()), target)


def _check_replaceable(output: Path, overwrite: bool) -> None:
    is_export = (output / EXPORT_REPORT_FILE).is_file()
    if not is_export and not is_artifact(output):
        raise OutputError(
            f"'{output}' is not empty and not an artifact of mpoe-convert; nothing in it is touched, "
            "choose another output"
        )
    if not overwrite:
        what = "export" if is_export else "artifact"
        raise OutputError(f"'{output}' already holds an {what}; pass {switched('overwrite')} to replace it")
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
            f"'{output}' also holds {few(foreign, 4)}, which mpoe-convert did not write; move "
            "them away or choose another output"
        )


@contextmanager
def staged(output: Path, overwrite: bool = False, resume: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `output` if the block succeeds, and is removed if it raises.

    Args:
        resume: it is the folder that an interrupted run has left, if there is one; and if the block raises it
            stays, once a file lies in `DONE` beside it.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    output = _behind_link(output)  # the folder itself is replaced
    with scratch(output, resume) as folder:
        yield folder
        mask = _umask()  # temporary folders and safetensors files are private to their owner
        folder.chmod(0o777 & ~mask)
        for path in folder.rglob("*"):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        _move_into_place(folder, output, overwrite)


@contextmanager
def scratch(output: Path, resume: bool = False) -> Iterator[Path]:
    """A temporary folder beside the output, removed when the block ends.

    Its name is always the same, because transformers caches an artifact's code by the name of its folder.
    What killed runs have left there is removed first.

    Args:
        resume: as for `staged`.

    Raises:
        OutputError: as `staged`.
    """
    output = _behind_link(output)
    outer = lock = None
    made = [parent for parent in output.parents if not parent.exists()]
    try:
        outer, lock = _taken_up(output) if resume else (None, None)
        remove_leftovers(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        if outer is None:
            outer, lock = _locked_folder(f".{output.name[:40]}.", SUFFIX, output.parent)
        folder = outer / MADE
        folder.mkdir(exist_ok=True)
        yield folder
    except OSError as error:
        raise output_error(error, output) from error
    finally:
        keeps = outer is not None and resume and (outer / MADE).exists() and count_finished(outer)
        if outer is not None and not keeps and (output.exists() or not (outer / REPLACED).exists()):
            shutil.rmtree(outer, ignore_errors=True)
        if lock is not None:
            os.close(lock)
        for parent in made:  # rmdir fails, as wanted, on those that now hold the artifact
            with suppress(OSError):
                parent.rmdir()


def remove_leftovers(output: Path) -> list[Path]:
    """Remove what runs with this output left beside it when they were killed.

    An artifact that such a run was about to replace is brought back. What a living run is writing stays, as
    does everything that is not such a run's temporary folder.

    Returns:
        The folders that were removed.

    Raises:
        OSError: the folder that holds them cannot be read.
    """
    output = _behind_link(output)
    return [] if fcntl is None else [path for path in _siblings(output) if _remove_leftover(path, output)]


def find_resumable(output: Path) -> Path | None:
    """What an interrupted run with this output has left, if a run that resumes would take it up.

    Raises:
        OSError: the folder that holds it cannot be read.
    """
    folder, lock = _taken_up(_behind_link(output))
    if lock is not None:
        os.close(lock)
    return folder


def count_finished(folder: Path) -> int:
    """The number of finished weight files in what an interrupted run has left."""
    return len(list((folder / DONE).glob("*.json")))


def _siblings(output: Path) -> list[Path]:
    """The temporary folders of runs with this output, living ones too."""
    name = re.compile(rf"\.{re.escape(output.name[:40])}\.[a-z0-9_]{{8}}{re.escape(SUFFIX)}")
    if not output.parent.is_dir():
        return []
    found = [path for path in sorted(output.parent.iterdir()) if name.fullmatch(path.name) and path.is_dir()]
    return [path for path in found if not path.is_symlink()]


def _taken_up(output: Path) -> tuple[Path | None, int | None]:
    """The interrupted run's folder with the most finished files, and its lock; (None, None): there is none.

    Where there are no locks whoever resumes knows that the run has ended.
    """
    found = [path for path in _siblings(output) if (path / RUN).is_file() and count_finished(path)]
    for folder in sorted(found, key=count_finished, reverse=True):
        if fcntl is None or not (folder / LOCK).exists():
            return folder, None
        if (lock := _lock_of(folder)) is not None:
            return folder, lock
    return None, None


def _behind_link(output: Path) -> Path:
    """The folder that is written: what an output links to, or the output itself."""
    return output.resolve() if output.is_symlink() else output


def _remove_leftover(folder: Path, output: Path) -> bool:
    """Remove the temporary folder of a run that does not live any more; False: it does."""
    try:
        lock = _lock_of(folder)
    except OSError:  # not this tool's, another user's, or on a file system without locks
        return False
    if lock is None:
        return False
    try:
        if (folder / REPLACED).is_dir() and not output.exists():
            os.replace(folder / REPLACED, output)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)
    return not folder.exists()


class TemporaryFolder:
    """A folder that lasts as long as this object, or until `close`.

    Folders of the same prefix that killed runs have left are removed first.

    Args:
        parent: where it is; None: among the system's temporary files.

    Attributes:
        path: of the folder.
    """

    def __init__(self, prefix: str, parent: Path | None = None) -> None:
        parent = parent or Path(tempfile.gettempdir())
        _remove_dead(prefix, parent)
        self.path, lock = _locked_folder(prefix, "", parent)
        self.close = weakref.finalize(self, _discard, self.path, lock)


def _remove_dead(prefix: str, parent: Path) -> None:
    """Remove the temporary folders of a prefix whose processes do not live any more."""
    for folder in parent.glob(f"{prefix}*"):
        if fcntl is not None and folder.is_dir() and not folder.is_symlink():
            with suppress(OSError):
                if (lock := _lock_of(folder)) is not None:
                    _discard(folder, lock)


def _discard(folder: Path | None, lock: int | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        os.close(lock)


def _locked_folder(prefix: str, suffix: str, parent: Path) -> tuple[Path, int | None]:
    """A new folder that only its owner may read, and the lock in it, None where there are no locks."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=parent))
        if fcntl is None:
            return folder, None
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if _take(lock) and os.fstat(lock).st_nlink:
                return folder, lock
        except OSError:  # a file system without locks: nobody may take the folder for a leftover
            os.close(lock)
            (folder / LOCK).unlink()
            return folder, None
        os.close(lock)  # another run has just taken the folder for a leftover


def _lock_of(folder: Path) -> int | None:
    """The lock of a folder, taken; None: a living process has it. Raises OSError where there is no lock."""
    lock = os.open(folder / LOCK, os.O_RDWR)
    is_taken = False
    try:
        is_taken = _take(lock)
    finally:
        if not is_taken:
            os.close(lock)
    return lock if is_taken else None


def _take(lock: int) -> bool:
    """Lock an open file unless a living process has it. Raises OSError where there are no locks."""
    assert fcntl is not None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _move_into_place(folder: Path, output: Path, overwrite: bool) -> None:
    """Replace `output` by `folder`; an old artifact is moved aside first, and brought back on failure."""
    if not output.exists():
        os.replace(folder, output)
        return
    if any(output.iterdir()):
        _check_replaceable(output, overwrite)  # again: it may have changed meanwhile
    aside = folder.parent / REPLACED
    try:
        os.replace(output, aside)
        os.replace(folder, output)
    finally:
        if not output.exists():  # the second replacement failed
            os.replace(aside, output)


def output_error(error: OSError, output: Path) -> OutputError:
    """What an operating system's error means for whoever writes an output."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"the disk is full; nothing was left at '{output}': free some space and run again")
    reason = error.strerror or str(error)
    where = f" ('{Path(error.filename).name}')" if error.filename else ""
    return OutputError(
        f"cannot write '{output}': {reason}{where}; nothing was left there, repair this or choose another"
    )
