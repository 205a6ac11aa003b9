"""Decompose a matrix into a block tensor train: scales, a square matrix per block, and one large core.

Sources: block tensor trains (BTT), arXiv 2406.06248; a block SVD whose small core belongs to a task: FuRA,
arXiv 2605.22869.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tensors import check_finite
from .grams import cheap_gram
from .sites import Sites

# So many rows at a time are multiplied by blocks of outputs: two thirds of the time of all at once.
_ROWS = 1024


def fit_blocks(
    matrix: Tensor, sites: Sites, factors: tuple[Tensor, Tensor] | None = None, *, gauge: str = "canonical"
) -> list[Tensor]:
    """The cores of a matrix over sites of the layout `blocks`; exact to rounding.

    ::

        W[block p] = diag(s_p) R_p C[block p]         p: blocks of the inputs     (b, out) = (b, b) (b, out)
        W[:, block p] = C[:, block p] R_p diag(s_p)      or of the outputs        (in, b) = (in, b) (b, b)

    The scales s are 1.

    Args:
        matrix: (in, out), float32 or float64.
        sites: what `sites.blocks` gives for its size.
        factors: (in, rank) and (rank, out), whose product is decomposed instead; the large core becomes two
            cores with that bond.
        gauge: "canonical": R_p holds the singular vectors of a block, so that the block's rows (columns) of C
            are orthogonal and have its singular values as norms; "identity": R_p is the identity, C is W.

    Returns:
        The cores as `modeling_mpoe.Chain` has them; the untied one is (P * l, i, o, r) with P blocks.

    Raises:
        CheckpointError: the matrix holds NaN or Inf.
    """
    check_finite(matrix)
    whole = (matrix,) if factors is None else factors
    return _of_inputs(whole, sites, gauge) if sites.untied[0] else _of_outputs(whole, sites, gauge)


def _of_inputs(whole: tuple[Tensor, ...], sites: Sites, gauge: str) -> list[Tensor]:
    """`whole`: the matrix, or the two thin ones that it is the product of."""
    _, block, number = sites.in_dims
    split = whole[0].reshape(block, number, -1).transpose(0, 1)  # (P, b, out or rank)
    basis = _basis(split @ whole[1] if len(whole) > 1 else split, gauge)  # (P, b, b)
    inner = split.new_empty(block, number, split.shape[-1])  # (b, P, out or rank)
    torch.bmm(basis.mT, split, out=inner.transpose(0, 1))
    outside = [second[:, None, :, None] for second in whole[1:]]
    centre = [inner.unsqueeze(2 if outside else 3), *outside]
    cores = (_scales(basis, block * number), basis.unsqueeze(2), *centre)
    return [core.contiguous() for core in cores]


def _of_outputs(whole: tuple[Tensor, ...], sites: Sites, gauge: str) -> list[Tensor]:
    """The same for blocks of the outputs."""
    number, block, _ = sites.out_dims
    split = whole[-1].reshape(-1, number, block).transpose(0, 1)  # (P, in or rank, b)
    basis = _basis((whole[0] @ split if len(whole) > 1 else split).mT, gauge)  # (P, b, b)
    inner = split.new_empty(split.shape[1], number, block)  # (in or rank, P, b)
    for rows, made in zip(split.split(_ROWS, dim=1), inner.split(_ROWS), strict=True):
        torch.bmm(rows, basis, out=made.transpose(0, 1))
    outside = [first[None, :, None, :] for first in whole[:-1]]
    centre = [*outside, inner.unsqueeze(1 if outside else 0)]
    untied = basis.mT.flatten(0, 1)[:, None, :, None]  # (P * b, 1, b, 1)
    cores = (*centre, untied, _scales(basis, number * block))
    return [core.contiguous() for core in cores]


def _scales(like: Tensor, number: int) -> Tensor:
    """(P, 1, 1, 1) ones."""
    return like.new_ones(number, 1, 1, 1)


def _basis(blocks: Tensor, gauge: str) -> Tensor:
    """(P, b, b) of blocks (P, b, n): left singular vectors, by descending value, or identities."""
    if gauge == "identity":
        number, size, _ = blocks.shape
        return torch.eye(size, dtype=blocks.dtype, device=blocks.device).repeat(number, 1, 1)
    wide = blocks.cpu() if blocks.device.type == "mps" else blocks  # MPS has no float64
    # Nothing is dropped: what counts is that the basis is orthogonal, which float64 eigenvectors are.
    _, vectors = torch.linalg.eigh(cheap_gram(wide))  # ascending
    return vectors.flip(-1).to(blocks)
