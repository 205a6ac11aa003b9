"""Divide one budget of parameters among matrices: the rank that every matrix keeps, or its form and ranks.

A matrix of n = min(in, out) possible ranks costs (in + out) parameters per rank, or in * out as a whole. Its
spectrum says what keeping r ranks loses. The losses are convex in r, so taking the step with the largest gain
per parameter first is optimal up to the last step. The jump from a factored matrix to the whole one is not
convex, nor is that from one form of a stack of matrices to another; it is taken as one step from where it
pays (the lower convex hull of all choices).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

C = TypeVar("C")


class Allocatable(Protocol[C]):
    """What parts of a budget can be given to: it has choices of the type C."""

    @property
    def name(self) -> str: ...

    def cost(self, choice: C, /) -> int:
        """Parameters."""
        ...

    def loss(self, choice: C, /) -> float:
        """What the choice loses, in one unit for all that share the budget."""
        ...

    def above(self, choice: C, /) -> Iterable[C]:
        """The choices that cost more, in the order of their cost."""
        ...


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

    def above(self, rank: int | None) -> list[int | None]:
        return [] if rank is None else [*range(rank + 1, self.largest_rank + 1), None]

    def error(self, rank: int | None) -> float:
        """Relative error: the square root of the lost fraction; 0 for a matrix that computes nothing."""
        return float((self.loss(rank) / self.losses[0]) ** 0.5) if self.losses[0] > 0 else 0.0

    def smallest_within(self, error: float) -> int | None:
        """The smallest rank whose error is at most `error`; None if only the whole matrix meets it."""
        fits = np.flatnonzero(self.losses[1 : self.largest_rank + 1] <= error**2 * self.losses[0])
        return int(fits[0]) + 1 if len(fits) else None


Ranks = dict[str, int | None]


def cost(candidates: Sequence[Allocatable[C]], chosen: Mapping[str, C]) -> int:
    """Parameters of all matrices with these choices."""
    return sum(each.cost(chosen[each.name]) for each in candidates)


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


def greedy(candidates: Sequence[Allocatable[C]], budget: int, start: Mapping[str, C]) -> dict[str, C]:
    """The choices with the smallest sum of losses, at least those in `start`.

    Steps along every matrix's lower convex hull are taken in the order of their gain per parameter. Where a
    step does not fit any more, the hull of what still fits takes its place.
    """
    chosen, left = dict(start), budget - cost(candidates, start)
    by_name = {each.name: each for each in candidates}
    steps = {each.name: _hull(each, start[each.name], left) for each in candidates}
    heap: list[tuple[float, str]] = []

    def push(name: str) -> None:
        if steps[name]:
            heapq.heappush(heap, (-_slope(by_name[name], chosen[name], steps[name][0]), name))

    for name in steps:
        push(name)
    while heap:
        name = heapq.heappop(heap)[1]
        each, step = by_name[name], steps[name][0]
        price = each.cost(step) - each.cost(chosen[name])
        if price <= left:
            chosen[name], left = steps[name].popleft(), left - price
        else:
            steps[name] = _hull(each, chosen[name], left)
        push(name)
    return chosen


def _hull(each: Allocatable[C], start: C, left: int) -> deque[C]:
    """The choices on the lower convex hull of (cost, loss) that cost at most `left` more than `start`."""
    hull, most = [start], each.cost(start) + left
    for choice in each.above(start):
        if each.cost(choice) > most:
            break
        while len(hull) > 1 and _slope(each, hull[-2], hull[-1]) < _slope(each, hull[-2], choice):
            hull.pop()
        hull.append(choice)
    return deque(hull[1:])


def _slope(each: Allocatable[Any], before: Any, after: Any) -> float:
    """Gain per parameter."""
    price = each.cost(after) - each.cost(before)
    return (each.loss(before) - each.loss(after)) / price if price else float("inf")
