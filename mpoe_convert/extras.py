"""Libraries that only some commands need, in the extras of this package."""

from __future__ import annotations

from importlib.util import find_spec

from .errors import MachineError


def need(what: str, *libraries: str, extra: str) -> None:
    """Raises MachineError if one of them is not installed.

    Args:
        what: needs them: a command, or a part of one.
        extra: has them.
    """
    missing = [name for name in libraries if find_spec(name) is None]
    if missing:
        raise MachineError(
            f"{what} needs {' and '.join(missing)}: install them with pip install 'mpoe-convert[{extra}]'"
        )
