"""Fewer hidden neurons in each expert of a mixture: chosen by ridge leverage, the second projection refitted.

With C = E[h h^T] of an expert's hidden neurons, score_i = [C (C + lambda I)^-1]_ii says how much of neuron i
the others cannot say for it. Of the neurons S that stay, W' = (C_SS)^-1 C_S: W gives the outputs nearest to
those of all: the least-squares fit (Nystrom). Columns of gate and up are dropped alike.

Source: ridge leverage scores: Alaoui, Mahoney, NeurIPS 2015 (arXiv 1411.0306).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpoe_convert.decomposition.stack_metric import solve
from mpoe_convert.decomposition.stacks import MULTIPLE

# lambda, relative to the mean eigenvalue of C.
RIDGE = 1.0


def leverage(moment: Tensor) -> Tensor:
    """(inner,) ridge leverage scores between 0 and 1, in float64, of a moment (inner, inner)."""
    moment = moment.double()
    level = float(moment.diagonal().mean()) * RIDGE
    if level <= 0:
        return torch.zeros_like(moment.diagonal())
    identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    # C (C + lambda I)^-1 = I - lambda (C + lambda I)^-1
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment + level * identity))
    return 1 - level * inverse.diagonal()


def kept_neurons(scores: Tensor, count: int) -> Tensor:
    """(count,) int64, ascending: the neurons with the highest scores (inner,)."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def widths_by_score(scores: Sequence[Tensor], total: int) -> list[int]:
    """How many neurons each stack keeps, of `total`: the ones with the highest scores of all.

    Widths are multiples of 8 where there are that many, and at least 8 or all.

    Args:
        scores: per expert, or per layer, the scores of its neurons.
        total: neurons that are kept altogether; a few more or less are, to make multiples.
    """
    every = torch.cat(list(scores))
    total = min(max(total, 0), len(every))
    if not total:
        return [min(MULTIPLE, len(part)) for part in scores]
    floor = every.sort(descending=True).values[total - 1]
    counts = [int((part >= floor).sum()) for part in scores]
    rounded = [round(count / MULTIPLE) * MULTIPLE for count in counts]
    return [min(max(width, MULTIPLE), len(part)) for width, part in zip(rounded, scores, strict=True)]


def refitted_down(down: Tensor, moment: Tensor, kept: Tensor) -> Tensor:
    """(kept, out): the second projection of the neurons that stay, in the dtype of `down`.

    Args:
        down: W, (inner, out).
        moment: C, (inner, inner).
        kept: their places.
    """
    moment = moment.to(down.device, torch.float64)
    rows = moment[kept]
    return solve(rows[:, kept], rows @ down.double()).to(down.dtype)
