"""Core-space experts (CoMoL, arXiv 2603.00573): the dense matrix, shared, plus P C_e Q with a small C_e each.

The dual of MPO experts: the outer cores P (in, D) and Q (D, out) are shared, and an expert owns the centre
C_e (D, D). `--bond-dim` is D. What an expert owns does not grow with the FFN, so that there may be many. The
paper merges the centres of a token's experts before they are used; here experts are whole FFNs, and routed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ... import experts
from ...errors import SitesError
from ...options import again, assigned, called, described
from ..ffn import FFNShape, Fitted, Form, Parts, Target, Targets
from ..matrixwise import build_matrices, describe_matrices, whole_cores, whole_term
from ..sharing import SharingOptions

if TYPE_CHECKING:
    from torch import Generator


DEFAULT_BIAS = "shared"
AUXILIARY_LR = 1.0
STARTS_EQUAL = True
ABOUT = "the dense FFN and thin outer cores, which they share, plus a small square core each (CoMoL)"


@described
class Options(SharingOptions):
    """Core-space experts have square cores of one size."""

    KIND = "core-space"

    bond_dim: int | str = again(  # pyright: ignore[reportIncompatibleVariableOverride]  (never a list)
        experts.Options,
        "bond_dim",
        "Rows and columns of the square core that an expert owns of a matrix.",
        expected="a whole number of at least 1, the side of the square cores of kind core-space",
    )

    def why_one_size(self, compresses: bool) -> str | None:
        return (
            f"{assigned('kind', self.KIND)}, whose experts share outer cores, which fit one size of "
            f"square ones; expected {assigned('kind', 'adapter', 'low-rank', 'mpo')}"
        )


def _side(options: Options) -> int:
    """D, which is one for all experts, see `why_one_size`."""
    return int(options.bond_dim)


def terms(
    rows: int, cols: int, options: Options, swapped: bool, rank: int | None = None
) -> tuple[list[dict], None]:
    """See `matrixwise`: the whole matrix, and (in, D) and (D, out), shared, around (D, D) per expert."""
    side = _side(options)
    if side > min(rows, cols):
        raise SitesError(
            f"the side of the square cores ({called('bond_dim')}) is {side}; expected at most "
            f"{min(rows, cols)}"
        )
    thin = {
        "in_dims": [rows, 1, 1],
        "out_dims": [1, 1, cols],
        "bonds": [side, side],
        "shared": [True, False, True],
    }
    return [whole_term(rows, cols, rank, shared=True), thin], None


def fit(target: Target, sites: None, options: Options, generator: Generator) -> Fitted:
    """See `matrixwise`: the matrix; random outer cores of variance 1 / in and 1 / D, and zeros between.

    All experts compute the dense matrix at first. The tokens that a router sends to each make them differ.
    """
    import torch

    rows, cols = target.matrix.shape
    side = _side(options)
    left = torch.randn(1, rows, 1, side, generator=generator).to(target.matrix) / rows**0.5
    right = torch.randn(side, 1, cols, 1, generator=generator).to(target.matrix) / side**0.5
    return Fitted([whole_cores(target), [left, target.matrix.new_zeros(side, 1, 1, side), right]])


def describe(ffn: FFNShape, options: Options) -> Form:
    """See `experts`."""
    return describe_matrices(ffn, options, terms)


def build(ffn: Targets, form: Form, options: Options) -> Parts:
    """See `experts`."""
    return build_matrices(ffn, form, options, fit)
