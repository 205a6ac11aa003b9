"""Adapter experts (PESC, arXiv 2401.02731): the dense FFN, shared, and a bottleneck per expert behind it.

`--bond-dim` is the adapter's width r, which may differ from expert to expert: one owns 2 r H parameters per
FFN. The FFN runs once per token, whatever k is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ... import experts
from ...errors import RecipeError
from ...options import again, called, described
from ..ffn import FFNShape, Fitted, Form, Parts, Target, Targets
from ..matrixwise import build_matrices, describe_matrices, expert_sizes, whole_cores, whole_term
from ..sharing import SharingOptions

if TYPE_CHECKING:
    from torch import Generator


DEFAULT_BIAS = "shared"
AUXILIARY_LR = 3.0
STARTS_EQUAL = True
ABOUT = "the dense FFN, which they share, and behind it a small adapter each (PESC)"


@described
class Options(SharingOptions):
    """Adapters have a width."""

    KIND = "adapter"

    bond_dim: int | str = again(  # pyright: ignore[reportIncompatibleVariableOverride]  (never a list)
        experts.Options,
        "bond_dim",
        "Hidden width of an expert's adapter.",
        expected="a whole number of at least 1, the width of kind adapter, or one for every expert, such as "
        "4/4/8/8",
    )

    def check_together(self) -> None:
        super().check_together()
        if self.bias == "per-expert":
            raise RecipeError(
                f"{called('bias')} is 'per-expert'; kind adapter shares the whole FFN: expected shared"
            )

    def why_one_size(self, compresses: bool) -> None:
        return None


def terms(
    rows: int, cols: int, options: Options, swapped: bool, rank: int | None = None
) -> tuple[list[dict], None]:
    """See `matrixwise`: the whole matrix."""
    return [whole_term(rows, cols, rank, shared=True)], None


def fit(target: Target, sites: None, options: Options, generator: Generator) -> Fitted:
    """See `matrixwise`: the matrix itself, or its factors."""
    return Fitted([whole_cores(target)])


def describe(ffn: FFNShape, options: Options) -> Form:
    """See `experts`: the FFN, and adapters of `bond_dim` hidden features behind it."""
    form = describe_matrices(ffn, options, terms)
    widths = expert_sizes(options)
    size = list(widths) if len(set(widths)) > 1 else widths[0]
    return replace(form, parts=form.parts | {"adapter": size})


def build(ffn: Targets, form: Form, options: Options) -> Parts:
    """See `experts`: random down-projections of variance 1 / H per expert, and up-projections of zeros.

    Every expert computes the dense FFN at first; the different random down-projections break the symmetry.
    """
    import torch

    yield from build_matrices(ffn, form, options, fit)
    hidden, widths = ffn.shape.hidden_size, expert_sizes(options)
    down = torch.randn(hidden * sum(widths), generator=ffn.generator("adapter")) / hidden**0.5
    up = torch.zeros(sum(widths) * hidden)
    if isinstance(form.parts["adapter"], int):
        down, up = (part.view(len(widths), rows, -1) for part, rows in ((down, hidden), (up, widths[0])))
    yield "adapter", {"aux_0": down, "aux_1": up}
