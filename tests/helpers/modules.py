"""Python files that belong to no package: benchmarks, scripts, files that a test has written."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

BENCHMARKS = Path(__file__).parents[2] / "examples/benchmarks"


def load_module(path: Path) -> ModuleType:
    """The file as a module, whose dataclasses find it by its name."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
