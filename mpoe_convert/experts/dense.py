"""Dense experts (sparse upcycling, arXiv 2212.05055): every expert holds its own whole matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import Options, whole_cores, whole_term

if TYPE_CHECKING:
    from torch import Generator, Tensor


DEFAULT_BIAS = "per-expert"
AUXILIARY_LR = 1.0
STARTS_EQUAL = False
ABOUT = "whole copies of the dense FFN (sparse upcycling)"


def terms(
    rows: int, cols: int, options: Options, swapped: bool, rank: int | None = None
) -> tuple[list[dict], None]:
    """See `experts`: a chain of one per-expert core."""
    return [whole_term(rows, cols, rank, shared=False)], None


def fit(
    matrix: Tensor,
    sites: None,
    options: Options,
    generator: Generator,
    factors: tuple[Tensor, Tensor] | None = None,
) -> tuple[list[list[Tensor]], tuple[float, ...]]:
    """See `experts`: the matrix itself, or its factors."""
    return [whole_cores(matrix, factors)], ()
