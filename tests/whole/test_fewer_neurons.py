"""Fewer hidden neurons, against least squares on actual activations."""

import numpy as np
import pytest
import torch
from helpers.modules import BENCHMARKS, load_module

neurons = load_module(BENCHMARKS / "fewer_neurons.py")
kept_neurons, leverage = neurons.kept_neurons, neurons.leverage
refitted_down, widths_by_score = neurons.refitted_down, neurons.widths_by_score


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lost(hidden, down, kept):
    """The squared change of the outputs when only these neurons are kept."""
    refitted = refitted_down(down, hidden.mT @ hidden, kept)
    return float((hidden @ down - hidden[:, kept] @ refitted).square().sum())


@pytest.fixture
def hidden():
    return randn(80, 12, seed=1) @ randn(12, 12, seed=2)


def test_scores_are_the_diagonal_of_the_ridge_hat_matrix(hidden):
    moment = hidden.mT @ hidden
    ridge = float(moment.trace()) / 12
    expected = np.diag(moment.numpy() @ np.linalg.inv(moment.numpy() + ridge * np.eye(12)))
    np.testing.assert_allclose(leverage(moment), expected)
    assert not leverage(torch.zeros(3, 3)).any()


def test_neurons_that_say_the_same_score_less():
    hidden = torch.linalg.qr(randn(80, 12, seed=1))[0]
    hidden[:, 5] = hidden[:, 2]
    scores = leverage(hidden.mT @ hidden)  # lambda is the mean eigenvalue, 1
    expected = torch.full((12,), 1 / 2, dtype=torch.float64)
    expected[[2, 5]] = (2 / 3) / 2  # one direction of eigenvalue 2 between them
    torch.testing.assert_close(scores, expected)


def test_down_is_the_least_squares_fit(hidden):
    down, kept = randn(12, 7, seed=3), torch.tensor([0, 3, 4, 8, 11])
    moment = hidden.mT @ hidden
    expected, residual, *_ = np.linalg.lstsq(hidden[:, kept].numpy(), (hidden @ down).numpy(), rcond=None)
    np.testing.assert_allclose(refitted_down(down, moment, kept), expected, rtol=1e-6, atol=1e-8)
    assert lost(hidden, down, kept) == pytest.approx(residual.sum(), rel=1e-6)


def test_all_neurons_are_exact_and_dead_ones_cost_nothing(hidden):
    down = randn(12, 7, seed=3)
    moment = hidden.mT @ hidden
    torch.testing.assert_close(refitted_down(down, moment, torch.arange(12)), down, rtol=1e-4, atol=1e-5)
    hidden[:, [1, 6]] = 0
    moment = hidden.mT @ hidden
    kept = kept_neurons(leverage(moment), 10)
    assert kept.tolist() == [0, 2, 3, 4, 5, 7, 8, 9, 10, 11]
    assert lost(hidden, down, kept) < 1e-9 * float((hidden @ down).square().sum())
    assert refitted_down(down, torch.zeros_like(moment), kept).isfinite().all()


def test_widths_follow_the_scores_in_multiples_of_eight():
    scores = [torch.full((64,), 0.9), torch.full((64,), 0.1), torch.linspace(0, 1, 64)]
    widths = widths_by_score(scores, 96)
    assert widths[0] == 64 and widths[1] == 8 and all(width % 8 == 0 for width in widths)
    assert abs(sum(widths) - 96) <= 12
    assert widths_by_score(scores, 192) == [64, 64, 64]
    assert widths_by_score([torch.rand(5), torch.rand(20)], 0) == [5, 8]
