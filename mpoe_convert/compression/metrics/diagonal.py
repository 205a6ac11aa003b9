"""Errors are weighed by the mean square of every input, as in ASVD (arXiv 2312.05821) and AWT."""

from __future__ import annotations

import torch
from torch import Tensor

from ...decomposition.low_rank import thin_side
from ...planning.plan import MatrixPlan
from ..moments import FFNMoments
from . import FitMetric


def moment(moments: FFNMoments, matrix: MatrixPlan, weight: Tensor) -> Tensor:
    """diag(s) of the inputs, or W^T diag(s) W of the outputs, in the weight's dtype."""
    scale = moments.input_scale(matrix).to(weight)
    if thin_side(matrix.rows, matrix.cols) == "in":
        return torch.diag(scale)
    return (weight.mT * scale) @ weight


def input_moment(moments: FFNMoments, matrix: MatrixPlan) -> Tensor:
    return torch.diag(moments.input_scale(matrix))


FIT = FitMetric(
    about="inputs weighed by their mean squares, as ASVD and AWT do", moment=moment, input_moment=input_moment
)
