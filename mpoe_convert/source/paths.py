"""Names of files: whether a checkpoint's own stay inside its folder, and what a user's name can mean."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..errors import nearest
from ..options import in_home

# Of a name that no file can have, because it is too long or holds a NUL, these say False; `Path`'s raise.
exists, is_dir, is_file = os.path.exists, os.path.isdir, os.path.isfile

# "name" or "owner/name", as huggingface_hub takes them.
_HUB_ID = re.compile(r"(\b[\w\-.]+\b/)?\b[\w\-.]{1,96}\b")
# Ids without an owner are few and old (gpt2, squad), and none ends like a file.
_ENDING = re.compile(r"[^/]+\.[A-Za-z]+")


def stays_inside(file: str) -> bool:
    """Whether a file's name stays inside the folder. Links are not followed: the Hub's cache uses them."""
    parts = PurePosixPath(file).parts
    plain = bool(parts) and ".." not in parts and "\\" not in file and file.isprintable()
    return plain and not PurePosixPath(file).is_absolute() and not PureWindowsPath(file).drive


def is_path(name: str) -> bool:
    """Whether a name can only mean a file or folder of this machine, be it there or not.

    Such names are written like paths, or cannot be ids of the Hub.
    """
    plain = name.strip()
    is_id = _HUB_ID.fullmatch(plain) and not ("--" in plain or ".." in plain or plain.endswith(".git"))
    return is_written_like_a_path(name) or not is_id


def is_written_like_a_path(name: str) -> bool:
    """Whether a name begins or ends as paths do, or ends like a file and has no owner."""
    plain = name.strip()
    if not plain or plain.startswith((".", "~", "/", "\\")) or plain.endswith(("/", "\\")):
        return True
    return bool(PureWindowsPath(plain).drive or _ENDING.fullmatch(plain))


def local(name: str) -> Path:
    """The path that a name stands for; "~" is the user's home."""
    return Path(in_home(name))


def suggest_path(name: str) -> str:
    """ "; did you mean 'topics.txt'?" for a name that is not there, or "" if nothing near is like it.

    >>> suggest_path("examples/tiny-gtp2")
    "; did you mean 'examples/tiny-gpt2'?"
    """
    path = local(name)
    if not name.strip() or not path.name or exists(path):
        return ""
    try:
        while path.name and not exists(path.parent):  # the first part that is not there
            path = path.parent
        there = [each.name for each in path.parent.iterdir() if not each.name.startswith(".")]
    except OSError:
        return ""
    by_lower = {Path(each).stem.lower(): each for each in there} | {each.lower(): each for each in there}
    near = nearest(path.name.lower(), by_lower, alike=0.7)
    return f"; did you mean {str(path.with_name(by_lower[near]))!r}?" if near else ""
