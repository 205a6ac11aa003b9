"""Low-rank experts (LoRA, arXiv 2106.09685): the dense matrix, shared, plus a product of two thin ones each.

The control for MPO experts of equal size. `--bond-dim` is the rank r: an expert owns r (in + out) numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import SitesError
from ..recipe import Recipe

if TYPE_CHECKING:
    from torch import Generator, Tensor

DEFAULT_BIAS = "shared"
AUXILIARY_LR = 3.0
STARTS_EQUAL = True
ABOUT = "the dense FFN, shared, plus a low-rank matrix each"


def terms(rows: int, cols: int, recipe: Recipe, swapped: bool) -> tuple[list[dict], None]:
    """See `experts`: the whole matrix, and (in, r) times (r, out) per expert."""
    rank = recipe.bond_dim
    if not isinstance(rank, int) or rank > min(rows, cols):
        raise SitesError(f"the rank (--bond-dim) is {rank}; expected one number of at most {min(rows, cols)}")
    whole = {"in_dims": [rows], "out_dims": [cols], "bonds": [], "shared": [True]}
    thin = {"in_dims": [rows, 1], "out_dims": [1, cols], "bonds": [rank], "shared": [False, False]}
    return [whole, thin], None


def fit(
    matrix: Tensor, sites: None, recipe: Recipe, generator: Generator
) -> tuple[list[list[Tensor]], tuple[float, ...]]:
    """See `experts`: the matrix; a random left factor of variance 1 / in per expert, and zero.

    All experts compute the dense matrix at first; what separates them is that their left factors differ.
    """
    import torch

    rows, cols = matrix.shape
    shape = (recipe.experts, 1, rows, 1, recipe.bond_dim)
    left = torch.randn(shape, generator=generator).to(matrix) / rows**0.5
    right = matrix.new_zeros(recipe.bond_dim, 1, cols, 1)
    return [[matrix[None, :, :, None]], [left, right]], ()
