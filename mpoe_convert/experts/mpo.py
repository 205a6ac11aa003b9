"""MPO experts (MPOE, arXiv 2203.01104): one shared central core, auxiliary cores per expert."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import sites as site_layouts
from ..recipe import Recipe

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from ..sites import Sites

DEFAULT_BIAS = "shared"
AUXILIARY_LR = 1.0
STARTS_EQUAL = False
ABOUT = (
    "matrix product operators that share their central tensor; each expert has auxiliary tensors of its own"
)


def terms(rows: int, cols: int, recipe: Recipe, swapped: bool) -> tuple[list[dict], Sites]:
    """See `experts`. `swapped` says that explicit factors are to be read columns first."""
    factors = recipe.factors and site_layouts.parse_factors(recipe.factors)
    if factors and swapped:
        factors = factors[::-1]
    sites = site_layouts.choose(
        rows,
        cols,
        layout=recipe.layout,
        num_sites=recipe.num_sites,
        bond_dim=recipe.bond_dim,
        factors=factors,
    )
    shape = {
        "in_dims": list(sites.in_dims),
        "out_dims": list(sites.out_dims),
        "bonds": list(sites.bonds),
        "shared": [k == sites.centre for k in range(sites.num_sites)],
    }
    return [shape], sites


def fit(
    matrix: Tensor, sites: Sites, recipe: Recipe, generator: Generator
) -> tuple[list[list[Tensor]], tuple[float, ...]]:
    """See `experts`. In the canonical gauge the orthogonality centre is the core in the middle."""
    from ..mpo import fit as fit_mpo

    mpo = fit_mpo(matrix, sites, svd=recipe.svd, seed=recipe.seed, gauge=recipe.gauge)
    return [list(mpo.cores)], mpo.discarded
