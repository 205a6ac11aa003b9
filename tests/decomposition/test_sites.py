"""Sites: products, limits and counts against brute force; the wording of every error."""

import re
from dataclasses import replace
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpoe_convert.decomposition.sites import (
    LAYOUTS,
    Sites,
    balanced,
    choose,
    explicit,
    full_bonds,
    near_equal_factors,
    one_sided,
    parse_factors,
    two_sided,
)
from mpoe_convert.errors import SitesError

WIDE = ("one-sided", "two-sided")
TIED = tuple(layout for layout in LAYOUTS if layout != "blocks")  # with an odd number of sites
AWKWARD = (11008, 13696, 4864, 172, 5632, 18944, 896)

SETTINGS = settings(deadline=None, derandomize=True, max_examples=60)

sizes = st.one_of(st.integers(1, 400), st.sampled_from(AWKWARD), st.sampled_from([43, 53, 2 * 53, 4 * 43]))
odd_sites = st.sampled_from([3, 5, 7])
limits = st.integers(1, 130)


def divisors(number):
    return [d for d in range(1, number + 1) if number % d == 0]


def try_layout(layout, rows, cols, bond_dim, num_sites):
    """Sites, or None where the layout refuses."""
    try:
        return LAYOUTS[layout](rows, cols, bond_dim, num_sites)
    except SitesError:
        return None


# --- what every layout has to fulfil ---


@pytest.mark.parametrize("layout", TIED)
@SETTINGS
@given(rows=sizes, cols=sizes, num_sites=odd_sites, data=st.data())
def test_products_limits_and_counts(layout, rows, cols, num_sites, data):
    bond_dim = data.draw(limits | st.tuples(*[limits] * (num_sites - 1)), label="one limit or one per bond")
    sites = try_layout(layout, rows, cols, bond_dim, num_sites)
    if sites is None:
        return
    assert (prod(sites.in_dims), prod(sites.out_dims)) == (rows, cols)
    assert sites.num_sites == num_sites
    assert sites.centre == num_sites // 2
    limit = bond_dim if isinstance(bond_dim, tuple) else (bond_dim,) * (num_sites - 1)
    assert all(b <= li for b, li in zip(sites.bonds, limit, strict=True))
    assert sites.auxiliary_params > num_sites - 1, "every auxiliary tensor is a single number"
    # Counts by walking the chain, independently of core_shapes.
    left, counts = 1, []
    for i, o, right in zip(sites.in_dims, sites.out_dims, [*sites.bonds, 1], strict=True):
        counts.append(left * i * o * right)
        left = right
    assert tuple(counts) == sites.core_params == tuple(prod(s) for s in sites.core_shapes)
    assert sites.central_params == counts[num_sites // 2]
    assert sites.auxiliary_params == sum(counts) - sites.central_params


@pytest.mark.parametrize("layout", TIED)
@SETTINGS
@given(rows=sizes, cols=sizes, num_sites=odd_sites, data=st.data())
def test_no_bond_is_wider_than_its_neighbourhood(layout, rows, cols, num_sites, data):
    bond_dim = data.draw(st.tuples(*[limits] * (num_sites - 1)))
    sites = try_layout(layout, rows, cols, bond_dim, num_sites)
    for left, i, o, right in sites.core_shapes if sites else ():
        assert right <= left * i * o and left <= i * o * right


@pytest.mark.parametrize("layout", WIDE)
@SETTINGS
@given(rows=sizes, cols=sizes, num_sites=odd_sites, limit=limits)
def test_wide_layouts_are_exact_at_any_limit(layout, rows, cols, num_sites, limit):
    sites = try_layout(layout, rows, cols, limit, num_sites)
    if sites is not None:
        assert sites.is_exact
        assert sites.bonds == sites.full_bonds == full_bonds(sites.in_dims, sites.out_dims)


@pytest.mark.parametrize("num_sites", [3, 5, 7])
@pytest.mark.parametrize("layout", TIED)
def test_full_bonds_against_their_definition(layout, num_sites):
    sites = LAYOUTS[layout](768, 3072, 10**9, num_sites)
    sizes = [i * o for i, o in zip(sites.in_dims, sites.out_dims, strict=True)]
    expected = tuple(min(prod(sizes[:k]), prod(sizes[k:])) for k in range(1, num_sites))
    assert sites.full_bonds == expected == sites.bonds
    assert sites.is_exact
    cut = replace(sites, bonds=(sites.bonds[0] - 1, *sites.bonds[1:]))
    assert not cut.is_exact


# --- each layout against brute force ---


def cap(rows, cols, limit):
    """The limit, or the widest block that still meets a rest as large as itself."""
    return max(d for d in range(1, limit + 1) if d * d <= rows * cols)


@SETTINGS
@given(rows=sizes, cols=sizes, num_sites=odd_sites, limit=limits)
def test_one_sided_takes_the_largest_divisors(rows, cols, num_sites, limit):
    sites = try_layout("one-sided", rows, cols, limit, num_sites)
    best = [max(d for d in divisors(n) if d <= cap(rows, cols, limit)) for n in (rows, cols)]
    if sites is None:
        assert best == [1, 1]
        return
    c = sites.centre
    assert [prod(sites.in_dims[:c]), prod(sites.out_dims[c + 1 :])] == best
    assert set(sites.out_dims[:c]) | set(sites.in_dims[c + 1 :]) <= {1}


@SETTINGS
@given(rows=st.integers(1, 120), cols=st.integers(1, 120), limit=st.integers(1, 40))
def test_two_sided_takes_the_largest_then_the_most_balanced_block(rows, cols, limit):
    sites = try_layout("two-sided", rows, cols, limit, 3)
    widest = cap(rows, cols, limit)
    pairs = [(a, b) for a in divisors(rows) for b in divisors(cols) if a * b <= widest]
    most = max(a * b for a, b in pairs)
    if sites is None:
        assert most == 1
        return
    (a, _, c), (b, _, d) = sites.in_dims, sites.out_dims
    assert a * b == most
    assert max(a, b) / min(a, b) == min(max(p) / min(p) for p in pairs if prod(p) == most)
    rest = [(c, d) for c in divisors(rows // a) for d in divisors(cols // b) if c * d <= widest]
    assert c * d == max(prod(p) for p in rest)


def test_outer_sites_share_the_block_nearly_equally():
    sites = one_sided(768, 3072, 64, 5)
    assert sites.in_dims == (8, 8, 12, 1, 1)
    assert sites.out_dims == (1, 1, 48, 8, 8)
    assert one_sided(768, 3072, 64, 7).in_dims[:3] == (4, 4, 4)


def test_one_limit_per_bond_holds_at_the_partial_products():
    sites = one_sided(768, 3072, (2, 64, 32, 16), 5)
    assert sites.bonds == (2, 64, 32, 4)  # 32 outputs nearly equally as 8 * 4, 4 <= 16
    assert sites.in_dims[:2] == (2, 32)


def test_missing_factors_become_trivial_sites():
    sites = one_sided(172, 64, 64, 5)
    assert sites.in_dims == (1, 43, 4, 1, 1)
    assert sites.is_exact


@pytest.mark.parametrize("num_sites", [3, 5])
@pytest.mark.parametrize("layout", TIED)
@pytest.mark.parametrize(
    "rows, cols", [(4096, 11008), (13696, 4864), (896, 4864), (172, 64), (64, 172), (43, 8)]
)
def test_awkward_sizes_are_split(layout, rows, cols, num_sites):
    sites = LAYOUTS[layout](rows, cols, 64, num_sites)
    assert sites.auxiliary_params > num_sites - 1
    assert (sites.rows, sites.cols) == (rows, cols)


@pytest.mark.parametrize("number", [43, 11008, 13696])
def test_a_large_prime_sits_at_the_centre(number):
    factors = near_equal_factors(number, 5)
    assert prod(factors) == number
    assert factors[2] == max(factors)


@pytest.mark.parametrize(
    "number, factors",
    [
        (768, (3, 4, 4, 4, 4)),
        (3072, (4, 4, 8, 6, 4)),
        (4096, (4, 4, 8, 8, 4)),
        (1024, (4, 4, 4, 4, 4)),
    ],
)
def test_near_equal_factors_are_those_of_the_reference(number, factors):
    assert near_equal_factors(number, 5) == factors


@SETTINGS
@given(number=st.integers(1, 20000), parts=st.integers(1, 9))
def test_near_equal_factors_multiply_back(number, parts):
    factors = near_equal_factors(number, parts)
    assert len(factors) == parts
    assert prod(factors) == number
    assert factors[parts // 2] == max(factors)


def test_reference_bonds_of_gpt2():
    sites = balanced(768, 3072, 10**9, 5)
    assert sites.bonds == (12, 192, 384, 16)
    # Table of the source: auxiliaries 12^2 + 192^2 + 384^2 + 16^2, centre as many as the matrix.
    assert sites.auxiliary_params == sum(bond**2 for bond in sites.bonds)
    assert sites.central_params == 768 * 3072


# --- choosing and parsing ---


@pytest.mark.parametrize("layout", TIED)
def test_choose_calls_the_layout(layout):
    chosen = choose(768, 3072, layout=layout, num_sites=5, bond_dim=64)
    assert chosen == LAYOUTS[layout](768, 3072, 64, 5)


def test_factors_take_precedence_and_are_swapped_for_the_second_matrix():
    factors = parse_factors("3,4,4,4,4x4,4,8,6,4")
    options = {"layout": "one-sided", "num_sites": 3, "bond_dim": 64, "factors": factors}
    up = choose(768, 3072, **options)
    down = choose(3072, 768, **options)
    assert (up.in_dims, up.out_dims) == factors == (down.out_dims, down.in_dims)
    assert up.bonds == (12, 64, 64, 16)


@SETTINGS
@given(st.lists(st.tuples(st.integers(1, 99), st.integers(1, 99)), min_size=1, max_size=7))
def test_parse_factors_round_trip(pairs):
    first, second = zip(*pairs, strict=True)
    text = f"{','.join(map(str, first))} x {', '.join(map(str, second))}"
    assert parse_factors(text) == (first, second)


@SETTINGS
@given(st.text(alphabet="0123456789x,.- ²٣a", max_size=12))
def test_parse_factors_never_fails_otherwise(text):
    try:
        first, second = parse_factors(text)
    except SitesError as error:
        assert repr(text) in str(error)
    else:
        assert len(first) == len(second)
        assert min(first + second) > 0


# --- errors say what was found, what was expected and what to do ---


@pytest.mark.parametrize(
    "text, said",
    [
        ("3,4,4", "0 x instead of one"),
        ("3x4x5", "2 x instead of one"),
        ("3,x4,4", "'' in the factors"),
        ("3,0,2x4,4,4", "'0' in the factors '3,0,2x4,4,4' is not a positive integer"),
        ("3,-1x4,4", "'-1' in the factors"),
        ("3,4x4,4,4", "2 entries before the x and 3 after it"),
    ],
)
def test_bad_factor_text(text, said):
    with pytest.raises(SitesError) as error:
        parse_factors(text)
    assert said in str(error.value)


@pytest.mark.parametrize(
    "call, said",
    [
        (
            lambda: explicit(768, 3072, (3, 4, 4, 4, 5), (4, 4, 8, 6, 4), 64),
            "the factors of the input multiply to 960 (3 * 4 * 4 * 4 * 5), but the matrix is "
            "768 x 3072 and needs 768 there",
        ),
        (
            lambda: explicit(768, 3072, (3, 4, 4, 4, 4), (4, 4, 8, 6, 8), 64),
            "the factors of the output multiply to 6144",
        ),
        (lambda: explicit(8, 8, (2, 2, 2), (8, 1, 1, 1, 1), 4), "3 factors for the input"),
        (lambda: explicit(8, 8, (2, 4), (4, 2), 4), "use an odd number from 3 on"),
        (lambda: one_sided(768, 3072, 64, 4), "4 sites have no central one"),
        (lambda: one_sided(768, 3072, 64, 1), "1 sites have no central one"),
        (lambda: one_sided(768, 3072, 0, 3), "bond dimension 0 is below 1"),
        (lambda: balanced(768, 3072, (4, -2), 3), "bond dimension -2 is below 1"),
        (lambda: one_sided(768, 3072, (64, 64, 64), 3), "3 bond dimensions (64, 64, 64) for 3"),
        (lambda: two_sided(768, 3072, (64,), 3), "3 sites, which have 2 bonds"),
        (
            lambda: choose(8, 8, layout="square", num_sites=3, bond_dim=4),
            "no layout is called 'square': choose one of blocks, one-sided, two-sided, balanced",
        ),
        (
            lambda: choose(0, 8, layout="balanced", num_sites=3, bond_dim=4),
            "a matrix with 0 rows cannot be split",
        ),
        (lambda: near_equal_factors(0, 3), "cannot split 0 into 3 factors"),
        (lambda: Sites((2, 2, 2), (2, 2), (2, 2)), "give both as many"),
        (lambda: Sites((2, 2, 2), (2, 2, 2), (2,)), "1 bond dimensions (2,) for 3 sites"),
        (lambda: Sites((2, 0, 2), (2, 2, 2), (2, 2)), "in_dims (2, 0, 2) has an entry below 1"),
    ],
)
def test_errors_say_what_is_wrong(call, said):
    with pytest.raises(SitesError) as error:
        call()
    assert said in str(error.value)


@pytest.mark.parametrize("layout", WIDE)
@pytest.mark.parametrize("num_sites", [3, 5])
def test_nothing_to_share_names_a_way_out_that_works(layout, num_sites):
    with pytest.raises(SitesError) as error:
        LAYOUTS[layout](11 * 43, 13 * 53, 8, num_sites)
    message = str(error.value)
    assert f"{layout} layout cannot split 473 x 689" in message
    assert "neither size has a divisor between 2 and the bond limit 8" in message
    assert "use bond_dim 11 or more, layout='balanced', explicit factors or kind='dense'" in message
    assert LAYOUTS[layout](473, 689, 11, num_sites).is_exact
    with pytest.raises(SitesError):
        LAYOUTS[layout](473, 689, 10, num_sites)
    assert balanced(473, 689, 8, num_sites).auxiliary_params > num_sites - 1


def test_two_primes_cannot_be_balanced():
    with pytest.raises(SitesError) as error:
        balanced(43, 53, 64, 5)
    assert "each size is prime or 1" in str(error.value)
    assert "layout='one-sided' with bond_dim 43 or more" in str(error.value)
    assert one_sided(43, 53, 43, 5).is_exact


@pytest.mark.parametrize("layout", TIED)
def test_sites_that_would_hold_nothing_are_refused(layout):
    """The number that is told is the largest whose cores all carry something."""

    def empty(count: int) -> bool:
        sites = LAYOUTS[layout](512, 768, 8, count)
        return any(i == o == 1 for i, o in zip(sites.in_dims, sites.out_dims, strict=True))

    with pytest.raises(SitesError, match=r"63 sites \(sites\) are too many for 512 x 768 in the") as error:
        choose(512, 768, layout=layout, num_sites=63, bond_dim=8)
    most = int(re.search(r"use (\d+) at most", str(error.value))[1])
    assert most == max(count for count in range(3, 63, 2) if not empty(count)) > 5
    assert choose(512, 768, layout=layout, num_sites=most, bond_dim=8).num_sites == most
    with pytest.raises(SitesError, match="65 sites are more than any matrix fills: use 63 at most"):
        choose(512, 768, layout=layout, num_sites=65, bond_dim=8)


@pytest.mark.parametrize("layout", TIED)
def test_only_dense_copies_are_left_for_a_prime_vector(layout):
    with pytest.raises(SitesError, match="; use kind='dense'$"):
        LAYOUTS[layout](1, 7, 64, 3)
