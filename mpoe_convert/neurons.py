"""The order of an FFN's hidden neurons, which changes nothing that the FFN computes.

Columns of up and gate and rows of down move together. A chain whose bonds are cut, though, loses less of
matrices in which neurons that look alike stand together: the first sites then tell groups of neurons apart,
the later ones the neurons of a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from .mpo import fit
from .planning import FFNPlan
from .recipe import Recipe
from .report import NeuronOrder

_POWER_ITERATIONS = 20


def choose_order(
    plan: FFNPlan, matrices: Mapping[str, Tensor], recipe: Recipe
) -> tuple[Tensor | None, NeuronOrder]:
    """The order by bisection if cutting the bonds then loses less than in the source's order, else None.

    Args:
        matrices: by role, (in, out), in a dtype that can be decomposed.

    Returns:
        The order (inner size,), new place -> old one, and both errors.
    """
    order = bisection(neuron_features(matrices))
    source, bisected = (_lost(plan, matrices, recipe, tried) for tried in (None, order))
    chosen = order if bisected < source else None
    return chosen, NeuronOrder(plan.ffn.path, source, bisected, chosen is not None)


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


def _lost(plan: FFNPlan, matrices: Mapping[str, Tensor], recipe: Recipe, order: Tensor | None) -> float:
    """Relative error of all matrices together, by TT-SVD."""
    decompose = partial(fit, svd=recipe.svd, seed=recipe.seed)
    lost = sum(
        sum(decompose(reordered(matrices[matrix.role], matrix.role, order), matrix.sites).discarded)
        for matrix in plan.matrices
    )
    norm = sum(float(matrix.norm()) ** 2 for matrix in matrices.values())
    return (lost / norm) ** 0.5 if norm else 0.0
