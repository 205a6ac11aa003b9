"""Divide one budget of parameters among matrices: the rank that every matrix keeps.

A matrix of n = min(in, out) possible ranks costs (in + out) parameters per rank, or in * out as a whole. Its
spectrum says what keeping r ranks loses. The losses are convex in r, so taking the step with the largest gain
per parameter first is optimal up to the last step. Only the jump from a factored matrix to the whole one is
not convex; it is taken as one step from where it pays (the lower convex hull of all choices).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Candidate:
    """One matrix whose rank is chosen. In this module a rank of None is the whole matrix.

    Attributes:
        rank_cost: parameters per rank, all experts included.
        whole_cost: parameters of the whole matrix.
        losses: (n + 1,) loss with 0, 1 ... n ranks kept; descending to about 0.
    """

    name: str
    rank_cost: int
    whole_cost: int
    losses: np.ndarray

    @property
    def largest_rank(self) -> int:
        """The largest rank that costs less than the whole matrix; at least 1."""
        return max(min((self.whole_cost - 1) // self.rank_cost, len(self.losses) - 1), 1)

    def cost(self, rank: int | None) -> int:
        """Parameters."""
        return self.whole_cost if rank is None else rank * self.rank_cost

    def loss(self, rank: int | None) -> float:
        return 0.0 if rank is None else float(self.losses[rank])

    def error(self, rank: int | None) -> float:
        """Relative error: the square root of the lost fraction; 0 for a matrix that computes nothing."""
        return float((self.loss(rank) / self.losses[0]) ** 0.5) if self.losses[0] > 0 else 0.0

    def smallest_within(self, error: float) -> int | None:
        """The smallest rank whose error is at most `error`; None if only the whole matrix meets it."""
        fits = np.flatnonzero(self.losses[1 : self.largest_rank + 1] <= error**2 * self.losses[0])
        return int(fits[0]) + 1 if len(fits) else None


Ranks = dict[str, int | None]


def cost(candidates: Sequence[Candidate], ranks: Ranks) -> int:
    """Parameters of all matrices at these ranks."""
    return sum(each.cost(ranks[each.name]) for each in candidates)


def smallest(candidates: Sequence[Candidate], max_error: float | None = None) -> Ranks:
    """Rank 1 of every matrix; with `max_error`, the smallest rank whose error is at most that."""
    if max_error is None:
        return {each.name: 1 for each in candidates}
    return {each.name: each.smallest_within(max_error) for each in candidates}


def uniform(candidates: Sequence[Candidate], budget: int, start: Ranks) -> Ranks:
    """The same fraction of every matrix's parameters, at least the rank in `start`."""

    def rank_at(fraction: float, each: Candidate) -> int | None:
        least = start[each.name]
        if least is None or fraction >= 1:
            return None
        return min(max(int(fraction * each.whole_cost / each.rank_cost), least), each.largest_rank)

    def ranks_at(fraction: float) -> Ranks:
        return {each.name: rank_at(fraction, each) for each in candidates}

    if cost(candidates, ranks_at(1.0)) <= budget:
        return ranks_at(1.0)
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(candidates, ranks_at(middle)) <= budget else (low, middle)
    return ranks_at(low)


def greedy(candidates: Sequence[Candidate], budget: int, start: Ranks) -> Ranks:
    """The ranks with the smallest sum of losses, at least those in `start`.

    Steps along every matrix's lower convex hull are taken in the order of their gain per parameter. A matrix
    whose jump to the whole one does not fit goes on rank by rank.
    """
    ranks, left = dict(start), budget - cost(candidates, start)
    steps = {each.name: _hull(each, start[each.name]) for each in candidates}
    by_name = {each.name: each for each in candidates}
    heap: list[tuple[float, str]] = []

    def push(name: str) -> None:
        if steps[name]:
            heapq.heappush(heap, (-_slope(by_name[name], ranks[name], steps[name][0]), name))

    for name in steps:
        push(name)
    while heap:
        name = heapq.heappop(heap)[1]
        each, before, after = by_name[name], ranks[name], steps[name][0]
        price = each.cost(after) - each.cost(before)
        if price <= left:
            ranks[name], left = after, left - price
            steps[name].popleft()
        elif after is None and before is not None and before < each.largest_rank:
            steps[name] = deque(range(before + 1, each.largest_rank + 1))
        else:
            continue
        push(name)
    return ranks


def _hull(each: Candidate, start: int | None) -> deque[int | None]:
    """The ranks above `start` on the lower convex hull of (cost, loss)."""
    hull: list[int | None] = [start]
    for choice in [] if start is None else [*range(start + 1, each.largest_rank + 1), None]:
        while len(hull) > 1 and _slope(each, hull[-2], hull[-1]) < _slope(each, hull[-2], choice):
            hull.pop()
        hull.append(choice)
    return deque(hull[1:])


def _slope(each: Candidate, before: int | None, after: int | None) -> float:
    """Gain per parameter."""
    price = each.cost(after) - each.cost(before)
    return (each.loss(before) - each.loss(after)) / price if price else float("inf")
