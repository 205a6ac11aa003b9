"""Low-rank experts (LoRA, arXiv 2106.09685): the dense matrix, shared, plus a product of two thin ones each.

The control for MPO experts of equal size. `--bond-dim` is the rank r: an expert owns r (in + out) numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import SitesError
from ..planning.recipe import Recipe
from . import whole_cores, whole_term

if TYPE_CHECKING:
    from torch import Generator, Tensor


DEFAULT_BIAS = "shared"
AUXILIARY_LR = 3.0
STARTS_EQUAL = True
ABOUT = "the dense FFN, shared, plus a low-rank matrix each"


def terms(
    rows: int, cols: int, recipe: Recipe, swapped: bool, rank: int | None = None
) -> tuple[list[dict], None]:
    """See `experts`: the whole matrix, and (in, r) times (r, out) per expert."""
    own = recipe.bond_dim
    if not isinstance(own, int) or own > min(rows, cols):
        raise SitesError(f"the rank (--bond-dim) is {own}; expected one number of at most {min(rows, cols)}")
    thin = whole_term(rows, cols, own, shared=False)
    return [whole_term(rows, cols, rank, shared=True), thin], None


def fit(
    matrix: Tensor,
    sites: None,
    recipe: Recipe,
    generator: Generator,
    factors: tuple[Tensor, Tensor] | None = None,
) -> tuple[list[list[Tensor]], tuple[float, ...]]:
    """See `experts`: the matrix; a random left factor of variance 1 / in per expert, and zero.

    All experts compute the dense matrix at first; what separates them is that their left factors differ.
    """
    import torch

    rows, cols = matrix.shape
    shape = (recipe.experts, 1, rows, 1, recipe.bond_dim)
    left = torch.randn(shape, generator=generator).to(matrix) / rows**0.5
    right = matrix.new_zeros(recipe.bond_dim, 1, cols, 1)
    return [whole_cores(matrix, factors), [left, right]], ()
