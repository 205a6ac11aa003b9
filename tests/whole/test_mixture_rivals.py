"""Published ways to compress a mixture, as the benchmark has them, on cases worked out here."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.modules import BENCHMARKS, load_module
from helpers.stock_mixtures import make_model, run_alone
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

rivals = load_module(BENCHMARKS / "mixture_rivals.py")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def experts():
    return make_model("mixtral").model.layers[0].mlp.experts


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


def test_a_mixture_of_bases_by_hand():
    """W_i = A_i silu(sum_j softmax(logits_i)_j B_j), entry by entry."""
    a, logits, bases = randn(3, 4, 2), randn(3, 2, seed=1), randn(2, 2, 5, seed=2)
    found = rivals.mixed(a, logits, bases).numpy()
    for i in range(3):
        shares = np.exp(logits[i].numpy()) / np.exp(logits[i].numpy()).sum()
        inner = shares[0] * bases[0].numpy() + shares[1] * bases[1].numpy()
        np.testing.assert_allclose(found[i], a[i].numpy() @ (inner / (1 + np.exp(-inner))))


@pytest.mark.parametrize("share", [0.2, 0.4, 0.8])
@pytest.mark.parametrize("shape", [(8, 24, 40), (8, 32, 32)])
def test_bases_store_about_the_share(shape, share):
    """Of a factored basis k x k numbers are free to choose; one rank more would be too large, or than d1."""
    stack, numbers = randn(*shape).float(), int(share * np.prod(shape))
    for start in (rivals.mobe_start, rivals.slbf_start):
        parameters, _ = start(stack, numbers)
        rank = parameters[-1].shape[1]
        free = 8 * rank**2 if start is rivals.slbf_start else 0
        stored = sum(part.numel() for part in parameters) - free
        assert rank <= shape[1] and numbers - 8 * sum(shape) < stored <= numbers


def test_starts_are_singular_vectors():
    stack = randn(4, 3, 6)
    (a, logits, bases), _ = rivals.mobe_start(stack, 4 * 3 * 3 + 2 * 3 * 6 + 4 * 2)  # a rank of 3
    assert torch.equal(logits, torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]))
    for expert in range(4):  # the six rows of a pair of experts, the first three of their six directions
        pair = stack[expert // 2 * 2 :][:2].reshape(6, 6).numpy()
        right = np.linalg.svd(pair)[2][:3]
        np.testing.assert_allclose(a[expert] @ bases[expert // 2], stack[expert].numpy() @ right.T @ right)
    (a, logits, u, v), basis = rivals.slbf_start(stack, 4 * (3 * 3 + 2 * (3 + 6 - 2) + 4))  # ranks of 3 and 2
    assert torch.equal(logits, torch.eye(4))
    for expert in range(4):
        left, _, right = np.linalg.svd(stack[expert].numpy())
        sign = left @ np.eye(3, 2) @ right[:2]  # singular values dropped
        np.testing.assert_allclose(a[expert] @ basis(u, v)[expert], sign, atol=1e-12)


def test_one_basis_is_trained_to_the_best_of_its_rank():
    """One basis can be any matrix, up to the scale of its rows: what an SVD loses is the least."""
    stack = randn(2, 6, 9, seed=3).float()
    stack[:, :, 3:] *= 0.3
    kinds = {
        "mobe": (stack, rivals.mobe_start(stack, 2 * 6 * 3 + 3 * 9 + 2), stack.reshape(12, 9)),
        "slbf": (stack[:1], rivals.slbf_start(stack[:1], 6 * 3 + 3 * 9 + 1, owned=0.4), stack[0]),
    }
    for turned, start, rows in kinds.values():
        made, error = rivals.trained_bases(turned, start, 400, rate=0.03, slower=1.0, decay=0.0)
        squares = np.linalg.svd(rows.numpy(), compute_uv=False) ** 2
        least = squares[3:].sum() / squares.sum()
        assert least * (1 - 1e-6) <= error < 1.05 * least
        assert error == pytest.approx(float((made - turned).square().sum() / turned.square().sum()), rel=1e-4)


def test_levels_between_the_ends_of_a_group_are_all_used():
    """Two bits, by hand: steps of 1 from -1 to 2, and of 2 from 0 to 6 where all are positive."""
    row = torch.tensor([[-1.0, 0.4, 0.6, 2.0, 6.0, 2.9, 3.1, 0.9]])
    expected = torch.tensor([[-1.0, 0.0, 1.0, 2.0, 6.0, 2.0, 4.0, 0.0]])
    torch.testing.assert_close(rivals.rounded_between(row, 2, 4), expected)
    exact = torch.zeros(2, 8)
    assert torch.equal(rivals.rounded_between(exact, 3, 8), exact)
