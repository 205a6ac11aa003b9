"""Optional libraries, which the extras of this package install."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

from .errors import LibraryError

# Distributions that are called otherwise than what is imported of them.
_DISTRIBUTIONS = {
    "compressed_tensors": "compressed-tensors",
    "rouge_score": "rouge-score",
    "sklearn": "scikit-learn",
}


def need(what: str, *libraries: str, extra: str) -> None:
    """Check that optional libraries are installed, and recent enough; imports none of them.

    Args:
        what: the command, or the part of one, that needs the libraries.
        libraries: names by which they are imported.
        extra: the pip extra that installs them.

    Raises:
        LibraryError: one is not installed, or older than the extra asks for.
    """
    install = f"install them with pip install 'mpoe-convert[{extra}]'"
    missing = [name for name in libraries if find_spec(name) is None]
    if missing:
        raise LibraryError(f"{what} needs {' and '.join(missing)}: {install}")
    old = [words for name in libraries if (words := _too_old(_DISTRIBUTIONS.get(name, name), extra))]
    if old:
        raise LibraryError(f"{what} needs {' and '.join(old)}: {install}")


def _too_old(distribution: str, extra: str) -> str | None:
    """ "accelerate>=1.3 (found 1.1.0)" if the extra asks for a later one than is installed."""
    from packaging.requirements import Requirement

    try:
        asked = [Requirement(line) for line in requires("mpoe-convert") or ()]
        found = version(distribution)
    except PackageNotFoundError:  # one of the two is not installed by pip
        return None
    for each in asked:
        of_extra = each.marker is not None and each.marker.evaluate({"extra": extra})
        if each.name == distribution and of_extra and not each.specifier.contains(found, prereleases=True):
            return f"{each.name}{each.specifier} (found {found})"
    return None
