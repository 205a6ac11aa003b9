"""Expert kinds: one module each, discovered; the module's name is the name on the command line.

A kind offers:

* `DEFAULT_BIAS`: "shared" or "per-expert";
* `term(rows, cols, recipe, swapped)`: the shape of the one term that a (rows, cols) matrix becomes, as
  `modeling_mpoe.MPOEChain` reads it, and its `Sites` (None when there are none). Raises SitesError;
* `fit(matrix, sites, recipe)`: the cores of that chain for one expert, and the weight discarded per bond.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from types import ModuleType

KINDS: tuple[str, ...] = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def load(kind: str) -> ModuleType:
    """The module of a kind."""
    return import_module(f"{__name__}.{kind}")
