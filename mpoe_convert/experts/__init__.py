"""Expert kinds: one module each, discovered; the module's name is the name on the command line.

A kind offers:

* `DEFAULT_BIAS`: "shared" or "per-expert";
* `ABOUT`: what its experts are, for people;
* `STARTS_EQUAL`: all experts compute the dense FFN at first, whatever the noise;
* `AUXILIARY_LR`: the factor on the learning rate that suits what its experts own (examples/results);
* `terms(rows, cols, recipe, swapped, rank)`: the shapes of the terms that a (rows, cols) matrix becomes, as
  `modeling_mpoe.Chain` reads them, and the first one's `Sites` (None if it has none). With a rank the
  big core, the matrix itself or what is in the middle of its chain, becomes two thin ones. Raises SitesError;
* `fit(matrix, sites, recipe, generator, factors)`: per term its cores (bond_left, in_dim, out_dim,
  bond_right), and the weight discarded per bond. The cores are expert 0's, to be cloned with noise, but for
  those that have an expert axis in front already. `factors`, (rows, rank) and (rank, cols), take the place of
  the matrix.

A kind whose experts are adapters behind an FFN that they all share also offers:

* `adapter_size(hidden_size, recipe)`: how wide an adapter is inside. Raises RecipeError;
* `fit_adapter(hidden_size, recipe, generator)`: the tensors of `modeling_mpoe.Adapter` by name.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


KINDS: tuple[str, ...] = tuple(
    sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))
)


def load(kind: str) -> ModuleType:
    """The module of a kind."""
    return import_module(f"{__name__}.{kind.replace('-', '_')}")


def whole_term(rows: int, cols: int, rank: int | None, *, shared: bool) -> dict:
    """The term of a matrix as it is, or as two thin ones."""
    term = {"in_dims": [rows], "out_dims": [cols], "bonds": [], "shared": [shared]}
    return term if rank is None else factored(term, 0, rank)


def factored(term: dict, k: int, rank: int) -> dict:
    """A term whose core k is two, with the inputs in the first, the outputs in the second, and that bond."""
    ins, outs, bonds, shared = (list(term[key]) for key in ("in_dims", "out_dims", "bonds", "shared"))
    ins[k : k + 1], outs[k : k + 1] = [ins[k], 1], [1, outs[k]]
    bonds.insert(k, rank)
    shared.insert(k, shared[k])
    return {"in_dims": ins, "out_dims": outs, "bonds": bonds, "shared": shared}


def whole_cores(matrix: Tensor, factors: tuple[Tensor, Tensor] | None) -> list[Tensor]:
    """The cores of `whole_term`."""
    if factors is None:
        return [matrix[None, :, :, None]]
    first, second = factors
    return [first[None, :, None, :], second[:, None, :, None]]
