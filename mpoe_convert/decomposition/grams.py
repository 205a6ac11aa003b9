"""Gram matrices A A^T, as accurate as needed: float64 sums, of float32 products where those do."""

from __future__ import annotations

import torch
from torch import Tensor

# Squared norms whose parts are ordinary float32 values.
_SAFE_NORM = (1e-20, 1e30)
_PRODUCT_COLUMNS = 16384
# On a CPU so many rows at a time are multiplied by those up to them: half of a symmetric matrix.
_PRODUCT_ROWS = 64
# float64 copies are made of this many entries at a time: 32 MiB.
_CHUNK = 1 << 22


def gram(matrix: Tensor, products: torch.dtype) -> Tensor:
    """A A^T in float64, summed over chunks of columns, so that no float64 copy of A exists.

    Of float32 products it is accurate to about 1e-7 of its norm.

    Args:
        matrix: A, (..., rows, columns).
        products: dtype in which a chunk is multiplied.
    """
    *batch, rows, _ = matrix.shape
    width = _CHUNK // (matrix[..., 0].numel() or 1) if products == torch.float64 else _PRODUCT_COLUMNS
    step = _PRODUCT_ROWS if matrix.device.type == "cpu" else rows
    made = matrix.new_zeros(*batch, rows, rows, dtype=torch.float64)
    for chunk in matrix.split(max(width, 1), dim=-1):
        chunk = chunk.to(products)
        for first in range(0, rows, step):
            end = min(first + step, rows)
            made[..., first:end, :end] += chunk[..., first:end, :] @ chunk[..., :end, :].mT
    return made if rows <= step else made.tril() + made.tril(-1).mT


def is_reliable(made: Tensor) -> bool:
    """Whether float32 products gave these Gram matrices (..., rows, rows): no square left its range."""
    norms = made.diagonal(dim1=-2, dim2=-1).sum(-1)
    return bool(((norms > _SAFE_NORM[0]) & (norms < _SAFE_NORM[1])).all())


def cheap_gram(matrix: Tensor) -> Tensor:
    """`gram` by products in the matrix's own dtype where they are reliable, otherwise in float64."""
    made = gram(matrix, matrix.dtype)
    if matrix.dtype == torch.float64 or is_reliable(made):
        return made
    return gram(matrix, torch.float64)
