"""Experts to drop or to merge."""

import numpy as np
import pytest
import torch
from helpers.stock_mixtures import make_model, run_alone

from mpoe_convert.compression.expert_count import clusters, kept_experts, mean_outputs, merged, prune_order


def test_the_lowest_scores_go_first():
    scores = torch.tensor([0.5, 0.1, 0.9, 0.1, 0.7])
    assert prune_order(scores) == [3, 1, 0, 4, 2]
    assert kept_experts(scores, 3) == [0, 2, 4]
    assert kept_experts(scores, 5) == [0, 1, 2, 3, 4]


def test_groups_lose_as_many_each():
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.1, 0.2, 0.3, 0.4])
    assert kept_experts(scores, 4) == [0, 1, 2, 3]
    assert kept_experts(scores, 4, num_groups=2) == [0, 1, 6, 7]
    with pytest.raises(ValueError, match="3 of 8 experts cannot stay in 2 equal groups: use a multiple of 2"):
        kept_experts(scores, 3, num_groups=2)
    with pytest.raises(ValueError, match="9 of 8 experts cannot stay"):
        kept_experts(scores, 9)


def test_mean_outputs_are_the_stock_module_s():
    module = make_model("mixtral").model.layers[0].mlp.experts
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(2))
    expected = torch.stack([run_alone(module, expert, x).double().mean(0) for expert in range(4)])
    torch.testing.assert_close(mean_outputs(module, x), expected, rtol=1e-5, atol=1e-6)


def test_clusters_join_what_is_near():
    """By hand: 0 and 1 join, then 3 and 4, then 2 joins the pair whose members are nearer on average."""
    features = torch.tensor([[0.0], [1.0], [3.6], [7.0], [8.1]])
    assert clusters(features, 5) == [[0], [1], [2], [3], [4]]
    assert clusters(features, 4) == [[0, 1], [2], [3], [4]]
    assert clusters(features, 3) == [[0, 1], [2], [3, 4]]
    assert clusters(features, 2) == [[0, 1, 2], [3, 4]]
    assert clusters(features, 1) == [[0, 1, 2, 3, 4]]


def test_members_are_weighed_by_their_tokens():
    stack = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
    found = merged(stack, [[0, 2], [1], [3]], torch.tensor([3, 0, 1, 5]))
    expected = np.average(stack[[0, 2]].numpy(), axis=0, weights=[3, 1])
    np.testing.assert_allclose(found[0], expected, rtol=1e-6)
    torch.testing.assert_close(found[1:], stack[[1, 3]])
    torch.testing.assert_close(merged(stack, [[0, 1]], torch.zeros(4))[0], stack[:2].mean(0))
