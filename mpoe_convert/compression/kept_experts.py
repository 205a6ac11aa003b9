"""Which experts of a mixture stay: those with the highest scores on calibration text (REAP).

A score is the mean of what an expert adds to the tokens that are routed to it, see `ExpertScores.scores`.
"""

from __future__ import annotations

from torch import Tensor

from ..planning.fewer_experts import LayerExperts


def kept_experts(scores: Tensor, count: int, groups: int = 1) -> tuple[int, ...]:
    """The experts with the highest scores, ascending; of equal ones the first.

    Args:
        scores: (E,).
        count: how many stay.
        groups: of neighbouring experts, that each keep as many: routers choose among groups first.
    """
    size = len(scores) // groups
    kept = []
    for group, own in enumerate(scores.split(size)):
        order = own.argsort(descending=True, stable=True)[: count // groups]
        kept += [group * size + place for place in order.tolist()]
    return tuple(sorted(kept))


def scored_layer(path: str, scores: Tensor, tokens: Tensor, count: int, groups: int) -> LayerExperts:
    """What stays of a layer.

    Args:
        scores, tokens: (E,), see `ExpertScores`.
        count, groups: as for `kept_experts`.
    """
    shares = tokens.double() / max(int(tokens.sum()), 1)
    kept = kept_experts(scores, count, groups)
    return LayerExperts(path, kept, tuple(scores.tolist()), tuple(shares.tolist()))
