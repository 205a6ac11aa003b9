"""The order of an FFN's hidden neurons, which changes nothing that the FFN computes.

Columns of up and gate and rows of down move together. A chain with truncated bonds, however, loses less of
matrices in which similar neurons are neighbours: the first sites then select a group of neurons, the later
ones a neuron of the group.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_POWER_ITERATIONS = 20


def reordered(matrix: Tensor, role: str, order: Tensor | None) -> Tensor:
    """A projection's matrix (in, out) or bias (out,) with its neurons in another order.

    Args:
        matrix: the matrix, or the bias.
        role: "gate", "up" or "down".
        order: (inner,), new place -> old one; None: as it is.
    """
    if order is None or (role == "down" and matrix.ndim == 1):
        return matrix
    order = order.to(matrix.device)
    return matrix[order].contiguous() if role == "down" else matrix[..., order].contiguous()


def neuron_features(matrices: Mapping[str, Tensor]) -> Tensor:
    """One row of features per neuron, (inner, features): its columns of gate and up and its row of down.

    Args:
        matrices: role -> (in, out).
    """
    return torch.cat([matrix if role == "down" else matrix.mT for role, matrix in matrices.items()], 1)


def bisection(features: Tensor) -> Tensor:
    """An order of the rows in which neighbours are similar: halve along the first principal component, recur.

    Args:
        features: (n, anything).

    Returns:
        (n,): new place -> old one.
    """
    order = torch.arange(len(features), device=features.device)
    if len(features) < 3:
        return order
    along = _first_component(features - features.mean(0)).argsort(stable=True)
    half = len(along) // 2
    parts = (along[:half], along[half:])
    return torch.cat([part[bisection(features[part])] for part in parts])


def _first_component(features: Tensor) -> Tensor:
    """Coordinates (n,) along the first principal component; power iteration from a fixed start."""
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(len(features), generator=generator).to(features)
    for _ in range(_POWER_ITERATIONS):
        found = features @ (features.mT @ found)
        found = found / found.norm().clamp(min=torch.finfo(found.dtype).tiny)
    return found
