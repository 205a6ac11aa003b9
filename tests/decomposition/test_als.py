"""Chains fitted to outputs: against the closed form where there is one, and by what a minimum has to be."""

import pytest
import torch
from helpers.matrices import problem

from mpoe_convert.decomposition.als import nearest_chain, refine
from mpoe_convert.decomposition.low_rank import Metric, factor
from mpoe_convert.decomposition.mpo import fit
from mpoe_convert.decomposition.sites import Sites, balanced
from mpoe_convert.runtime.modeling_mpoe import contract_chain

ROWS, COLS = 24, 36
# Two sums of the same float64 numbers in another order differ by less than this.
ROUNDING = 1e-12
CUT = [balanced(ROWS, COLS, 6, 5), balanced(ROWS, COLS, 4, 3), balanced(ROWS, COLS, (3, 8, 7, 4), 5)]


def error(inputs, matrix, approximation):
    return float((inputs @ (matrix - approximation)).norm() / (inputs @ matrix).norm())


def moment_of(inputs):
    return inputs.mT @ inputs / len(inputs)


@pytest.mark.parametrize("rank", [2, 5])
def test_a_product_of_two_thin_matrices_is_the_closed_form(rank):
    matrix, inputs = problem(ROWS, COLS)
    sites = Sites((ROWS, 1, 1), (1, 1, COLS), (rank, rank))
    found = nearest_chain(matrix, sites, moment_of(inputs))
    best = torch.linalg.multi_dot(factor(matrix, rank, Metric(moment_of(inputs))))
    plain = contract_chain(fit(matrix, sites).cores)
    assert error(inputs, matrix, best) < error(inputs, matrix, found) < 1.03 * error(inputs, matrix, best)
    assert error(inputs, matrix, plain) > 1.2 * error(inputs, matrix, best)


@pytest.mark.parametrize("sites", CUT, ids=str)
def test_outputs_are_nearer_and_no_core_alone_can_do_better(sites, monkeypatch):
    matrix, inputs = problem(ROWS, COLS)
    monkeypatch.setattr("mpoe_convert.decomposition.als._LITTLE", 0.0)
    start = fit(matrix, sites).cores
    errors = [error(inputs, matrix, contract_chain(start))]
    for sweeps in (1, 4, 200):
        monkeypatch.setattr("mpoe_convert.decomposition.als.MAX_SWEEPS", sweeps)
        cores = refine(start, matrix, moment_of(inputs))
        errors.append(error(inputs, matrix, contract_chain(cores)))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.9 * errors[0]
    assert [core.shape for core in cores] == [core.shape for core in start]
    # The best that least squares finds for one core, the others as they are: an independent solver.
    for k, core in enumerate(cores):
        basis = torch.eye(core.numel(), dtype=core.dtype).reshape(-1, *core.shape)
        columns = torch.stack(
            [inputs @ contract_chain([*cores[:k], one, *cores[k + 1 :]]) for one in basis], -1
        )
        target = inputs @ matrix
        found = torch.linalg.lstsq(columns.flatten(0, 1), target.reshape(-1, 1), driver="gelsd")
        best = (target - columns @ found.solution[:, 0]).norm() / target.norm()
        assert errors[-1] < 1.01 * best


@pytest.mark.parametrize("sites", CUT, ids=str)
def test_alike_inputs_leave_what_tt_svd_finds_or_better(sites):
    matrix, _ = problem(ROWS, COLS)
    plain = contract_chain(fit(matrix, sites).cores)
    found = nearest_chain(matrix, sites, torch.eye(ROWS, dtype=torch.float64))
    lost = (matrix - plain).norm()
    assert 0.9 * lost < (matrix - found).norm() <= (1 + ROUNDING) * lost


def test_what_the_bonds_can_hold_is_kept_exactly():
    matrix, inputs = problem(ROWS, COLS, dtype=torch.float32)
    held = contract_chain(fit(matrix, CUT[0]).cores)
    torch.testing.assert_close(
        nearest_chain(held, CUT[0], moment_of(inputs)), held, rtol=1e-4, atol=1e-4 * float(held.abs().max())
    )


@pytest.mark.parametrize("inputs", ["in a subspace", "none"])
def test_inputs_that_say_little(inputs):
    matrix, seen = problem(ROWS, COLS, directions=4)
    seen = seen if inputs == "in a subspace" else torch.zeros_like(seen)
    found = nearest_chain(matrix, CUT[0], moment_of(seen))
    assert found.isfinite().all()
    plain = contract_chain(fit(matrix, CUT[0]).cores)
    assert (seen @ (matrix - found)).norm() <= (1 + ROUNDING) * (seen @ (matrix - plain)).norm()
    assert (matrix - found).norm() < 3 * matrix.norm()


def test_a_zero_matrix():
    zero = torch.zeros(ROWS, COLS)
    assert torch.equal(nearest_chain(zero, CUT[0], torch.eye(ROWS)), zero)
