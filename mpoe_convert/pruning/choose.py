"""Which experts of a mixture stay."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..compression.kept_experts import kept_experts


def pools(num_experts: int, groups: int, parts: int) -> list[list[int]]:
    """Lists of experts that each have to keep as many.

    Args:
        groups: of neighbours, among which stock routers choose first; 1: none.
        parts: P, where expert e holds part e mod P of an FFN's neurons; 1: every expert is a whole FFN.
    """
    if parts > 1:
        return [list(range(part, num_experts, parts)) for part in range(parts)]
    size = num_experts // groups
    return [list(range(start, start + size)) for start in range(0, num_experts, size)]


def choose(scores: Tensor, count: int, pools: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The experts of a layer with the highest scores, in the order of the smaller layer's.

    Args:
        scores: (E,).
        count: how many stay.
        pools: see there; each keeps as many.
    """
    kept = [
        [pool[place] for place in kept_experts(scores[list(pool)], count // len(pools))] for pool in pools
    ]
    if len(pools) > 1 and pools[1][0] == pools[0][0] + 1:  # parts: expert e has to hold part e mod P
        return tuple(expert for copy in zip(*kept, strict=True) for expert in copy)
    return tuple(expert for own in kept for expert in own)
