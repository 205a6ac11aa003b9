"""Cells of tables."""

import pytest

from mpoe_convert.tables import duration, listed_bonds, listed_ranks, size


@pytest.mark.parametrize(
    ("ranks", "by_expert", "cell"),
    [
        ((), False, None),
        ((12,), False, "12"),
        ((12,), True, "12"),
        ((12, 64), False, "12,64"),
        ((64, 12), True, "12 to 64"),
        ((5, 1, 64), True, "1 to 64"),
    ],
)
def test_ranks_of_experts_are_a_range(ranks, by_expert, cell):
    assert listed_ranks(ranks, by_expert) == cell


def test_bonds_are_listed_by_expert_as_long_as_they_are_few():
    bonds = [[3], [1], [12]]
    assert listed_bonds({"bonds": [12], "by_expert": {"bonds": bonds}}) == "3/1/12"
    assert listed_bonds({"bonds": [12], "by_expert": {"bonds": bonds * 3}}) == "1 to 12"
    assert listed_bonds({"bonds": [8, 12], "by_expert": {"bonds": [[8, 12]] * 9}}) == "/".join(["8,12"] * 9)
    assert listed_bonds({"bonds": [12]}) == "12"


def test_sizes_are_rounded_before_their_unit_is_chosen():
    shown = [size(number) for number in (999, 1000, 999_949, 999_950, 999_950_000)]
    assert shown == ["999 B", "1.0 kB", "999.9 kB", "1.0 MB", "1.0 GB"]


def test_durations_are_rounded_before_their_unit_is_chosen():
    shown = [duration(seconds) for seconds in (7.25, 59.94, 59.96, 75, 3599.4, 3599.6)]
    assert shown == ["7.2 s", "59.9 s", "1 min 0 s", "1 min 15 s", "59 min 59 s", "1 h 0 min"]
