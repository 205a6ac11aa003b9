"""Errors of outputs are weighed by the gradient of the loss: the second-order change of the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ...decomposition.low_rank import thin_side
from ...planning.plan import MatrixPlan
from ..moments import FFNMoments
from . import FitMetric
from .outputs import moment

# Fraction of "all outputs matter alike" in the moment of gradients.
ALIKE = 0.3


def gradient(moments: FFNMoments, matrix: MatrixPlan, weight: Tensor) -> Tensor:
    """Moment of the gradient on the thin side, mixed with that of outputs that matter alike."""
    alike = moments.tensors[f"{matrix.role}.gradient_mean"].to(weight)
    if thin_side(matrix.rows, matrix.cols) == "in":
        alike = alike * (weight @ weight.mT)
    else:
        alike = alike * torch.eye(matrix.cols, dtype=weight.dtype, device=weight.device)
    return (1 - ALIKE) * moments.tensors[f"{matrix.role}.gradient"].to(weight) + ALIKE * alike


FIT = FitMetric(
    about="outputs weighed by the gradient of the model's loss",
    takes_gradients=True,
    moment=moment,
    gradient=gradient,
    takes_chains=False,
    allocation="loss",
    nats=0.5,  # the second-order term of the loss
    is_correctable=True,
    is_searched=True,
)
