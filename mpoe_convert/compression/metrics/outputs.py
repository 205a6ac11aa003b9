"""Errors of all outputs on the calibration text count alike: SVD-LLM's whitening (arXiv 2403.07378)."""

from __future__ import annotations

from torch import Tensor

from ...planning.plan import MatrixPlan
from ..moments import FFNMoments
from . import FitMetric


def moment(moments: FFNMoments, matrix: MatrixPlan, weight: Tensor) -> Tensor:
    """The observed moment of the thin side."""
    return moments.thin_moment(matrix)


FIT = FitMetric(
    about="outputs on the calibration text, all alike (SVD-LLM's whitening)",
    moment=moment,
    input_moment=FFNMoments.input_moment,
    is_correctable=True,
    is_searched=True,
)
