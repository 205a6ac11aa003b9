"""Low-rank experts (LoRA, arXiv 2106.09685): the dense matrix, shared, plus a product of two thin ones each.

The control for MPO experts of equal size. `--bond-dim` is the rank r: an expert owns r (in + out) parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import experts
from ..errors import SitesError
from ..options import again, described
from . import whole_cores, whole_term

if TYPE_CHECKING:
    from torch import Generator, Tensor

DEFAULT_BIAS = "shared"
AUXILIARY_LR = 3.0
STARTS_EQUAL = True
ABOUT = "the dense FFN, which they share, plus a low-rank matrix each (LoRA)"


@described
class Options(experts.Options):
    """Low-rank experts know no bonds; they start equal, whatever the noise."""

    bond_dim: int = again(
        experts.Options,
        "bond_dim",
        "Rank of an expert's two thin matrices.",
        expected="a whole number of at least 1, the rank of kind low-rank",
    )
    noise: float = again(experts.Options, "noise", "Ignored, the experts start equal.")


def terms(
    rows: int, cols: int, options: Options, swapped: bool, rank: int | None = None
) -> tuple[list[dict], None]:
    """See `experts`: the whole matrix, and (in, r) times (r, out) per expert."""
    own = options.bond_dim
    if own > min(rows, cols):
        raise SitesError(f"the rank (--bond-dim) is {own}; expected at most {min(rows, cols)}")
    thin = whole_term(rows, cols, own, shared=False)
    return [whole_term(rows, cols, rank, shared=True), thin], None


def fit(
    matrix: Tensor,
    sites: None,
    options: Options,
    generator: Generator,
    factors: tuple[Tensor, Tensor] | None = None,
) -> tuple[list[list[Tensor]], tuple[float, ...]]:
    """See `experts`: the matrix; a random left factor of variance 1 / in per expert, and zero.

    All experts compute the dense matrix at first; the random left factors break the symmetry between them.
    """
    import torch

    rows, cols = matrix.shape
    shape = (options.experts, 1, rows, 1, options.bond_dim)
    left = torch.randn(shape, generator=generator).to(matrix) / rows**0.5
    right = matrix.new_zeros(options.bond_dim, 1, cols, 1)
    return [whole_cores(matrix, factors), [left, right]], ()
