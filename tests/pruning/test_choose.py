"""Which experts stay: those with the highest scores, as many of every pool."""

import pytest
import torch

from mpoe_convert.pruning.choose import choose, pools


def test_the_highest_scores_stay_in_every_pool():
    up, down = torch.arange(6.0), -torch.arange(6.0)
    assert choose(down, 4, pools(6, 1, 1)) == (0, 1, 2, 3)
    assert choose(up, 4, pools(6, 1, 1)) == (2, 3, 4, 5)
    assert choose(down, 4, pools(6, 2, 1)) == (0, 1, 3, 4)  # two groups of neighbours
    assert choose(up, 2, pools(6, 1, 2)) == (4, 5)  # expert e holds part e mod 2


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_an_expert_holds_the_part_that_its_number_says(parts):
    scores = torch.rand(12, generator=torch.Generator().manual_seed(parts))
    kept = choose(scores, 2 * parts, pools(12, 1, parts))
    assert [expert % parts for expert in kept] == [place % parts for place in range(2 * parts)]
    for part in range(parts):
        ranked = sorted(range(part, 12, parts), key=lambda expert: -scores[expert])
        assert {expert for expert in kept if expert % parts == part} == {*ranked[:2]}
