"""Cells of tables."""

import pytest

from mpoe_convert.tables import listed_bonds, listed_ranks


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
