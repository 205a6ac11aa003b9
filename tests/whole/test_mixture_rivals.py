"""Published ways to compress a mixture, as the benchmark has them, on cases worked out here."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.stock_mixtures import make_model, run_alone
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter


def load_rivals():
    path = Path(__file__).parents[2] / "examples/benchmarks/mixture_rivals.py"
    spec = importlib.util.spec_from_file_location("mixture_rivals", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rivals = load_rivals()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def experts():
    return make_model("mixtral").model.layers[0].mlp.experts


def test_reap_weighs_answers_by_their_combine_weights(experts):
    x = randn(6, 16, seed=2).float()
    chosen = torch.tensor([[0, 1], [0, 2], [1, 0], [2, 0], [0, 1], [2, 1]])
    weights = randn(6, 2, seed=3).float().abs()
    with torch.no_grad():
        found = rivals.saliencies(experts, x, chosen, weights)
    for expert in range(3):
        answers = run_alone(experts, expert, x).norm(dim=1).numpy()
        places = (chosen == expert).nonzero().tolist()
        terms = [float(weights[token, k]) * answers[token] for token, k in places]
        assert float(found[expert]) == pytest.approx(np.mean(terms), rel=1e-5)
    assert found[3] == 0


def test_reap_drops_the_lowest_scores():
    scores = torch.tensor([0.5, 0.1, 0.9, 0.1, 0.7])
    assert rivals.dropped_experts(scores, 3) == [1, 3]
    assert rivals.dropped_experts(scores, 4) == [3]
    assert rivals.dropped_experts(scores, 5) == []


def test_dropped_experts_are_routed_to_as_if_their_rows_were_cut():
    config = SimpleNamespace(num_experts_per_tok=2, num_experts=5, norm_topk_prob=True, hidden_size=8)
    router, x, kept = Qwen3MoeTopKRouter(config), randn(20, 8).float(), [0, 2, 4]
    router.weight.data = randn(5, 8, seed=1).float()
    router.register_forward_hook(rivals.without([1, 3], 2))
    small = Qwen3MoeTopKRouter(SimpleNamespace(**vars(config) | {"num_experts": 3}))
    small.weight.data = router.weight.data[kept]
    _, weights, index = router(x)
    _, expected, places = small(x)
    assert torch.equal(index, torch.tensor(kept)[places])
    torch.testing.assert_close(weights, expected)


def test_mean_answers_are_the_stock_module_s(experts):
    x = randn(9, 16, seed=2).float()
    expected = torch.stack([run_alone(experts, expert, x).double().mean(0) for expert in range(4)])
    with torch.no_grad():
        torch.testing.assert_close(rivals.mean_outputs(experts, x), expected, rtol=1e-5, atol=1e-6)


def test_clusters_join_what_is_near():
    """By hand: 0 and 1 join, then 3 and 4, then 2 joins the pair whose members are nearer on average."""
    features = torch.tensor([[0.0], [1.0], [3.6], [7.0], [8.1]])
    assert rivals.clusters(features, 4) == [[0, 1], [2], [3], [4]]
    assert rivals.clusters(features, 3) == [[0, 1], [2], [3, 4]]
    assert rivals.clusters(features, 2) == [[0, 1, 2], [3, 4]]


def test_members_are_weighed_by_their_tokens():
    stack = randn(4, 3, 2)
    found = rivals.merged(stack, [[0, 2], [1], [3]], torch.tensor([3, 0, 1, 5]))
    expected = np.average(stack[[0, 2]].numpy(), axis=0, weights=[3, 1])
    np.testing.assert_allclose(found[0], expected)
    assert torch.equal(found[0], found[2]) and torch.equal(found[[1, 3]], stack[[1, 3]])
    torch.testing.assert_close(rivals.merged(stack, [[0, 1], [2, 3]], torch.zeros(4))[0], stack[:2].mean(0))


def test_d2_cuts_what_is_left_of_a_weighted_mean():
    stack, fisher = randn(3, 8, 6), randn(3, 8, 6, seed=1).square()
    inputs = randn(3, 40, 8, seed=2) @ randn(8, 8, seed=3)
    base, made = rivals.base_and_differences(stack, fisher, inputs.mT @ inputs, 2)
    np.testing.assert_allclose(base, np.average(stack.numpy(), axis=0, weights=fisher.numpy()), rtol=1e-6)
    for x, weight, found in zip(inputs.numpy(), stack.numpy(), made.numpy(), strict=True):
        left = np.linalg.svd(x @ (weight - base.numpy()), compute_uv=False)[2:]
        assert np.linalg.norm(x @ (weight - found)) == pytest.approx(np.linalg.norm(left), rel=1e-3)


def test_rounding_by_hand():
    matrix = torch.tensor([[7.0, 3.4, -0.6, -7.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0, 0.02, -0.07]])
    expected = torch.tensor([[7.0, 3.0, -1.0, -7.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0, 0.02, -0.07]])
    torch.testing.assert_close(rivals.rounded(matrix, 4, 4), expected)  # steps of 1, 0.5 / 7, 0 and 0.01
    matrix = randn(5, 130)
    for group in (slice(0, 64), slice(64, 128), slice(128, 130)):
        error = (rivals.rounded(matrix, 8) - matrix)[:, group].abs().amax(1)
        assert (error <= matrix[:, group].abs().amax(1) / 127 / 2 * (1 + 1e-9)).all()


def test_texts_that_loop():
    texts = torch.tensor(
        [
            [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
            [1, 2, 3, 4, 7, 7, 7, 7, 7, 7, 7, 7],
            [1, 2, 3, 4, 5, 6, 4, 5, 6, 4, 5, 6],
            [1, 2, 3, 4, 9, 6, 4, 5, 6, 4, 5, 6],
        ]
    )
    assert rivals.loops(texts, tail=6, period=3).tolist() == [False, True, True, False]
    assert rivals.loops(texts, tail=6, period=2).tolist() == [False, True, False, False]


def test_greedy_text_of_a_model_that_copies_its_input():
    model = make_model("mixtral")
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(64)[:, :16])
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    assert rivals.loop_rate(model, torch.tensor([[5, 9, 3], [1, 2, 12]]), new=12, tail=6, period=2) == 1


def test_levels_between_the_ends_of_a_group_are_all_used():
    """Two bits, by hand: steps of 1 from -1 to 2, and of 2 from 0 to 6 where all are positive."""
    row = torch.tensor([[-1.0, 0.4, 0.6, 2.0, 6.0, 2.9, 3.1, 0.9]])
    expected = torch.tensor([[-1.0, 0.0, 1.0, 2.0, 6.0, 2.0, 4.0, 0.0]])
    torch.testing.assert_close(rivals.rounded_between(row, 2, 4), expected)
    exact = torch.zeros(2, 8)
    assert torch.equal(rivals.rounded_between(exact, 3, 8), exact)
