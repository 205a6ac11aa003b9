"""Optional libraries, which the extras of this package install."""

from __future__ import annotations

from importlib.util import find_spec

from .errors import LibraryError


def need(what: str, *libraries: str, extra: str) -> None:
    """Check that optional libraries are installed; imports none of them.

    Args:
        what: the command, or the part of one, that needs the libraries.
        libraries: names by which they are imported.
        extra: the pip extra that installs them.

    Raises:
        LibraryError: one is not installed.
    """
    missing = [name for name in libraries if find_spec(name) is None]
    if missing:
        raise LibraryError(
            f"{what} needs {' and '.join(missing)}: install them with pip install 'mpoe-convert[{extra}]'"
        )
