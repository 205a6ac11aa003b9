"""Block tensor trains: sites by brute force, cores by numpy's SVD, scales and a product per block."""

import numpy as np
import pytest
import torch
from helpers.mixtures import randn
from hypothesis import given, settings
from hypothesis import strategies as st

from mpoe_convert.decomposition.blocks import fit_blocks
from mpoe_convert.decomposition.sites import blocks
from mpoe_convert.errors import CheckpointError, SitesError
from mpoe_convert.runtime.modeling_mpoe import contract_chain

SETTINGS = settings(deadline=None, derandomize=True, max_examples=60)
SIZES = [(24, 96), (96, 24), (24, 24), (8, 5), (5, 8)]


def product(cores, sites) -> np.ndarray:
    """The matrix (in, out), block by block; a large core of two is multiplied out first."""
    cores = [core.numpy() for core in cores]
    if sites.untied[0]:
        (_, size, number), scales, untied, centre = sites.in_dims, cores[0], cores[1], cores[2:]
        small = untied.reshape(number, size, size)
        large = centre[0].reshape(size * number, -1)
        large = (large @ centre[1].reshape(large.shape[1], -1) if len(centre) > 1 else large).reshape(
            size, number, -1
        )
        found = np.empty((size, number, large.shape[-1]))
        for p in range(number):
            found[:, p] = small[p] @ large[:, p]
        return scales.reshape(-1, 1) * found.reshape(size * number, -1)
    (number, size, _), untied, scales, centre = sites.out_dims, cores[-2], cores[-1], cores[:-2]
    small = untied.reshape(number, size, size)
    large = centre[-1].reshape(-1, number * size)
    large = centre[0].reshape(-1, len(large)) @ large if len(centre) > 1 else large
    pieces = [large[:, p * size : (p + 1) * size] @ small[p] for p in range(number)]
    return np.concatenate(pieces, axis=1) * scales.reshape(1, -1)


@SETTINGS
@given(rows=st.integers(1, 400), cols=st.integers(1, 400), limit=st.integers(1, 130))
def test_the_smaller_side_is_split_into_the_largest_blocks(rows, cols, limit):
    side = min(rows, cols)
    size = max(d for d in range(1, side + 1) if side % d == 0 and d <= limit)
    if size == 1:
        with pytest.raises(SitesError, match=f"{side} has no divisor between 2 and the bond limit {limit}"):
            blocks(rows, cols, limit)
        return
    found = blocks(rows, cols, limit)
    if rows <= cols:
        assert (found.in_dims, found.out_dims) == ((1, size, rows // size), (1, 1, cols))
    else:
        assert (found.in_dims, found.out_dims) == ((rows, 1, 1), (cols // size, size, 1))
    assert sorted(found.bonds) == [1, size] and found.bonds == found.full_bonds and found.is_exact
    assert found.central_params == rows * cols and found.auxiliary_params == side * size + side
    assert found.untied[found.centre] is False and sum(found.untied) == 2


@pytest.mark.parametrize(
    ("limit", "sites", "error"),
    [
        (0, 3, "bond dimension 0 is below 1"),
        (8, 5, "the blocks layout has 3 sites, found 5: omit sites, or use layout=.one-sided"),
        ((8, 8, 8), 3, "3 bond dimensions"),
    ],
)
def test_limits_that_no_chain_has(limit, sites, error):
    with pytest.raises(SitesError, match=error):
        blocks(24, 96, limit, sites)


@pytest.mark.parametrize("gauge", ["canonical", "identity"])
@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("size", SIZES)
def test_the_cores_make_the_matrix(size, rank, gauge):
    sites = blocks(*size, 6)
    matrix, factors = randn(*size), None
    if rank:
        factors = randn(size[0], rank, seed=2), randn(rank, size[1], seed=3)
        matrix = factors[0] @ factors[1]
    cores = fit_blocks(matrix, sites, factors, gauge=gauge)
    scales = cores[0 if sites.untied[0] else -1]
    assert torch.equal(scales, torch.ones_like(scales))
    if gauge == "identity" and not rank:
        assert torch.equal(contract_chain(cores, sites.copies), matrix)
    scales.copy_(randn(*scales.shape, seed=4))
    scaled = scales.flatten()
    matrix = scaled[:, None] * matrix if sites.untied[0] else matrix * scaled
    copies = list(sites.copies)
    if rank:
        copies.insert(sites.centre, 1)
    np.testing.assert_allclose(product(cores, sites), matrix.numpy(), rtol=0, atol=1e-12)
    for with_gradients in (True, False):
        with torch.set_grad_enabled(with_gradients):
            torch.testing.assert_close(contract_chain(cores, copies), matrix, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_the_canonical_gauge_is_the_svd_of_every_block(size):
    sites = blocks(*size, 6)
    matrix = randn(*size)
    cores = fit_blocks(matrix, sites)
    if sites.untied[0]:
        large, pieces = cores[2].squeeze(-1), matrix.reshape(*sites.in_dims[1:], -1)
        found = [(large[:, p], pieces[:, p]) for p in range(sites.in_dims[2])]
    else:
        large, pieces = cores[0].squeeze(0), matrix.reshape(-1, *sites.out_dims[:2])
        found = [(large[:, p].T, pieces[:, p].T) for p in range(sites.out_dims[0])]
    for rows, block in found:  # (b, n)
        values = np.zeros(len(rows))
        singular = np.linalg.svd(block.numpy(), compute_uv=False)
        values[: len(singular)] = singular
        np.testing.assert_allclose((rows @ rows.T).numpy(), np.diag(values**2), rtol=0, atol=1e-10)


def test_float32_stays_and_its_bases_are_orthogonal_to_rounding():
    sites = blocks(64, 256, 16)
    cores = fit_blocks(randn(64, 256, dtype=torch.float32), sites)
    assert {core.dtype for core in cores} == {torch.float32}
    basis = cores[1].reshape(4, 16, 16).double()
    assert (basis.mT @ basis - torch.eye(16)).abs().max() < 1e-5


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
@pytest.mark.parametrize("size", [(64, 256), (256, 64)])
def test_float32_products_never_leave_their_range(size, scale):
    """Of the squares of such entries float32 has none; one block of zeros is nothing special."""
    sites = blocks(*size, 16)
    matrix = randn(*size, dtype=torch.float32) * scale
    (matrix if size[0] < size[1] else matrix.T)[::4] = 0
    cores = fit_blocks(matrix, sites)
    found = contract_chain([core.double() for core in cores], sites.copies)
    assert (found - matrix.double()).norm() < 1e-6 * matrix.double().norm()


def test_nan_is_refused():
    matrix = randn(8, 16)
    matrix[3, 4] = torch.nan
    with pytest.raises(CheckpointError, match="NaN or Inf"):
        fit_blocks(matrix, blocks(8, 16, 4))


def test_a_zero_matrix_has_zero_cores_and_orthogonal_bases():
    cores = fit_blocks(torch.zeros(8, 16), blocks(8, 16, 4))
    assert not cores[2].any()
    basis = cores[1].reshape(2, 4, 4)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(4).expand(2, 4, 4))
