"""Adapter experts (PESC, arXiv 2401.02731): the dense FFN, shared, and a bottleneck per expert behind it.

`--bond-dim` is the adapter's width r: an expert owns 2 r H parameters per FFN. The FFN runs once per token,
whatever k is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import experts
from ..errors import RecipeError
from ..options import again, described
from . import whole_cores, whole_term

if TYPE_CHECKING:
    from torch import Generator, Tensor

DEFAULT_BIAS = "shared"
AUXILIARY_LR = 3.0
STARTS_EQUAL = True
ABOUT = "the dense FFN, which they share, and behind it a small adapter each (PESC)"


@described
class Options(experts.Options):
    """Adapters know no bonds; they start equal, whatever the noise."""

    bond_dim: int = again(
        experts.Options,
        "bond_dim",
        "Hidden width of an expert's adapter.",
        expected="a whole number of at least 1, the width of kind adapter",
    )
    noise: float = again(experts.Options, "noise", "Ignored, the experts start equal.")

    def check_together(self) -> None:
        if self.bias == "per-expert":
            raise RecipeError("bias is 'per-expert'; kind adapter shares the whole FFN: expected shared")


def terms(
    rows: int, cols: int, options: Options, swapped: bool, rank: int | None = None
) -> tuple[list[dict], None]:
    """See `experts`: the whole matrix."""
    return [whole_term(rows, cols, rank, shared=True)], None


def fit(
    matrix: Tensor,
    sites: None,
    options: Options,
    generator: Generator,
    factors: tuple[Tensor, Tensor] | None = None,
) -> tuple[list[list[Tensor]], tuple[float, ...]]:
    """See `experts`: the matrix itself, or its factors."""
    return [whole_cores(matrix, factors)], ()


def adapter_size(hidden_size: int, options: Options) -> int:
    """See `experts`."""
    return options.bond_dim


def fit_adapter(hidden_size: int, options: Options, generator: Generator) -> dict[str, Tensor]:
    """See `experts`: a random down-projection of variance 1 / H per expert, and an up-projection of zeros.

    Every expert computes the dense FFN at first; the random down-projections break the symmetry between them.
    """
    import torch

    shape = (options.experts, hidden_size, options.bond_dim)
    down = torch.randn(shape, generator=generator) / hidden_size**0.5
    return {"aux_0": down, "aux_1": torch.zeros(options.experts, options.bond_dim, hidden_size)}
