"""Which cases of a long list are run every time."""

from collections.abc import Callable, Iterable

import pytest


def quick(cases: Iterable, is_quick: Callable[..., bool]) -> list:
    """The cases as parameters of a test; those that are not `is_quick(*case)` are slow tests."""
    parameters = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        marks = () if is_quick(*values) else pytest.mark.slow
        parameters.append(pytest.param(*values, marks=marks))
    return parameters


def every(number: int, cases: Iterable) -> list:
    """Every n-th case, and the others as slow tests."""
    numbered = {case: place for place, case in enumerate(cases)}
    return quick(numbered, lambda *case: numbered[case if len(case) > 1 else case[0]] % number == 0)
