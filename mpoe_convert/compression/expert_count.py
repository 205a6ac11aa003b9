"""Fewer experts: which to drop (REAP), and which to merge (HC-SMoE).

Sources: REAP, arXiv 2510.13999: saliency S_j, the mean of g_j norm(f_j) over the tokens routed to j, is in
`ExpertMoments.scores`. HC-SMoE, arXiv 2410.08589: average linkage on the experts' mean outputs, members
weighed by how often they are chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .expert_moments import expert_outputs, hidden_neurons


def prune_order(scores: Tensor) -> list[int]:
    """Experts from the first to drop to the last, by rising score (E,); of equal ones the later first."""
    order = scores.double().flip(0).argsort(stable=True)
    return (len(scores) - 1 - order).tolist()


def kept_experts(scores: Tensor, count: int, num_groups: int = 1) -> list[int]:
    """The experts that stay, ascending: those with the highest scores, as many in every group of a router.

    Args:
        scores: (E,).
        count: of experts that stay.
        num_groups: equal runs of experts that are routed to by groups.

    Raises:
        ValueError: `count` is not between the number of groups and E, or is no multiple of it.
    """
    if not num_groups <= count <= len(scores) or count % num_groups or len(scores) % num_groups:
        raise ValueError(
            f"{count} of {len(scores)} experts cannot stay in {num_groups} equal groups: use a multiple of "
            f"{num_groups} up to {len(scores)}"
        )
    size = len(scores) // num_groups
    kept = []
    for group in range(num_groups):
        order = prune_order(scores[group * size : (group + 1) * size])
        kept += [group * size + expert for expert in order[size - count // num_groups :]]
    return sorted(kept)


@torch.no_grad()
def mean_outputs(module: Any, rows: Tensor) -> Tensor:
    """(E, out) float64: every expert's mean answer to the same rows (N, in)."""
    answers = (
        expert_outputs(module, expert, hidden_neurons(module, expert, rows))
        for expert in range(len(module.down_proj))
    )
    return torch.stack([answer.double().mean(0) for answer in answers])


def clusters(features: Tensor, count: int) -> list[list[int]]:
    """`count` groups of experts with like features (E, n): average linkage on Euclidean distances.

    The two groups whose members lie nearest on average are joined until `count` are left; the groups, and the
    members of each, in ascending order.
    """
    distances = torch.cdist(features.double(), features.double())
    groups = [[expert] for expert in range(len(features))]
    while len(groups) > max(count, 1):
        pairs = [(a, b) for b in range(len(groups)) for a in range(b)]
        a, b = min(pairs, key=lambda pair: float(distances[groups[pair[0]]][:, groups[pair[1]]].mean()))
        groups[a] = sorted(groups[a] + groups.pop(b))
    return sorted(groups)


def merged(stack: Tensor, groups: Sequence[Sequence[int]], tokens: Tensor) -> Tensor:
    """(groups, ...): the mean of every group's members in a stack (E, ...), weighed by their tokens (E,)."""
    means = []
    for group in groups:
        shares = tokens[list(group)].double()
        shares = shares / shares.sum() if shares.any() else torch.full_like(shares, 1 / len(group))
        members = stack[list(group)].double()
        means.append(torch.tensordot(shares.to(members.device), members, dims=1))
    return torch.stack(means).to(stack.dtype)
