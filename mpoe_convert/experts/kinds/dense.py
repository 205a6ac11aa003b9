"""Dense experts (sparse upcycling, arXiv 2212.05055): every expert holds its own whole matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ... import experts
from ...options import Numbers, again, described
from ..ffn import FFNShape, Fitted, Form, Parts, Target, Targets
from ..matrixwise import build_matrices, describe_matrices, whole_cores, whole_term

if TYPE_CHECKING:
    from torch import Generator


DEFAULT_BIAS = "per-expert"
AUXILIARY_LR = 1.0
STARTS_EQUAL = False
ABOUT = "whole copies of the dense FFN (sparse upcycling)"


@described
class Options(experts.Options):
    """None of its own."""

    bond_dim: Numbers = again(  # pyright: ignore[reportIncompatibleVariableOverride]  (a narrower meaning)
        experts.Options, "bond_dim", "Ignored, an expert is a whole copy."
    )


def terms(
    rows: int, cols: int, options: Options, swapped: bool, rank: int | None = None
) -> tuple[list[dict], None]:
    """See `matrixwise`: a chain of one per-expert core."""
    return [whole_term(rows, cols, rank, shared=False)], None


def fit(target: Target, sites: None, options: Options, generator: Generator) -> Fitted:
    """See `matrixwise`: the matrix itself, or its factors."""
    return Fitted([whole_cores(target)])


def describe(ffn: FFNShape, options: Options) -> Form:
    """See `experts`."""
    return describe_matrices(ffn, options, terms)


def build(ffn: Targets, form: Form, options: Options) -> Parts:
    """See `experts`."""
    return build_matrices(ffn, form, options, fit)
