"""Costs: what a call of a mixture amounts to, counted in operations and in bytes."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple


def mean(numbers: Sequence[int]) -> float:
    """As a whole number, if it is one."""
    total = sum(numbers)
    return total / len(numbers) if total % len(numbers) else total // len(numbers)


class Work(NamedTuple):
    """A call of a mixture, as far as its cost depends on it; all may be expected values."""

    tokens: float  # T
    rows: float  # N, one per choice
    experts: float  # that some choice fell on


class Cost(NamedTuple):
    """What a part takes for a `Work`."""

    flops: float  # of products of rows with weights, 2 per multiply-add
    rebuild_flops: float  # of contracting the experts' matrices
    nbytes: float  # of weights read; a matrix that is built is written and read once

    @classmethod
    def total(cls, costs: Iterable["Cost"]) -> "Cost":
        """The sum."""
        return cls(*map(sum, zip(*costs, strict=True)))
