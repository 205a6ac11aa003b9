"""The order of an FFN's hidden neurons, which changes nothing that the FFN computes.

Columns of up and gate and rows of down move together. A chain whose bonds are cut, though, loses less of
matrices in which neurons that look alike stand together: the first sites then tell groups of neurons apart,
the later ones the neurons of a group.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_POWER_ITERATIONS = 20


def reordered(matrix: Tensor, role: str, order: Tensor | None) -> Tensor:
    """A matrix (in, out), or the bias (out,), of that role with its neurons in that order."""
    if order is None or (role == "down" and matrix.ndim == 1):
        return matrix
    order = order.to(matrix.device)
    return matrix[order].contiguous() if role == "down" else matrix[..., order].contiguous()


def neuron_features(matrices: Mapping[str, Tensor]) -> Tensor:
    """What makes a neuron: its column of every first matrix and its row of the second, (inner, features)."""
    return torch.cat([matrix if role == "down" else matrix.mT for role, matrix in matrices.items()], 1)


def bisection(features: Tensor) -> Tensor:
    """Rows in an order in which neighbours are alike: halves along the first principal component, and so on.

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
    """Coordinates (n,) along the direction in which rows differ most; power iteration from a fixed start."""
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(len(features), generator=generator).to(features)
    for _ in range(_POWER_ITERATIONS):
        found = features @ (features.mT @ found)
        found = found / found.norm().clamp(min=torch.finfo(found.dtype).tiny)
    return found
