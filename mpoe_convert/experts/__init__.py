"""Expert kinds: one module each, discovered; the module's name is the name on the command line.

A kind offers:

* `DEFAULT_BIAS`: "shared" or "per-expert";
* `ABOUT`: what its experts are, for people;
* `STARTS_EQUAL`: all experts compute the dense FFN at first, whatever the noise;
* `AUXILIARY_LR`: the factor on the learning rate that suits what its experts own (examples/results);
* `terms(rows, cols, recipe, swapped)`: the shapes of the terms that a (rows, cols) matrix becomes, as
  `modeling_mpoe.MPOEChain` reads them, and the first one's `Sites` (None if it has none). Raises SitesError;
* `fit(matrix, sites, recipe, generator)`: per term its cores (bond_left, in_dim, out_dim, bond_right), and
  the weight discarded per bond. The cores are expert 0's, to be cloned with noise, but for those that have
  an expert axis in front already.

A kind whose experts are adapters behind an FFN that they all share also offers:

* `adapter_size(hidden_size, recipe)`: how wide an adapter is inside. Raises RecipeError;
* `fit_adapter(hidden_size, recipe, generator)`: the tensors of `modeling_mpoe.MPOEAdapter` by name.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from types import ModuleType

KINDS: tuple[str, ...] = tuple(
    sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))
)


def load(kind: str) -> ModuleType:
    """The module of a kind."""
    return import_module(f"{__name__}.{kind.replace('-', '_')}")
