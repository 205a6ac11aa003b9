"""Which experts of a mixture stay, on cases worked out by hand."""

import pytest
import torch

from mpoe_convert.compression.kept_experts import kept_experts, scored_layer


def test_the_highest_scores_stay():
    scores = torch.tensor([0.5, 0.1, 0.9, 0.1, 0.7])
    assert kept_experts(scores, 3) == (0, 2, 4)
    assert kept_experts(scores, 4) == (0, 1, 2, 4)  # of equal ones the first
    assert kept_experts(scores, 5) == (0, 1, 2, 3, 4)


def test_every_group_keeps_as_many():
    scores = torch.tensor([9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, 4.0])
    assert kept_experts(scores, 4, groups=2) == (0, 1, 6, 7)
    assert kept_experts(scores, 4) == (0, 1, 2, 3)


def test_what_is_told_of_a_layer():
    layer = scored_layer("layers.0", torch.tensor([2.0, 1.0, 3.0]), torch.tensor([6, 1, 3]), 2, 1)
    assert (layer.kept, layer.dropped) == ((0, 2), (1,)) and layer.shares == pytest.approx((0.6, 0.1, 0.3))
    assert layer.row() == {
        "layer": "layers.0",
        "left out": "1",
        "their share of choices": "10.00%",
        "highest score of them": "1",
        "lowest score that stays": "2",
    }
