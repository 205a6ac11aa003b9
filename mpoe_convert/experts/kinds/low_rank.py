"""Low-rank experts (LoRA, arXiv 2106.09685): the dense matrix, shared, plus a product of two thin ones each.

The control for MPO experts of equal size. `--bond-dim` is the rank r: an expert owns r (in + out) parameters
per matrix; ranks may differ from expert to expert.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ... import experts
from ...errors import SitesError
from ...options import again, called, described
from ..ffn import FFNShape, Fitted, Form, Parts, Target, Targets
from ..matrixwise import build_matrices, by_expert, describe_matrices, expert_sizes, whole_cores, whole_term
from ..sharing import SharingOptions

if TYPE_CHECKING:
    from torch import Generator


DEFAULT_BIAS = "shared"
AUXILIARY_LR = 3.0
STARTS_EQUAL = True
ABOUT = "the dense FFN, which they share, plus a low-rank matrix each (LoRA)"


@described
class Options(SharingOptions):
    """Low-rank experts have a rank."""

    KIND = "low-rank"

    bond_dim: int | str = again(  # pyright: ignore[reportIncompatibleVariableOverride]  (never a list)
        experts.Options,
        "bond_dim",
        "Rank of an expert's two thin matrices.",
        expected="a whole number of at least 1, the rank of kind low-rank, or one for every expert, such as "
        "4/4/8/8",
    )

    def why_one_size(self, compresses: bool) -> None:
        return None


def terms(
    rows: int, cols: int, options: Options, swapped: bool, rank: int | None = None
) -> tuple[list[dict], None]:
    """See `matrixwise`: the whole matrix, and (in, r) times (r, out) per expert."""
    ranks = expert_sizes(options)
    own = max(ranks)
    if own > min(rows, cols):
        raise SitesError(f"the rank ({called('bond_dim')}) is {own}; expected at most {min(rows, cols)}")
    thin = whole_term(rows, cols, own, shared=False)
    each = [whole_term(rows, cols, size, shared=False) for size in ranks]
    return [whole_term(rows, cols, rank, shared=True), by_expert(thin, each)], None


def fit(target: Target, sites: None, options: Options, generator: Generator) -> Fitted:
    """See `matrixwise`: the matrix; a random left factor of variance 1 / in per expert, and zeros.

    All experts compute the dense matrix at first; their different left factors break the symmetry.
    """
    import torch

    rows, cols = target.matrix.shape
    ranks = expert_sizes(options)
    drawn = torch.randn(rows * sum(ranks), generator=generator).to(target.matrix) / rows**0.5
    parts = zip(drawn.split([rows * rank for rank in ranks]), ranks, strict=True)
    lefts = [part.view(1, rows, 1, rank) for part, rank in parts]
    rights = [target.matrix.new_zeros(rank, 1, cols, 1) for rank in ranks]
    return Fitted([whole_cores(target), [lefts, rights]])


def describe(ffn: FFNShape, options: Options) -> Form:
    """See `experts`."""
    return describe_matrices(ffn, options, terms)


def build(ffn: Targets, form: Form, options: Options) -> Parts:
    """See `experts`."""
    return build_matrices(ffn, form, options, fit)
