"""How many ranks every matrix keeps under one budget.

A matrix of n = min(in, out) possible ranks costs (in + out) numbers per rank, or in * out as a whole. What
keeping r of them loses is known from its spectrum. The losses are convex in r, so taking the step with the
largest gain per number first is optimal up to the last step; only the jump from a factored matrix to the
whole one is not convex, and is taken as one step from where it pays (the lower convex hull of all choices).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Candidate:
    """One matrix to be given ranks.

    Attributes:
        rank_cost: numbers per rank, all experts included.
        whole_cost: numbers of the matrix as it is.
        losses: (n + 1,) what keeping 0, 1 ... n ranks loses; descending to about 0.
    """

    name: str
    rank_cost: int
    whole_cost: int
    losses: np.ndarray

    @property
    def largest_rank(self) -> int:
        """The largest that is cheaper than the whole matrix; at least 1."""
        return max(min((self.whole_cost - 1) // self.rank_cost, len(self.losses) - 1), 1)

    def cost(self, rank: int | None) -> int:
        return self.whole_cost if rank is None else rank * self.rank_cost

    def loss(self, rank: int | None) -> float:
        return 0.0 if rank is None else float(self.losses[rank])

    def error(self, rank: int | None) -> float:
        """Square root of the part of everything that is lost; 0 for a matrix that computes nothing."""
        return float((self.loss(rank) / self.losses[0]) ** 0.5) if self.losses[0] > 0 else 0.0

    def smallest_within(self, error: float) -> int | None:
        """The smallest rank with no larger error; None: only the whole matrix has none."""
        fits = np.flatnonzero(self.losses[1 : self.largest_rank + 1] <= error**2 * self.losses[0])
        return int(fits[0]) + 1 if len(fits) else None


Ranks = dict[str, int | None]


def cost(candidates: Sequence[Candidate], ranks: Ranks) -> int:
    return sum(each.cost(ranks[each.name]) for each in candidates)


def smallest(candidates: Sequence[Candidate], max_error: float | None = None) -> Ranks:
    """The fewest ranks; with a limit, the fewest that keep every matrix's error within it."""
    if max_error is None:
        return {each.name: 1 for each in candidates}
    return {each.name: each.smallest_within(max_error) for each in candidates}


def uniform(candidates: Sequence[Candidate], budget: int, start: Ranks) -> Ranks:
    """The same share of every matrix's numbers, beginning with what `start` gives; None: all of them."""

    def ranks_at(share: float) -> Ranks:
        found = {}
        for each in candidates:
            rank = int(share * each.whole_cost / each.rank_cost)
            least = start[each.name]
            enough = least is None or share >= 1
            found[each.name] = None if enough else min(max(rank, least), each.largest_rank)
        return found

    if cost(candidates, ranks_at(1.0)) <= budget:
        return ranks_at(1.0)
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(candidates, ranks_at(middle)) <= budget else (low, middle)
    return ranks_at(low)


def greedy(candidates: Sequence[Candidate], budget: int, start: Ranks) -> Ranks:
    """The ranks that lose least in sum, beginning with what `start` gives.

    Steps along every matrix's lower convex hull are taken in the order of their gain per number. A matrix
    whose next step does not fit goes on rank by rank.
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
        each, after = by_name[name], steps[name][0]
        price = each.cost(after) - each.cost(ranks[name])
        if price <= left:
            ranks[name], left = after, left - price
            steps[name].popleft()
        elif after is None and ranks[name] < each.largest_rank:
            steps[name] = deque(range(ranks[name] + 1, each.largest_rank + 1))
        else:
            continue
        push(name)
    return ranks


def _hull(each: Candidate, start: int | None) -> deque[int | None]:
    """The choices behind `start` on the lower convex hull of what can be lost at which cost."""
    hull: list[int | None] = [start]
    for choice in [] if start is None else [*range(start + 1, each.largest_rank + 1), None]:
        while len(hull) > 1 and _slope(each, hull[-2], hull[-1]) < _slope(each, hull[-2], choice):
            hull.pop()
        hull.append(choice)
    return deque(hull[1:])


def _slope(each: Candidate, before: int | None, after: int | None) -> float:
    """Gain per number."""
    price = each.cost(after) - each.cost(before)
    return (each.loss(before) - each.loss(after)) / price if price else float("inf")
