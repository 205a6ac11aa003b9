"""Ranks under a budget, against all possible choices."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpoe_convert.compression.allocation import Candidate, cost, greedy, smallest, uniform

SETTINGS = settings(deadline=None, derandomize=True, max_examples=80)


@st.composite
def matrices(draw):
    found = []
    for number in range(draw(st.integers(1, 3))):
        rows, cols = draw(st.integers(3, 7)), draw(st.integers(3, 7))
        values = sorted(
            draw(st.lists(st.integers(0, 50), min_size=min(rows, cols), max_size=min(rows, cols)))
        )
        losses = np.append(np.cumsum(values)[::-1], 0.0) / max(sum(values), 1)
        found.append(Candidate(f"m{number}", rows + cols, rows * cols, losses))
    return found


def loss(candidates, ranks) -> float:
    return sum(each.loss(ranks[each.name]) for each in candidates)


def choices(candidates):
    for ranks in product(*([*range(1, each.largest_rank + 1), None] for each in candidates)):
        yield {each.name: rank for each, rank in zip(candidates, ranks, strict=True)}


@SETTINGS
@given(matrices(), st.floats(0.0, 1.2))
def test_greedy_is_within_one_step_of_the_best_choice(candidates, share):
    start = smallest(candidates)
    budget = max(int(share * sum(each.whole_cost for each in candidates)), cost(candidates, start))
    ranks = greedy(candidates, budget, start)
    assert cost(candidates, ranks) <= budget
    # The steps on the hull are optimal for every budget that they use up; one more matrix as a whole is the
    # most that the best choice can be ahead.
    slack = max(each.whole_cost for each in candidates)
    best = min(
        loss(candidates, r)
        for r in choices(candidates)
        if cost(candidates, r) <= budget - slack or r == start
    )
    assert loss(candidates, ranks) <= best + 1e-12


@SETTINGS
@given(matrices(), st.floats(0.0, 1.2))
@pytest.mark.parametrize("allocate", [greedy, uniform])
def test_what_the_start_gives_is_kept(allocate, candidates, share):
    start = smallest(candidates, 0.3)
    for each in candidates:
        rank = start[each.name]
        assert each.error(rank) <= 0.3
        assert rank is None or rank == 1 or each.error(rank - 1) > 0.3
    budget = max(int(share * sum(each.whole_cost for each in candidates)), cost(candidates, start))
    ranks = allocate(candidates, budget, start)
    assert cost(candidates, ranks) <= budget
    for each in candidates:
        assert each.error(ranks[each.name]) <= 0.3
        assert ranks[each.name] is None or ranks[each.name] <= each.largest_rank


def test_greedy_prefers_the_matrix_whose_ranks_are_worth_more():
    flat = Candidate("flat", 20, 100, np.linspace(1, 0, 11))
    steep = Candidate("steep", 20, 100, np.array([1, 0.1, 0.05, 0.01, 0.005, *np.linspace(0.001, 0, 6)]))
    ranks = greedy([flat, steep], 100, {"flat": 1, "steep": 1})
    assert ranks == {"flat": 4, "steep": 1}


def test_a_matrix_that_is_nearly_paid_for_is_kept_whole():
    """Nine ranks of a 10 x 100 matrix cost 990 of 1,000 numbers: ten more make it exact."""
    matrix = Candidate("m", 110, 1000, np.linspace(1, 0, 11))
    assert greedy([matrix], 1000, {"m": 1}) == {"m": None}
    assert greedy([matrix], 999, {"m": 1}) == {"m": 9}
    assert uniform([matrix], 1000, {"m": 1}) == {"m": None}


def test_uniform_gives_every_matrix_the_same_share():
    candidates = [Candidate(str(n), n + 100, n * 100, np.linspace(1, 0, n + 1)) for n in (50, 80, 100)]
    budget = sum(each.whole_cost for each in candidates) // 2
    ranks = uniform(candidates, budget, smallest(candidates))
    shares = [each.cost(ranks[each.name]) / each.whole_cost for each in candidates]
    assert max(shares) - min(shares) < 0.04
    assert 0.47 < cost(candidates, ranks) / sum(each.whole_cost for each in candidates) <= 0.5


def test_a_whole_matrix_may_pay_more_than_ranks_of_two():
    """Ten ranks of 110 numbers are 100 numbers dearer than the whole: one whole, one poor, not two halves."""
    pair = [Candidate(name, 110, 1000, np.linspace(1, 0, 11)) for name in "ab"]
    ranks = greedy(pair, 1110, {"a": 1, "b": 1})
    assert sorted(ranks.values(), key=str) == [1, None]
