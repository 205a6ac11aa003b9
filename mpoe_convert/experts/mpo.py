"""MPO experts (MPOE, arXiv 2203.01104): one shared central core, auxiliary cores per expert."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..decomposition import sites as site_layouts
from ..planning.recipe import Recipe
from . import factored

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from ..decomposition.sites import Sites


DEFAULT_BIAS = "shared"
AUXILIARY_LR = 1.0
STARTS_EQUAL = False
ABOUT = (
    "matrix product operators that share their central tensor; each expert has auxiliary tensors of its own"
)


def terms(
    rows: int, cols: int, recipe: Recipe, swapped: bool, rank: int | None = None
) -> tuple[list[dict], Sites]:
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
    return [shape if rank is None else factored(shape, sites.centre, rank)], sites


def fit(
    matrix: Tensor,
    sites: Sites,
    recipe: Recipe,
    generator: Generator,
    factors: tuple[Tensor, Tensor] | None = None,
) -> tuple[list[list[Tensor]], tuple[float, ...]]:
    """See `experts`. In the canonical gauge the orthogonality centre is the core in the middle.

    Factors go where their side's outer cores leave them: for the one-sided layout, whose outer cores are
    orthogonal and carry one side only.
    """
    from ..decomposition.mpo import fit as fit_mpo

    if factors is not None:
        first, second = factors
        matrix = first @ second
    mpo = fit_mpo(matrix, sites, svd=recipe.svd, seed=recipe.seed, gauge=recipe.gauge)
    if factors is None:
        return [list(mpo.cores)], mpo.discarded
    left, right = mpo.cores[: sites.centre], mpo.cores[sites.centre + 1 :]
    return [[*left, *_between(left, first, second, right), *right]], ()


def _between(
    left: tuple[Tensor, ...], first: Tensor, second: Tensor, right: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """The cores between orthogonal outer ones that make the chain the product of two thin matrices."""
    import torch

    from ..runtime.modeling_mpoe import merge_cores

    inputs, outputs = merge_cores(left)[0, :, 0, :], merge_cores(right)[:, 0, :, 0]
    rank = first.shape[1]
    first = torch.einsum("ab,air->bir", inputs, first.reshape(inputs.shape[0], -1, rank))
    second = torch.einsum("roc,bc->rob", second.reshape(rank, -1, outputs.shape[1]), outputs)
    return first[:, :, None, :].contiguous(), second[:, None, :, :].contiguous()
