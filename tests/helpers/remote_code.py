"""What transformers does with the Python files beside a model, done once for files of the same content.

Nearly every test loads an artifact, and each holds a copy of the same long modelling file. transformers
parses it several times per load, to see what it imports, and compiles every copy: most of what a load takes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType


@contextmanager
def read_once() -> Iterator[None]:
    """Within it, such files of the same content are parsed and compiled once."""
    from transformers import dynamic_module_utils as utils

    imports, compiled = utils.get_imports, SourceFileLoader.source_to_code
    utils.get_imports = by_content(imports)
    SourceFileLoader.source_to_code = compiled_once(compiled, utils.HF_MODULES_CACHE)
    try:
        yield
    finally:
        utils.get_imports, SourceFileLoader.source_to_code = imports, compiled


def by_content(read: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """`read(path)`, asked once for files of the same content."""
    known: dict[bytes, list[str]] = {}

    @wraps(read)
    def remembered(path: str | Path) -> list[str]:
        content = Path(path).read_bytes()
        if content not in known:
            known[content] = read(path)
        return [*known[content]]

    return remembered


def compiled_once(compiled: Callable[..., CodeType], folder: str) -> Callable[..., CodeType]:
    """`compiled(loader, content, path)`, asked once for files of the same content below the folder."""
    known: dict[bytes, CodeType] = {}

    @wraps(compiled)
    def remembered(loader: SourceFileLoader, data: bytes, path: str, **options: int) -> CodeType:
        if not str(path).startswith(folder):
            return compiled(loader, data, path, **options)
        if data not in known:
            known[data] = compiled(loader, data, path, **options)
        return placed(known[data], path)

    return remembered


def placed(code: CodeType, path: str) -> CodeType:
    """The same code with this path in its tracebacks."""
    inner = (placed(each, path) if isinstance(each, CodeType) else each for each in code.co_consts)
    return code.replace(co_filename=path, co_consts=tuple(inner))
