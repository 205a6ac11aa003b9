"""The decomposition against TensorLy's path, Eckart-Young and its own discarded weight."""

from dataclasses import replace
from math import prod, sqrt

import pytest
import tensorly
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tensorly.decomposition import tensor_train_matrix
from tensorly.tt_matrix import TTMatrix

from mpoe_convert.decomposition import grams, mpo
from mpoe_convert.decomposition.mpo import fit, relative_error
from mpoe_convert.decomposition.sites import LAYOUTS, SVDS, Sites, balanced, choose, explicit
from mpoe_convert.errors import CheckpointError, SitesError
from mpoe_convert.runtime.modeling_mpoe import contract_chain

SETTINGS = settings(deadline=None, derandomize=True, max_examples=60)
DTYPES = (torch.float32, torch.float64)
TIED = tuple(layout for layout in LAYOUTS if layout != "blocks")
FULL = 10**9
# What rounding leaves of an exact decomposition, relative to the norm of the matrix.
ROUNDING = {torch.float32: 2e-6, torch.float64: 1e-12}

factors = st.integers(1, 4)
seeds = st.integers(0, 2**31)


@st.composite
def free_sites(draw, num_sites=(3, 5), full=False):
    """Any small factors and any feasible bonds."""
    count = draw(st.sampled_from(num_sites))
    in_dims = tuple(draw(factors) for _ in range(count))
    out_dims = tuple(draw(factors) for _ in range(count))
    limit = FULL if full else tuple(draw(st.integers(1, 12)) for _ in range(count - 1))
    return explicit(prod(in_dims), prod(out_dims), in_dims, out_dims, limit)


def random_matrix(sites, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sites.rows, sites.cols, generator=generator, dtype=dtype)


def tensorly_context():
    return tensorly.backend_context("pytorch", local_threadsafe=True)


def oracle(tt):
    """The matrix by TensorLy's contraction, independent of contract_chain."""
    with tensorly_context():
        return TTMatrix(list(tt)).to_matrix()


def tensorly_fit(matrix, sites):
    """TensorLy's default path at the same bonds."""
    with tensorly_context():
        tensor = matrix.reshape(*sites.in_dims, *sites.out_dims)
        return tensor_train_matrix(tensor, [1, *sites.bonds, 1], svd="truncated_svd").to_matrix()


def bond_spectra(matrix, sites):
    """Singular values of the matrix across every bond, by LAPACK."""
    n = sites.num_sites
    tensor = matrix.double().reshape(*sites.in_dims, *sites.out_dims)
    tensor = tensor.permute([axis for k in range(n) for axis in (k, n + k)])
    sizes = [i * o for i, o in zip(sites.in_dims, sites.out_dims, strict=True)]
    return [torch.linalg.svdvals(tensor.reshape(prod(sizes[:k]), -1)) for k in range(1, n)]


def squared_error(matrix, fitted):
    return (matrix.double() - oracle(fitted.cores).double()).square().sum().item()


def assert_isometric(fitted):
    """Left cores left-isometric, right cores right-isometric."""
    centre = fitted.sites.centre
    for k, core in enumerate(fitted.cores):
        if k == centre:
            continue
        unfolded = core.flatten(0, 2) if k < centre else core.flatten(1).mT
        eye = torch.eye(unfolded.shape[1], dtype=core.dtype)
        tolerance = 10 * ROUNDING[core.dtype]
        torch.testing.assert_close(unfolded.mT @ unfolded, eye, atol=tolerance, rtol=0)


def assert_valid(matrix, fitted):
    """Isometry, shapes, and the free oracle: squared error = sum of the discarded weights."""
    assert tuple(tuple(c.shape) for c in fitted.cores) == fitted.sites.core_shapes
    assert all(core.is_contiguous() for core in fitted.cores)
    assert all(lost >= 0 for lost in fitted.discarded)
    assert len(fitted.discarded) == len(fitted.sites.bonds)
    assert_isometric(fitted)
    norm = matrix.double().norm().item()
    error, expected = sqrt(squared_error(matrix, fitted)), sqrt(sum(fitted.discarded))
    # Squares are accurate to eps * norm^2, so a root near zero only to sqrt(eps) * norm.
    rounding = ROUNDING[fitted.cores[0].dtype]
    assert abs(error**2 - expected**2) <= rounding * norm * (norm + error)


# --- exact ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_sites", [3, 5])
@pytest.mark.parametrize("layout", TIED)
@pytest.mark.parametrize("size", [(48, 192), (192, 48), (86, 64), (60, 60)])
def test_full_bonds_are_exact(layout, num_sites, size, dtype):
    bond_dim = FULL if layout == "balanced" else 16
    sites = choose(*size, layout=layout, num_sites=num_sites, bond_dim=bond_dim)
    matrix = random_matrix(sites, 1, dtype)
    fitted = fit(matrix, sites)
    assert fitted.sites == sites
    assert fitted.discarded == (0.0,) * (num_sites - 1)
    assert fitted.cores[0].dtype == dtype
    assert_valid(matrix, fitted)
    assert relative_error(matrix, contract_chain(fitted.cores)) < ROUNDING[dtype]
    assert relative_error(matrix, oracle(fitted.cores)) < ROUNDING[dtype]


@SETTINGS
@given(sites=free_sites(full=True), seed=seeds)
def test_any_factors_are_exact_at_full_bonds(sites, seed):
    matrix = random_matrix(sites, seed)
    fitted = fit(matrix, sites)
    assert fitted.sites == sites
    assert_valid(matrix, fitted)
    torch.testing.assert_close(oracle(fitted.cores), matrix, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(tensorly_fit(matrix, sites), matrix, atol=1e-12, rtol=1e-12)


def test_gpt2_sizes_are_exact_to_float32_rounding():
    sites = choose(768, 3072, layout="one-sided", num_sites=3, bond_dim=64)
    matrix = random_matrix(sites, 2, torch.float32)
    assert relative_error(matrix, contract_chain(fit(matrix, sites).cores)) < 1e-6


# --- truncated ---


@SETTINGS
@given(sites=free_sites(), seed=seeds, method=st.sampled_from(SVDS))
def test_squared_error_is_the_discarded_weight(sites, seed, method):
    matrix = random_matrix(sites, seed)
    fitted = fit(matrix, sites, svd=method, seed=seed)
    assert fitted.sites == sites
    assert_valid(matrix, fitted)


@SETTINGS
@given(sites=free_sites(), seed=seeds)
def test_errors_lie_between_the_bounds_of_eckart_young(sites, seed):
    """No chain beats the worst bond alone; TT-SVD loses at most all of them (Oseledets, 2.2)."""
    matrix = random_matrix(sites, seed)
    tails = [
        spectrum[bond:].square().sum().item()
        for spectrum, bond in zip(bond_spectra(matrix, sites), sites.bonds, strict=True)
    ]
    error, rounding = squared_error(matrix, fit(matrix, sites)), 1e-12 * matrix.norm().item() ** 2
    assert max(tails) - rounding <= error <= sum(tails) + rounding


@SETTINGS
@given(sites=free_sites(full=True), seed=seeds, data=st.data())
def test_one_truncated_bond_is_as_good_as_tensorly(sites, seed, data):
    """With one bond cut both are the best approximation, in any order of the sweeps."""
    cut = data.draw(st.integers(0, len(sites.bonds) - 1))
    limits = [*sites.full_bonds]
    limits[cut] = data.draw(st.integers(1, limits[cut]))
    sites = explicit(sites.rows, sites.cols, sites.in_dims, sites.out_dims, tuple(limits))
    assume(sites.bonds == tuple(limits))  # a narrow bond can make its neighbours redundant as well
    matrix = random_matrix(sites, seed)
    ours = relative_error(matrix, oracle(fit(matrix, sites).cores))
    theirs = relative_error(matrix, tensorly_fit(matrix, sites))
    assert ours <= theirs * (1 + 1e-4) + 1e-12


@pytest.mark.parametrize("limit", [4, 16, 40])
@pytest.mark.parametrize("num_sites", [3, 5])
def test_several_truncated_bonds_are_as_good_as_tensorly(num_sites, limit):
    """On a decaying spectrum. Of the two orders of sweeps neither always wins, hence a per cent."""
    sites = choose(96, 384, layout="balanced", num_sites=num_sites, bond_dim=limit)
    matrix = decaying(sites, 1.0)
    ours = relative_error(matrix, oracle(fit(matrix, sites).cores))
    theirs = relative_error(matrix, tensorly_fit(matrix, sites))
    assert ours <= theirs * 1.01


def decaying(sites, power, dtype=torch.float64):
    """Random singular vectors, singular values k^-power."""
    u, _, v = torch.linalg.svd(random_matrix(sites, 3), full_matrices=False)
    spectrum = torch.arange(1, u.shape[1] + 1, dtype=torch.float64) ** -power
    return ((u * spectrum) @ v).to(dtype)


@pytest.mark.parametrize("layout", TIED)
def test_one_bond_limit_for_all_truncates_the_float32_path_too(layout):
    full = choose(96, 384, layout=layout, num_sites=5, bond_dim=24)
    sites = replace(full, bonds=tuple(max(bond // 2, 1) for bond in full.bonds))
    matrix = random_matrix(sites, 4, torch.float32)
    assert_valid(matrix, fit(matrix, sites))


@pytest.mark.parametrize("method", SVDS)
def test_bonds_that_cannot_exist_are_clipped(method):
    sites = Sites((2, 3, 2), (2, 1, 3), (50, 50))
    matrix = random_matrix(sites, 5)
    fitted = fit(matrix, sites, svd=method)
    assert fitted.sites.bonds == sites.full_bonds
    assert_valid(matrix, fitted)
    assert relative_error(matrix, contract_chain(fitted.cores)) < 1e-12


# --- both ways through a sweep: over the Gram matrix, or the unfolding itself ---


@pytest.mark.parametrize("limit", [5, FULL])
@pytest.mark.parametrize("num_sites", [3, 5, 7])
def test_the_gram_shortcut_changes_nothing(monkeypatch, num_sites, limit):
    sites = balanced(96, 144, limit, num_sites)
    matrix = decaying(sites, 0.5)
    short = fit(matrix, sites)
    monkeypatch.setattr(mpo, "_MAX_GRAM", 0)
    # "auto" would now take the randomized method where it can
    direct = fit(matrix, sites, svd="exact")
    assert short.sites == direct.sites
    assert_valid(matrix, direct)
    torch.testing.assert_close(short.discarded, direct.discarded, rtol=1e-9, atol=1e-12)
    # Signs are fixed and the spectra are simple, so even the cores are the same.
    torch.testing.assert_close(oracle(short.cores), oracle(direct.cores), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(64, 30), (65, 7), (2, 150, 40)])
@pytest.mark.parametrize("products", DTYPES)
def test_gram_matrices_are_whole(shape, products):
    """Though only half of the products are made."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    made = grams.gram(matrix, products)
    expected = matrix.double() @ matrix.double().mT
    torch.testing.assert_close(made, expected, rtol=0, atol=ROUNDING[products] * 64)


@pytest.mark.parametrize("rank", [1, 40, 160])
def test_large_eigenvectors_are_orthonormal_in_float64_and_in_order(rank):
    """Against float64's own eigenvalues, which lie apart."""
    generator = torch.Generator().manual_seed(3)
    basis, _ = torch.linalg.qr(torch.randn(160, 160, dtype=torch.float64, generator=generator))
    values = torch.linspace(1, 100, 160, dtype=torch.float64).flip(0)
    made = basis * values @ basis.mT
    vectors, lost = mpo._eigenvectors(made, rank)
    assert vectors.dtype == torch.float64 and vectors.shape == (160, rank)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-11)
    torch.testing.assert_close((vectors * (made @ vectors)).sum(0), values[:rank], rtol=1e-6, atol=0)
    assert lost == pytest.approx(float(values[rank:].sum()), rel=1e-6)


@pytest.mark.parametrize("limit", [5, 20, FULL])
@pytest.mark.parametrize("num_sites", [3, 5])
def test_eigenvectors_in_float32_lose_no_more(monkeypatch, num_sites, limit):
    """Isometric, with the error that is said of them, and as near as those in float64."""
    sites = balanced(96, 144, limit, num_sites)
    for matrix in (random_matrix(sites, 3).float(), decaying(sites, 0.5).float()):
        monkeypatch.setattr(mpo, "_LARGE_GRAM", 1)
        found = fit(matrix, sites)
        assert_valid(matrix, found)
        monkeypatch.setattr(mpo, "_LARGE_GRAM", 1000)
        best = squared_error(matrix, fit(matrix, sites))
        assert squared_error(matrix, found) <= best * (1 + 1e-5) + 1e-10 * matrix.norm() ** 2


@pytest.mark.parametrize(
    "in_dims, out_dims", [((8, 1, 2), (6, 1, 1)), ((2, 1, 8), (1, 1, 6)), ((3, 4, 1, 1, 1),) * 2]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [3, FULL])
def test_tall_unfoldings_keep_the_isometry(in_dims, out_dims, dtype, limit):
    """An outer block with more rows than everything else has columns."""
    sites = explicit(prod(in_dims), prod(out_dims), in_dims, out_dims, limit)
    matrix = random_matrix(sites, 6, dtype)
    fitted = fit(matrix, sites)
    assert fitted.sites == sites
    assert_valid(matrix, fitted)


def test_chunks_do_not_change_the_result(monkeypatch):
    sites = choose(48, 192, layout="balanced", num_sites=3, bond_dim=20)
    matrix = random_matrix(sites, 7)
    whole, error = fit(matrix, sites), relative_error(matrix, torch.zeros_like(matrix))
    monkeypatch.setattr(grams, "_CHUNK", 100)
    chunked = fit(matrix, sites)
    torch.testing.assert_close(oracle(chunked.cores), oracle(whole.cores), rtol=1e-9, atol=1e-9)
    assert relative_error(matrix, torch.zeros_like(matrix)) == pytest.approx(error) == 1.0


# --- degenerate matrices ---


@pytest.mark.parametrize("method", SVDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_rank_deficient_matrices(rank, dtype, method):
    """A bond of the rank is enough, and wider ones keep the isometry; rank 0 is the zero matrix."""
    for bond in (max(rank, 1), 12, FULL):
        sites = explicit(48, 96, (16, 3, 1), (1, 6, 16), bond)
        matrix = torch.zeros(48, 96, dtype=dtype)
        for k in range(rank):  # Kronecker products over the sites have rank 1 across every bond
            rows = torch.kron(random_part(16, k, dtype), random_part(3, k + 50, dtype))
            columns = torch.kron(random_part(6, k + 90, dtype), random_part(16, k + 70, dtype))
            matrix += torch.outer(rows, columns)
        fitted = fit(matrix, sites, svd=method)
        assert_valid(matrix, fitted)
        assert relative_error(matrix, contract_chain(fitted.cores)) < ROUNDING[dtype]


def random_part(size, seed, dtype):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("size", [(1, 96), (96, 1)])
@pytest.mark.parametrize("layout", TIED)
def test_a_single_row_or_column(layout, size):
    sites = choose(*size, layout=layout, num_sites=3, bond_dim=8)
    matrix = random_matrix(sites, 9)
    fitted = fit(matrix, sites)
    assert_valid(matrix, fitted)
    assert fitted.sites == sites
    assert relative_error(matrix, contract_chain(fitted.cores)) < 1e-12 or not sites.is_exact


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_extreme_scales_in_float32(scale):
    sites = choose(48, 96, layout="two-sided", num_sites=3, bond_dim=16)
    matrix = random_matrix(sites, 10, torch.float32) * scale
    fitted = fit(matrix, sites)
    assert_isometric(fitted)
    assert relative_error(matrix, contract_chain(fitted.cores)) < ROUNDING[torch.float32]


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_extreme_scales_report_what_they_discard(scale):
    sites = choose(48, 96, layout="balanced", num_sites=3, bond_dim=6)
    matrix = random_matrix(sites, 10, torch.float32) * scale
    fitted = fit(matrix, sites)
    lost = sum(fitted.discarded) / matrix.double().square().sum().item()
    error = relative_error(matrix, contract_chain(fitted.cores))
    assert sqrt(lost) == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("decay", [1, 3, 6, 9])
def test_small_losses_are_reported_as_accurately_as_large_ones(decay):
    """float32 data whose discarded part is far below float32 rounding of the squared norm."""
    sites = choose(64, 64, layout="balanced", num_sites=3, bond_dim=8)
    small = replace(sites, bonds=tuple(bond // 2 for bond in sites.bonds))
    cores = [random_matrix(Sites((i, 1, 1), (o, 1, 1), (1, 1)), k) for k, i, o in _parts(sites)]
    matrix = torch.kron(torch.kron(cores[0], cores[1]), cores[2])
    matrix = matrix + 10.0**-decay * random_matrix(sites, 21)
    fitted = fit(matrix.float(), small)
    lost = sqrt(sum(fitted.discarded)) / matrix.norm().item()
    spectra = bond_spectra(matrix, small)
    tails = [s[b:].square().sum().item() for s, b in zip(spectra, small.bonds, strict=True)]
    best = sqrt(max(tails)) / matrix.norm().item()
    assert best * 0.99 - 2e-7 <= lost <= sqrt(2) * best * 1.01 + 2e-7


def _parts(sites):
    return [(k, i, o) for k, (i, o) in enumerate(zip(sites.in_dims, sites.out_dims, strict=True))]


def test_small_singular_values_survive():
    """Columns over twelve orders of magnitude: nothing may be divided by what is near zero."""
    sites = choose(64, 64, layout="one-sided", num_sites=3, bond_dim=64)
    matrix = random_matrix(sites, 11, torch.float32) * torch.logspace(0, -12, 64)
    fitted = fit(matrix, sites)
    assert_isometric(fitted)
    assert relative_error(matrix, contract_chain(fitted.cores)) < ROUNDING[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_cast_to_float32(dtype):
    sites = choose(48, 192, layout="one-sided", num_sites=3, bond_dim=16)
    matrix = random_matrix(sites, 12).to(dtype)
    fitted = fit(matrix, sites)
    assert {core.dtype for core in fitted.cores} == {torch.float32}
    assert relative_error(matrix, contract_chain(fitted.cores)) < ROUNDING[torch.float32]
    # Exact means exact after the cast back, too.
    torch.testing.assert_close(
        contract_chain(fitted.cores).to(dtype), matrix, rtol=torch.finfo(dtype).eps, atol=1e-5
    )


def test_a_transposed_view_is_not_confused():
    sites = choose(48, 192, layout="two-sided", num_sites=5, bond_dim=16)
    weight = random_matrix(sites, 13).mT.contiguous()  # as nn.Linear stores it
    assert relative_error(weight.mT, contract_chain(fit(weight.mT, sites).cores)) < 1e-12


def test_gradients_are_not_recorded_and_the_input_is_not_changed():
    sites = choose(48, 192, layout="one-sided", num_sites=3, bond_dim=16)
    matrix = random_matrix(sites, 14).requires_grad_()
    before = matrix.detach().clone()
    fitted = fit(matrix, sites)
    assert not any(core.requires_grad for core in fitted.cores)
    assert torch.equal(matrix.detach(), before)


# --- the same every time ---


@pytest.mark.parametrize("method", SVDS)
def test_repeats_are_identical_to_the_bit(method):
    sites = choose(96, 384, layout="balanced", num_sites=5, bond_dim=20)
    matrix = random_matrix(sites, 15, torch.float32)
    torch.manual_seed(1)
    first = fit(matrix, sites, svd=method, seed=3)
    torch.manual_seed(2)
    second = fit(matrix.clone(), sites, svd=method, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first.cores, second.cores, strict=True))
    assert first.discarded == second.discarded


def test_the_global_generator_and_backend_are_left_alone():
    sites = choose(96, 384, layout="balanced", num_sites=3, bond_dim=8)
    matrix, state, backend = random_matrix(sites, 16), torch.get_rng_state(), tensorly.get_backend()
    fit(matrix, sites, svd="randomized", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert tensorly.get_backend() == backend


def test_the_seed_counts_for_the_randomized_method():
    sites = choose(96, 384, layout="balanced", num_sites=3, bond_dim=8)
    matrix = random_matrix(sites, 17)
    cores = [fit(matrix, sites, svd="randomized", seed=seed).cores[0] for seed in (0, 1)]
    assert not torch.equal(*cores)


def test_signs_are_fixed():
    """The largest entry of every column of an outer core is positive, whatever LAPACK returned."""
    sites = choose(48, 192, layout="one-sided", num_sites=3, bond_dim=16)
    fitted = fit(random_matrix(sites, 18), sites)
    for columns in (fitted.cores[0].flatten(0, 2), fitted.cores[2].flatten(1).mT):
        largest = columns.gather(0, columns.abs().argmax(dim=0, keepdim=True))
        assert bool((largest > 0).all())


# --- the randomized method ---


@pytest.mark.parametrize("num_sites", [3, 5])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_randomized_errs_by_a_few_per_cent_at_most(power, num_sites):
    sites = choose(256, 512, layout="balanced", num_sites=num_sites, bond_dim=6)
    matrix = decaying(sites, power, torch.float32)
    exact = relative_error(matrix, contract_chain(fit(matrix, sites, svd="exact").cores))
    drawn = fit(matrix, sites, svd="randomized", seed=4)
    assert_valid(matrix, drawn)
    assert relative_error(matrix, contract_chain(drawn.cores)) <= exact * 1.03


def test_auto_draws_only_where_the_rank_is_far_below_a_large_side(monkeypatch):
    calls = []
    original = mpo._randomized_split

    def counted(matrix, rank, seed):
        calls.append((min(matrix.shape), rank))
        return original(matrix, rank, seed)

    monkeypatch.setattr(mpo, "_randomized_split", counted)
    monkeypatch.setattr(mpo, "_MAX_GRAM", 32)
    sites = choose(256, 512, layout="balanced", num_sites=3, bond_dim=6)
    matrix = random_matrix(sites, 19, torch.float32)
    fit(matrix, sites)
    assert calls and all(side > 32 and 8 * rank <= side for side, rank in calls)
    calls.clear()
    fit(matrix, replace(sites, bonds=sites.full_bonds))
    fit(matrix, sites, svd="exact")
    assert not calls


# --- the oracles notice ---


@SETTINGS
@given(sites=free_sites(full=True), seed=seeds, data=st.data())
def test_a_perturbed_core_is_detected(sites, seed, data):
    matrix = random_matrix(sites, seed)
    fitted = fit(matrix, sites)
    k = data.draw(st.integers(0, sites.num_sites - 1))
    broken = [core.clone() for core in fitted.cores]
    broken[k].view(-1)[data.draw(st.integers(0, broken[k].numel() - 1))] += 1e-3
    damaged = replace(fitted, tt=TTMatrix(broken))
    assert relative_error(matrix, contract_chain(broken)) > 1e-12
    assert relative_error(matrix, oracle(broken)) > 1e-12
    with pytest.raises(AssertionError):
        torch.testing.assert_close(oracle(broken), matrix, atol=1e-12, rtol=1e-12)
    with pytest.raises(AssertionError):
        assert_valid(matrix, damaged)


# --- errors ---


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_are_counted(value, dtype):
    sites = choose(8, 12, layout="one-sided", num_sites=3, bond_dim=4)
    matrix = random_matrix(sites, 20).to(dtype)
    matrix[3, 4] = matrix[7, 0] = value
    with pytest.raises(CheckpointError, match="NaN or Inf in 2 of 96 places"):
        fit(matrix, sites)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12, 1), (96,)])
def test_a_matrix_of_another_size(shape):
    sites = choose(8, 12, layout="one-sided", num_sites=3, bond_dim=4)
    with pytest.raises(SitesError, match="describe 8 x 12: build the sites from the matrix's own"):
        fit(torch.zeros(shape), sites)


def test_an_unknown_method():
    sites = choose(8, 12, layout="one-sided", num_sites=3, bond_dim=4)
    with pytest.raises(ValueError, match="svd is 'symeig': choose one of auto, exact, randomized"):
        fit(torch.zeros(8, 12), sites, svd="symeig")


def test_relative_error_by_hand():
    matrix = torch.tensor([[3.0, 4.0]])
    assert relative_error(matrix, torch.tensor([[3.0, 3.0]])) == pytest.approx(1 / 5)
    assert relative_error(matrix, matrix) == 0.0
    assert relative_error(matrix * 0, matrix * 0) == 0.0
    assert relative_error(matrix * 0, matrix) == float("inf")
    assert relative_error(matrix.bfloat16(), matrix.double()) == 0.0
    with pytest.raises(ValueError, match=r"cannot compare \(1, 2\) with \(2, 1\)"):
        relative_error(matrix, matrix.mT)


# --- gauges ---


@pytest.mark.parametrize("layout", TIED)
@pytest.mark.parametrize("num_sites", [3, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_identity_gauge_is_the_matrix_itself(layout, num_sites, dtype):
    limit = FULL if layout == "balanced" else 16
    sites = choose(32, 64, layout=layout, num_sites=num_sites, bond_dim=limit)
    matrix = random_matrix(sites, 1, dtype)
    found = fit(matrix, sites, gauge="identity")
    assert torch.equal(oracle(found.cores), matrix) and torch.equal(contract_chain(found.cores), matrix)
    assert found.sites == sites and not any(found.discarded)
    numbers = torch.cat([core.flatten() for k, core in enumerate(found.cores) if k != sites.centre])
    assert set(numbers.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(found.cores[sites.centre].flatten().sort().values, matrix.flatten().sort().values)


def test_the_identity_gauge_needs_full_bonds():
    sites = choose(32, 64, layout="balanced", num_sites=5, bond_dim=8)
    with pytest.raises(SitesError, match=r"needs full bonds, and one is 8 of"):
        fit(random_matrix(sites, 1), sites, gauge="identity")
