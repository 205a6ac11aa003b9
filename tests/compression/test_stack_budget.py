"""Forms and ranks of several stacks under one budget, against all possible choices."""

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from mpoe_convert.compression.stack_budget import StackCandidate, shared_out, uniform
from mpoe_convert.decomposition.stack_choices import Choice

SETTINGS = settings(deadline=None, derandomize=True, max_examples=150)


@st.composite
def stacks(draw):
    found = []
    for number in range(draw(st.integers(1, 3))):
        count = draw(st.integers(1, 5))
        sizes = sorted(draw(st.sets(st.integers(1, 40), min_size=count, max_size=count)))
        losses = sorted(draw(st.sets(st.integers(0, 50), min_size=count, max_size=count)), reverse=True)
        choices = [Choice(sizes[k], float(losses[k]), "none", (k,)) for k in range(count)]
        unit = draw(st.sampled_from([0.5, 1.0, 3.0]))
        found.append(StackCandidate(f"m{number}", sizes[-1], tuple(choices), unit))
    return found


def totals(candidates, chosen):
    """(numbers, loss)"""
    pairs = [(each, chosen[each.name]) for each in candidates]
    return sum(c.numbers for _, c in pairs), sum(each.unit * c.lost for each, c in pairs)


@SETTINGS
@given(stacks(), st.floats(0.0, 1.0))
def test_the_budget_is_kept_and_nearly_the_best_is_found(candidates, keep):
    budget = int(keep * sum(each.whole for each in candidates))
    least = sum(each.choices[0].numbers for each in candidates)
    numbers, loss = totals(candidates, shared_out(candidates, keep))
    assert numbers <= max(budget, least)
    every = [
        totals(candidates, {each.name: c for each, c in zip(candidates, chosen, strict=True)})
        for chosen in product(*(each.choices for each in candidates))
    ]
    # Steps of the hull are optimal for every budget that they use up; the largest step may not fit.
    slack = max(each.choices[-1].numbers - each.choices[0].numbers for each in candidates)
    best = min(lost for size, lost in every if size <= max(budget - slack, least))
    assert loss <= best + 1e-9


@SETTINGS
@given(stacks(), st.floats(0.0, 1.0))
def test_never_worse_than_the_same_share_of_each(candidates, keep):
    alike = uniform(candidates, keep)
    for each in candidates:
        within = [choice for choice in each.choices if choice.numbers <= keep * each.whole]
        assert alike[each.name] == (min(within, key=lambda c: c.lost) if within else each.choices[0])
    if totals(candidates, alike)[0] <= keep * sum(each.whole for each in candidates):
        assert totals(candidates, shared_out(candidates, keep))[1] <= totals(candidates, alike)[1]


def test_what_costs_more_loss_gets_more_numbers():
    choices = tuple(Choice(10 * k, 100 / 4**k, "none", (k,)) for k in range(1, 6))
    pair = [StackCandidate("dear", 50, choices, 100.0), StackCandidate("cheap", 50, choices, 1.0)]
    found = shared_out(pair, 0.6)
    assert {name: choice.numbers for name, choice in found.items()} == {"dear": 50, "cheap": 10}
    assert {choice.numbers for choice in uniform(pair, 0.6).values()} == {30}


def test_everything_is_kept():
    whole = Choice(100, 0.0, "whole", ())
    pair = [StackCandidate(name, 100, (Choice(40, 1e-12, "input", (4,)), whole), 1.0) for name in "ab"]
    assert shared_out(pair, 1.0) == uniform(pair, 1.0) == dict.fromkeys("ab", whole)
