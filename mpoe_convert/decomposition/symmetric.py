"""Symmetric matrices (n, n) in little more than half their numbers: rows of blocks up to the diagonal.

::

    [a    ]
    [b b  ]  ->  a | b b | c c c      blocks of `BLOCK` rows, each (rows, columns up to its own last)
    [c c c]

So a sum of x^T x takes little more than half the products, each of them a product of matrices.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from math import isqrt

import torch
from torch import Tensor

BLOCK = 256


def blocks(size: int) -> Iterator[tuple[int, int]]:
    """(first row, end) of every block of rows."""
    return ((start, min(start + BLOCK, size)) for start in range(0, size, BLOCK))


def packed_length(size: int) -> int:
    """How many numbers are stored of a matrix (size, size)."""
    return sum((end - start) * end for start, end in blocks(size))


@cache
def packed_size(length: int) -> int:
    """The size of the matrix of which so many numbers are stored.

    Raises:
        ValueError: no matrix has so many.
    """
    for size in range(isqrt(length), isqrt(2 * length) + 1):
        if packed_length(size) == length:
            return size
    raise ValueError(f"{length} numbers are no symmetric matrix in blocks of {BLOCK}")


def add_gram(packed: Tensor, rows: Tensor) -> None:
    """Add x^T x for rows x (anything, n) to a packed one: products in x's dtype, sums in its own."""
    add_product(packed, rows, rows)


def add_product(packed: Tensor, left: Tensor, right: Tensor) -> None:
    """Add x^T y, which has to be symmetric, for rows x and y (anything, n), as `add_gram` does."""
    for (start, end), part in _parts(packed, left.shape[-1]):
        part += left[:, start:end].mT @ right[:, :end]


def unpacked(packed: Tensor) -> Tensor:
    """(n, n) of a packed matrix (length,)."""
    size = packed_size(len(packed))
    full = packed.new_empty(size, size)
    for (start, end), part in _parts(packed, size):
        full[start:end, :end] = part
        full[:start, start:end] = part[:, :start].mT
    return full


def diagonal(packed: Tensor) -> Tensor:
    """(n,) of a packed matrix (length,)."""
    parts = _parts(packed, packed_size(len(packed)))
    return torch.cat([part[:, start:].diagonal() for (start, _), part in parts])


def _parts(packed: Tensor, size: int) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Every block with its rows, a view."""
    place = 0
    for start, end in blocks(size):
        length = (end - start) * end
        yield (start, end), packed[place : place + length].view(end - start, end)
        place += length
