"""Fits of a stack of experts' matrices in the metric of each, against NumPy's SVD, gradients and bounds."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from mpoe_convert.decomposition import low_rank, stack_fit, stack_metric
from mpoe_convert.decomposition.stack_bases import Base, Bases
from mpoe_convert.decomposition.stack_choices import stack_choices
from mpoe_convert.decomposition.stack_fit import alikeness, fit_stack
from mpoe_convert.decomposition.stack_metric import Stack
from mpoe_convert.decomposition.stacks import FORMS, UNEVEN, largest_ranks, stack_terms
from mpoe_convert.runtime.modeling_mpoe import Chain

EXPERTS = 4
SIZES = [(12, 9), (9, 12)]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def problem(in_dim, out_dim, seed=0):
    """A stack, and inputs of its own for every expert, (E, tokens, in), some directions and experts rare."""
    inputs = randn(EXPERTS, 60, in_dim, seed=seed + 1) @ randn(EXPERTS, in_dim, in_dim, seed=seed + 2)
    return randn(EXPERTS, in_dim, out_dim, seed=seed), inputs * torch.tensor([3.0, 1.0, 1.0, 0.2])[
        :, None, None
    ]


def moments_of(inputs):
    return inputs.mT @ inputs


def lost(weights, inputs, fit):
    """The squared change of the outputs of actual inputs, per expert."""
    return torch.stack(
        [
            (x @ (w - fit.matrix(e))).square().sum()
            for e, (w, x) in enumerate(zip(weights, inputs, strict=True))
        ]
    )


def ranks_of(form, rank):
    return {"both": (rank, rank), "whole": ()}.get(form, (rank,))


@pytest.mark.parametrize(("in_dim", "out_dim"), SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_full_ranks_are_exact(form, in_dim, out_dim):
    weights, inputs = problem(in_dim, out_dim)
    ranks = largest_ranks(form, EXPERTS, in_dim, out_dim)
    fit = fit_stack(weights, form, ranks, moments_of(inputs))
    for expert, weight in enumerate(weights):
        torch.testing.assert_close(fit.matrix(expert), weight, rtol=0, atol=1e-7)
    assert fit.error < 1e-13 and fit.errors.weight_errors.max() < 1e-13


@pytest.mark.parametrize(("in_dim", "out_dim"), SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_the_module_computes_the_fitted_matrices(form, in_dim, out_dim):
    weights, inputs = problem(in_dim, out_dim)
    ranks = ranks_of(form, 4)
    fit = fit_stack(weights, form, ranks, moments_of(inputs))
    chains = [Chain(term, EXPERTS).double() for term in stack_terms(form, ranks, in_dim, out_dim)]
    for chain, cores in zip(chains, fit.cores, strict=True):
        for name, core in zip(chain.core_names, cores, strict=True):
            assert getattr(chain, name).shape == core.shape
            getattr(chain, name).data = core
    for expert in range(EXPERTS):
        matrix = sum(c.matrix([getattr(c, name) for name in c.core_names], expert) for c in chains)
        torch.testing.assert_close(matrix, fit.matrix(expert))


@pytest.mark.parametrize(("in_dim", "out_dim"), SIZES)
@pytest.mark.parametrize("form", FORMS[:-1])
def test_errors_are_those_of_actual_inputs(form, in_dim, out_dim):
    weights, inputs = problem(in_dim, out_dim)
    fit = fit_stack(weights, form, ranks_of(form, 4), moments_of(inputs))
    energy = torch.stack([(x @ w).square().sum() for x, w in zip(inputs, weights, strict=True)])
    torch.testing.assert_close(fit.lost, lost(weights, inputs, fit), rtol=1e-3, atol=0)
    torch.testing.assert_close(fit.errors.energy, energy, rtol=1e-3, atol=0)
    assert fit.error == pytest.approx(float(fit.lost.sum() / fit.errors.energy.sum()))
    changes = torch.stack([w - fit.matrix(e) for e, w in enumerate(weights)])
    expected = changes.square().sum((1, 2)) / weights.square().sum((1, 2))
    torch.testing.assert_close(fit.errors.weight_errors, expected)


@pytest.mark.parametrize(("in_dim", "out_dim"), SIZES)
def test_each_alone_is_the_truncated_svd_of_its_outputs(in_dim, out_dim):
    weights, inputs = problem(in_dim, out_dim)
    fit = fit_stack(weights, "none", (5,), moments_of(inputs))
    for expert, (weight, x) in enumerate(zip(weights.numpy(), inputs.numpy(), strict=True)):
        values = np.linalg.svd(x @ weight, compute_uv=False)
        found = np.linalg.norm(x @ (weight - fit.matrix(expert).numpy()))
        np.testing.assert_allclose(found, np.linalg.norm(values[5:]), rtol=1e-3)


@pytest.mark.parametrize("form", UNEVEN)
@pytest.mark.parametrize(("in_dim", "out_dim"), SIZES)
def test_each_expert_has_its_own_rank(form, in_dim, out_dim):
    """Given the base, each is the truncated SVD of its outputs, at its rank; zeros lie behind."""
    weights, inputs = problem(in_dim, out_dim)
    ranks = (6, 3, 4, 1)
    fit = fit_stack(weights, form, ranks, moments_of(inputs))
    base = fit.cores[0][0] if form == "base" else torch.zeros_like(weights[0])
    first, second = fit.cores[-1]
    for expert, rank in enumerate(ranks):
        values = torch.linalg.svdvals(inputs[expert] @ (weights[expert] - base))
        expected = float(values[rank:].norm())
        found = float((inputs[expert] @ (weights[expert] - fit.matrix(expert))).norm())
        assert found == pytest.approx(expected, rel=1e-3)
        assert not first[expert, :, rank:].any() and not second[expert, rank:].any()


@pytest.mark.parametrize(("in_dim", "out_dim"), SIZES)
def test_without_moments_one_sided_bases_are_the_svd_of_the_experts_side_by_side(in_dim, out_dim):
    weights, _ = problem(in_dim, out_dim)
    for form, beside in (("input", 1), ("output", 0)):
        values = np.linalg.svd(np.concatenate(list(weights.numpy()), axis=beside), compute_uv=False)
        fit = fit_stack(weights, form, (5,))
        assert float(fit.lost.sum()) == pytest.approx(float((values[5:] ** 2).sum()), rel=1e-5)


@pytest.mark.parametrize(("in_dim", "out_dim"), SIZES)
def test_an_output_basis_is_the_svd_of_all_outputs_one_below_the_other(in_dim, out_dim):
    weights, inputs = problem(in_dim, out_dim)
    outputs = np.concatenate([x @ w for x, w in zip(inputs.numpy(), weights.numpy(), strict=True)])
    values = np.linalg.svd(outputs, compute_uv=False)
    fit = fit_stack(weights, "output", (5,), moments_of(inputs))
    assert float(lost(weights, inputs, fit).sum()) == pytest.approx(float((values[5:] ** 2).sum()), rel=1e-3)


@pytest.mark.parametrize(("in_dim", "out_dim"), SIZES)
def test_tucker_is_not_worse_than_hosvd(in_dim, out_dim):
    weights, _ = problem(in_dim, out_dim)
    left = torch.linalg.svd(torch.cat(list(weights), 1))[0][:, :5]
    right = torch.linalg.svd(torch.cat(list(weights), 0))[2][:4]
    hosvd = left @ (left.mT @ weights @ right.mT) @ right
    fit = fit_stack(weights, "both", (5, 4))
    assert float(fit.lost.sum()) < float((weights - hosvd).square().sum()) * (1 + 1e-5)


@pytest.mark.parametrize("form", ["input", "both", "base"])
@pytest.mark.parametrize(("in_dim", "out_dim"), SIZES)
def test_more_sweeps_never_raise_the_error(form, in_dim, out_dim):
    weights, inputs = problem(in_dim, out_dim)
    errors = [
        fit_stack(weights, form, ranks_of(form, 4), moments_of(inputs), max_sweeps=sweeps).error
        for sweeps in range(6)
    ]
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(errors))
    assert errors[-1] < 0.999 * errors[0]


@pytest.mark.parametrize("form", ["input", "both", "base"])
def test_descent_ends_where_the_gradient_vanishes(form, monkeypatch):
    monkeypatch.setattr("mpoe_convert.decomposition.stack_bases._LITTLE", 1e-14)
    weights, inputs = problem(12, 9)
    moments = moments_of(inputs)
    stack = Stack(weights, moments)

    def gradients(sweeps):
        ranks = ranks_of(form, 2 if form == "base" else 4)
        fit = fit_stack(weights, form, ranks, moments, max_sweeps=sweeps)
        cores = [[core.clone().requires_grad_() for core in term] for term in fit.cores]
        error = torch.zeros((), dtype=torch.float64)
        for e in range(EXPERTS):
            rest = weights[e] - stack_metric.expand(cores, e)
            error = error + (rest * (stack.moment(e) @ rest)).sum()
        found = torch.autograd.grad(error, [core for term in cores for core in term])
        sizes = [core.detach().norm() for term in cores for core in term]
        return max(float(g.norm() * s) for g, s in zip(found, sizes, strict=True))

    # Descent over a base is the slower one.
    assert gradients(120) < (0.1 if form == "base" else 0.01) * gradients(0)


def test_an_expert_without_inputs_or_numbers():
    weights, inputs = problem(12, 9)
    inputs[1], weights[2] = 0, 0
    for form in FORMS:
        fit = fit_stack(weights, form, ranks_of(form, 4), moments_of(inputs))
        assert all(core.isfinite().all() for term in fit.cores for core in term)
        assert fit.lost.isfinite().all() and fit.errors.weight_errors.isfinite().all()
    zeros = fit_stack(torch.zeros_like(weights), "both", (4, 4), torch.zeros_like(moments_of(inputs)))
    assert zeros.error == 0 and not zeros.matrix(0).any()


@pytest.mark.parametrize("form", ["input", "both", "base"])
def test_inputs_in_a_subspace(form):
    weights, _ = problem(12, 9)
    inputs = randn(EXPERTS, 50, 3, seed=5) @ randn(3, 12, seed=6)
    fit = fit_stack(weights, form, ranks_of(form, 9 if form != "base" else 4), moments_of(inputs))
    assert all(core.isfinite().all() for term in fit.cores for core in term)
    assert float(lost(weights, inputs, fit).sum() / (inputs @ weights).square().sum()) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_large_stacks_are_fitted_in_float32_alike(form, monkeypatch):
    weights, inputs = problem(12, 9)
    moments = moments_of(inputs)
    exact = fit_stack(weights.float(), form, ranks_of(form, 4), moments, max_sweeps=3)
    monkeypatch.setattr(stack_metric, "SMALL", 0)
    rough = fit_stack(weights.bfloat16().float(), form, ranks_of(form, 4), moments, max_sweeps=3)
    assert Stack(weights).dtype == torch.float32
    assert all(core.dtype == torch.float32 for term in rough.cores for core in term)
    assert rough.error == pytest.approx(exact.error, rel=0.02, abs=1e-9)


def test_weights_multiply_the_moments():
    weights, inputs = problem(12, 9)
    moments, factors = moments_of(inputs), torch.tensor([1.0, 0.5, 4.0, 2.0])
    for form in ("input", "output"):
        given = fit_stack(weights, form, (4,), moments, factors, max_sweeps=2)
        expected = fit_stack(weights, form, (4,), moments * factors[:, None, None], max_sweeps=2)
        torch.testing.assert_close(given.cores, expected.cores)


def test_moments_are_asked_for_one_at_a_time():
    weights, inputs = problem(12, 9)

    class Lazily:
        def __len__(self):
            return EXPERTS

        def __getitem__(self, expert):
            return inputs[expert].mT @ inputs[expert]

    torch.testing.assert_close(
        fit_stack(weights, "both", (4, 4), Lazily()).cores,
        fit_stack(weights, "both", (4, 4), moments_of(inputs)).cores,
    )


def test_moments_are_left_as_they_are():
    weights, inputs = problem(12, 9)
    moments = moments_of(inputs)
    kept = moments.clone(), weights.clone()
    for form in FORMS:
        fit_stack(weights, form, ranks_of(form, 4), moments)
    assert torch.equal(moments, kept[0]) and torch.equal(weights, kept[1])


def test_alikeness():
    weights, inputs = problem(12, 9)
    moments = moments_of(inputs)
    assert alikeness(Stack(weights[:1].expand(4, -1, -1), moments)) == pytest.approx(1)
    assert alikeness(Stack(randn(50, 30, 30))) == pytest.approx(1 / 50, rel=0.1)
    metric = np.mean([x.T @ x for x in inputs.numpy()], 0)
    root = np.linalg.cholesky(metric).T
    expected = np.linalg.norm(root @ weights.numpy().mean(0)) ** 2
    expected /= np.mean([np.linalg.norm(root @ w) ** 2 for w in weights.numpy()])
    assert alikeness(Stack(weights, moments)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("make", [lambda s, e: Bases(s, 4, None, e), lambda s, e: Base(s, (4,) * EXPERTS, e)])
def test_some_experts_estimate_the_error_of_all(make):
    weights, inputs = problem(12, 9)
    stack = Stack(weights, moments_of(inputs))
    parts = [make(stack, [expert]).error for expert in range(EXPERTS)]
    assert sum(parts) / EXPERTS == pytest.approx(make(stack, list(range(EXPERTS))).error)


def test_forms_are_those_that_are_fitted():
    assert set(stack_fit._FITS) == set(FORMS)


@pytest.mark.parametrize("form", FORMS)
def test_moments_that_rounding_made_indefinite_are_fitted(form):
    """Inputs that are all the same: one direction, and eigenvalues below zero, as rounding to float32 has."""
    direction = randn(64, seed=3)
    lowest = 4e-6 * direction.square().mean()
    moments = (direction[:, None] * direction - lowest * torch.eye(64)).expand(EXPERTS, 64, 64)
    weights = randn(EXPERTS, 64, 9)
    found = stack_choices(weights, 1600, moments, forms=(form, "whole"))
    assert found.choices and all(np.isfinite(choice.lost) for choice in found.choices)
    fit = fit_stack(weights, form, ranks_of(form, EXPERTS), moments)
    expected = torch.stack([direction @ weight for weight in weights])
    made = torch.stack([direction @ fit.matrix(expert) for expert in range(EXPERTS)])
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_a_root_is_exact_but_for_what_rounding_lost():
    basis = torch.linalg.qr(randn(6, 6, seed=4))[0]
    values = torch.tensor([4.0, 1.0, 0.5, 1e-3, -1e-9, -1e-8], dtype=torch.float64)
    root = low_rank.root(basis * values @ basis.mT, 1e-6)
    assert torch.equal(root, root.tril())
    expected = basis * values.clamp(min=1e-6) @ basis.mT
    torch.testing.assert_close(root @ root.mT, expected, rtol=0, atol=1e-12)


class Known(stack_metric.Moments):
    """Moments of which the mean and the levels are told."""

    def __init__(self, moments):
        self.moments = moments

    def __len__(self):
        return len(self.moments)

    def __getitem__(self, expert):
        return self.moments[expert]

    def mean(self):
        return self.moments.mean(0, dtype=torch.float64)

    def levels(self):
        return [float(moment.diagonal().mean()) for moment in self.moments]


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("form", ["none", "input", "both", "base"])
def test_moments_that_know_their_mean_give_the_same(form, small, monkeypatch):
    weights, inputs = problem(12, 9)
    moments = moments_of(inputs)
    if not small:
        monkeypatch.setattr(stack_metric, "SMALL", 1)
        weights, moments = weights.float(), moments.float()
    before = moments.clone()
    fits = [fit_stack(weights, form, ranks_of(form, 4), each) for each in (moments, Known(moments))]
    torch.testing.assert_close(fits[1].lost, fits[0].lost, rtol=1e-4, atol=0)
    curves = [
        stack_choices(weights, weights.numel() // 2, each).choices for each in (moments, Known(moments))
    ]
    for first, second in zip(*curves, strict=True):
        assert (first.numbers, first.form, first.ranks) == (second.numbers, second.form, second.ranks)
        assert second.lost == pytest.approx(first.lost, rel=1e-4)
    assert torch.equal(moments, before)
