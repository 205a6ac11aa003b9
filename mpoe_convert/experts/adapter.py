"""Adapter experts (PESC, arXiv 2401.02731): the dense FFN, shared, and a bottleneck per expert behind it.

`--bond-dim` is the adapter's width r: an expert owns 2 r H numbers per FFN. The FFN runs once per token,
whatever k is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import RecipeError
from ..planning.recipe import Recipe
from . import whole_cores, whole_term

if TYPE_CHECKING:
    from torch import Generator, Tensor


DEFAULT_BIAS = "shared"
AUXILIARY_LR = 3.0
STARTS_EQUAL = True
ABOUT = "the dense FFN, shared, with an adapter each behind it (PESC)"


def terms(
    rows: int, cols: int, recipe: Recipe, swapped: bool, rank: int | None = None
) -> tuple[list[dict], None]:
    """See `experts`: the whole matrix."""
    if recipe.bias == "per-expert":
        raise RecipeError("kind adapter shares the whole FFN, biases too; expected bias shared")
    return [whole_term(rows, cols, rank, shared=True)], None


def fit(
    matrix: Tensor,
    sites: None,
    recipe: Recipe,
    generator: Generator,
    factors: tuple[Tensor, Tensor] | None = None,
) -> tuple[list[list[Tensor]], tuple[float, ...]]:
    """See `experts`: the matrix itself, or its factors."""
    return [whole_cores(matrix, factors)], ()


def adapter_size(hidden_size: int, recipe: Recipe) -> int:
    """See `experts`."""
    if not isinstance(recipe.bond_dim, int):
        raise RecipeError(f"bond_dim is {recipe.bond_dim}; kind adapter takes one number, its width")
    return recipe.bond_dim


def fit_adapter(hidden_size: int, recipe: Recipe, generator: Generator) -> dict[str, Tensor]:
    """See `experts`: a random way in of variance 1 / H per expert, and zeros.

    Every expert computes the dense FFN at first; what separates them is that the ways in differ.
    """
    import torch

    shape = (recipe.experts, hidden_size, recipe.bond_dim)
    way_in = torch.randn(shape, generator=generator) / hidden_size**0.5
    return {"aux_0": way_in, "aux_1": torch.zeros(recipe.experts, recipe.bond_dim, hidden_size)}
