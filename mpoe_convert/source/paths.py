"""Names of files that a checkpoint's own files give: whether they stay inside its folder."""

from __future__ import annotations

from pathlib import PurePosixPath, PureWindowsPath


def stays_inside(file: str) -> bool:
    """Whether a file's name stays inside the folder. Links are not followed: the Hub's cache uses them."""
    parts = PurePosixPath(file).parts
    plain = bool(parts) and ".." not in parts and "\\" not in file and file.isprintable()
    return plain and not PurePosixPath(file).is_absolute() and not PureWindowsPath(file).drive
