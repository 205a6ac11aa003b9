"""Partitions of an FFN's hidden neurons, equally many and similar ones in every part; and their routers.

Routers of parts say which contribute most for a token (MoEfication, arXiv 2110.01786).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .neuron_order import bisection
from .stack_metric import solve

# Rounds of k-means; it ends earlier where no neuron changes its part.
ROUNDS = 20
# What a fit adds to the moment of the inputs, relative to the mean of its diagonal.
RIDGE = 0.01


def clusters(features: Tensor, parts: int) -> Tensor:
    """Balanced k-means from the parts of a bisection.

    MoEfication, arXiv 2110.01786, section 3.2, with parameter clustering; the balanced assignment is one of
    our own: a part that more neurons want than it has room for takes those nearest to its centre.

    Args:
        features: (n, anything), a row per neuron; n is a multiple of `parts`.

    Returns:
        (parts, n / parts): the numbers of each part's neurons, ascending.
    """
    size = len(features) // parts
    labels = torch.empty(len(features), dtype=torch.int64, device=features.device)
    labels[bisection(features)] = torch.arange(len(features), device=features.device) // size
    for _ in range(ROUNDS):
        centres = F.one_hot(labels, parts).to(features).mT @ features / size
        new = _assign(torch.cdist(features, centres), size)
        if torch.equal(new, labels):
            break
        labels = new
    return labels.argsort(stable=True).reshape(parts, size)


def _assign(distances: Tensor, size: int) -> Tensor:
    """(n,) the part of every neuron, `size` neurons each; distances (n, parts)."""
    labels = torch.full((len(distances),), -1, device=distances.device)
    room = torch.full((distances.shape[1],), size, device=distances.device)
    while (free := (labels < 0).nonzero().squeeze(-1)).numel():
        nearest, wanted = distances[free].masked_fill(room == 0, torch.inf).min(-1)
        order = nearest.argsort(stable=True)
        order = order[wanted[order].argsort(stable=True)]  # by part, the nearest neuron first
        parts = wanted[order]
        place = torch.arange(len(parts), device=parts.device) - torch.searchsorted(parts, parts)
        taken = place < room[parts]
        labels[free[order[taken]]] = parts[taken]
        room -= torch.bincount(parts[taken], minlength=len(room))
    return labels


def centroids(columns: Tensor, parts: Tensor) -> Tensor:
    """(parts, in) a router's rows: the means of the neurons' columns (inner, in) of gate or up.

    A logit is then the mean of what enters the activations of a part (MoEfication's faster form).
    """
    return columns[parts].mean(1)


def fitted_rows(inputs: Tensor, sizes: Tensor) -> Tensor:
    """(parts, in) a router's rows: ridge regression of sizes (tokens, parts) on inputs (tokens, in)."""
    moment, target = inputs.mT @ inputs, inputs.mT @ sizes
    level = RIDGE * moment.diagonal().mean()
    identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return solve(moment + level * identity, target).mT.to(inputs)


def contributions(inner: Tensor, down: Tensor, parts: Tensor) -> Tensor:
    """(tokens, parts) the norms of what each part adds to the output.

    Args:
        inner: (tokens, inner), hidden neurons behind the activation.
        down: (inner, out).
        parts: (parts, n).
    """
    return torch.stack([(inner[:, own] @ down[own]).norm(dim=1) for own in parts], 1)


def lost(left_out: Tensor, inner: Tensor, down: Tensor, parts: Tensor) -> float:
    """The squared norm of what the parts that are not chosen would have added, on these tokens.

    Args:
        left_out: (tokens, parts), one for a part that is not chosen, else zero. The others as for
            `contributions`.
    """
    masked = torch.zeros_like(inner)
    masked[:, parts.flatten()] = inner[:, parts.flatten()] * left_out.repeat_interleave(parts.shape[1], 1)
    return float((masked @ down).square().sum())
