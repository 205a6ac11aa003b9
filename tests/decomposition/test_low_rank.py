"""Factors of a matrix in a metric, against Eckart-Young on what the matrix makes of actual inputs."""

import pytest
import torch
from helpers.matrices import TOKENS, problem

from mpoe_convert.decomposition.low_rank import Metric, factor, spectrum, thin_side

SIZES = [(12, 30), (30, 12), (16, 16)]


def outputs_metric(weight, inputs):
    seen = inputs if thin_side(*weight.shape) == "in" else inputs @ weight
    return Metric(seen.mT @ seen)


@pytest.mark.parametrize(("rows", "cols"), SIZES)
@pytest.mark.parametrize("rank", [1, 5, 11])
def test_without_a_metric_it_is_the_truncated_svd(rows, cols, rank):
    weight, _ = problem(rows, cols)
    first, second = factor(weight, rank, Metric())
    u, values, vh = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(first @ second, (u[:, :rank] * values[:rank]) @ vh[:rank])
    torch.testing.assert_close(spectrum(weight, Metric()), values.square())


@pytest.mark.parametrize(("rows", "cols"), SIZES)
@pytest.mark.parametrize("rank", [1, 5, 11])
def test_outputs_are_as_near_as_any_matrix_of_that_rank_can_be(rows, cols, rank):
    weight, inputs = problem(rows, cols)
    expected = torch.linalg.svdvals(inputs @ weight)
    metric = outputs_metric(weight, inputs)
    first, second = factor(weight, rank, metric)
    error = (inputs @ (weight - first @ second)).norm()
    # The ridge on the moment costs a little; the plain SVD, of the same rank, is far from the bound.
    torch.testing.assert_close(error, expected[rank:].norm(), rtol=1e-3, atol=1e-9)
    values = spectrum(weight, metric)
    expected = expected[: len(values)].square()
    torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-5 * float(expected[0]))
    plain = torch.linalg.multi_dot(factor(weight, rank, Metric()))
    assert (inputs @ (weight - plain)).norm() > 1.05 * error


@pytest.mark.parametrize(("rows", "cols"), SIZES)
def test_inputs_in_a_subspace_are_met_exactly_by_as_many_ranks(rows, cols):
    weight, inputs = problem(rows, cols, directions=4)
    first, second = factor(weight, 4, outputs_metric(weight, inputs))
    product = first @ second
    assert product.isfinite().all()
    assert (inputs @ (weight - product)).norm() < 1e-4 * (inputs @ weight).norm()
    # More ranks than the inputs have directions are no trouble either.
    first, second = factor(weight, 10, outputs_metric(weight, inputs))
    assert (inputs @ (weight - first @ second)).norm() < 1e-4 * (inputs @ weight).norm()


@pytest.mark.parametrize(("rows", "cols"), SIZES)
def test_a_matrix_without_inputs_or_numbers(rows, cols):
    weight, inputs = problem(rows, cols)
    zero = torch.zeros(min(rows, cols), min(rows, cols), dtype=torch.float64)
    first, second = factor(weight, 3, Metric(zero))
    assert torch.linalg.multi_dot([first, second]).isfinite().all()
    first, second = factor(torch.zeros_like(weight), 3, outputs_metric(torch.zeros_like(weight), inputs))
    assert not (first @ second).any()


@pytest.mark.parametrize(("rows", "cols"), SIZES)
def test_answers_of_the_loss_weigh_outputs(rows, cols):
    """With g = (change of the thin side) W T and inputs alike, norm((W - W_hat) T) is to be least."""
    weight, _ = problem(rows, cols)
    transform = problem(cols, cols, seed=1)[0] * torch.logspace(0, -2, cols, dtype=torch.float64)
    if thin_side(rows, cols) == "in":
        metric = Metric(answer=weight @ transform @ transform.mT @ weight.mT)
    else:
        metric = Metric(weight.mT @ weight, transform @ transform.mT)
    first, second = factor(weight, 5, metric)
    error = ((weight - first @ second) @ transform).norm()
    torch.testing.assert_close(error, torch.linalg.svdvals(weight @ transform)[5:].norm(), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("rows", "cols"), SIZES)
def test_float32_keeps_its_dtype_and_both_factors_are_of_like_size(rows, cols):
    weight, inputs = problem(rows, cols, dtype=torch.float32)
    first, second = factor(weight, 6, outputs_metric(weight, inputs))
    assert first.dtype == second.dtype == torch.float32
    assert first.shape == (rows, 6) and second.shape == (6, cols)
    torch.testing.assert_close(first.norm(dim=0), second.norm(dim=1))


@pytest.mark.parametrize(("rows", "cols"), [(12, 30), (30, 12)])
def test_a_moment_that_rounding_made_indefinite(rows, cols):
    """Inputs with one huge direction, kept in float32: Cholesky of moment and ridge fails."""
    weight, _ = problem(rows, cols)
    inputs = torch.randn(TOKENS, 3, dtype=torch.float64) @ torch.randn(3, rows, dtype=torch.float64)
    inputs[:, 0] *= 1e4
    seen = inputs if thin_side(rows, cols) == "in" else inputs @ weight
    moment = (seen.mT @ seen / TOKENS).float().double()
    moment = moment - 3e-6 * moment.diagonal().mean() * torch.eye(len(moment))
    assert torch.linalg.cholesky_ex(moment + 1e-6 * moment.diagonal().mean() * torch.eye(len(moment))).info
    answer = None if thin_side(rows, cols) == "in" else torch.eye(cols, dtype=torch.float64)
    first, second = factor(weight, 4, Metric(moment, answer))
    assert (inputs @ (weight - first @ second)).norm() < 1e-2 * (inputs @ weight).norm()
