"""How a matrix is split into sites and bonds: integers only, no tensors.

A matrix with ``rows`` input features and ``cols`` output features becomes a chain of cores. Site k
carries ``in_dims[k]`` of the input and ``out_dims[k]`` of the output; neighbours share a bond::

        in_0         in_1         in_2            prod(in_dims)  = rows
         |            |            |
       [core]--b_0--[core]--b_1--[core]           core k: (bond_left, in_dim, out_dim, bond_right)
         |            |            |
        out_0        out_1        out_2           prod(out_dims) = cols

The core in the middle is the central tensor, the others are the auxiliary tensors. A bond never
has to be wider than the product of the site sizes on its smaller side (its *full* dimension); where
every bond is full the chain is exact. The full-bond rule is that of MPOE, arXiv 2203.01104.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt, prod

from ..errors import SitesError
from ..options import assigned, called
from ..runtime.shapes import modeling

Dims = tuple[int, ...]


@dataclass(frozen=True)
class Sites:
    """Sites and bonds of one matrix; ``bonds`` has one entry fewer than the lists of dimensions.

    Attributes:
        untied: per site, whether its core has a matrix for every value of the inputs to its right, or of the
            outputs to its left; see `blocks`. Empty: no core has.

    Raises:
        SitesError: the lists do not fit together, or a dimension is below 1.
    """

    in_dims: Dims
    out_dims: Dims
    bonds: Dims
    untied: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        if len(self.in_dims) != len(self.out_dims):
            raise SitesError(
                f"the input is split into {len(self.in_dims)} sites {self.in_dims} and "
                f"the output into {len(self.out_dims)} {self.out_dims}: give both as many "
                "(1 is a valid factor)"
            )
        if not self.untied:
            check_num_sites(len(self.in_dims))
        _check_bond_count(self.bonds, len(self.in_dims))
        for name, values in (("in_dims", self.in_dims), ("out_dims", self.out_dims), ("bonds", self.bonds)):
            if min(values) < 1:
                raise SitesError(f"{name} {values} has an entry below 1: use dimensions from 1 on")

    @property
    def num_sites(self) -> int:
        """The number of cores."""
        return len(self.in_dims)

    @property
    def centre(self) -> int:
        """Index of the central site: the one in the middle, or the one that is not untied."""
        return self.untied.index(False) if self.untied else self.num_sites // 2

    @property
    def rows(self) -> int:
        """Input features."""
        return prod(self.in_dims)

    @property
    def cols(self) -> int:
        """Output features."""
        return prod(self.out_dims)

    @property
    def full_bonds(self) -> Dims:
        """The bonds without truncation; see the function of that name."""
        return full_bonds(self.in_dims, self.out_dims)

    @property
    def is_exact(self) -> bool:
        """True if no bond is truncated, so that any matrix of this size is represented without loss."""
        return all(bond >= full for bond, full in zip(self.bonds, self.full_bonds, strict=True))

    @property
    def core_shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """(bond_left, in_dim, out_dim, bond_right) of every core; the two ends have bond 1."""
        bonds = (1, *self.bonds, 1)
        return tuple(zip(bonds[:-1], self.in_dims, self.out_dims, bonds[1:], strict=True))

    @property
    def copies(self) -> Dims:
        """How many matrices every core has: one, or one per block if it is untied."""
        term = {"in_dims": self.in_dims, "out_dims": self.out_dims, "untied": self.untied}
        return tuple(modeling().count_copies(term))

    @property
    def core_params(self) -> Dims:
        """Parameters of every core."""
        return tuple(n * prod(shape) for n, shape in zip(self.copies, self.core_shapes, strict=True))

    @property
    def central_params(self) -> int:
        """Parameters of the central core."""
        return self.core_params[self.centre]

    @property
    def auxiliary_params(self) -> int:
        """Parameters of all other cores, for one expert."""
        return sum(self.core_params) - self.central_params


def full_bonds(in_dims: Dims, out_dims: Dims) -> Dims:
    """Bond dimensions without truncation: min(product of the sites left, right) per bond.

    768 x 3072 split as (3,4,4,4,4) x (4,4,8,6,4) gives (12, 192, 384, 16).
    """
    sizes = [i * o for i, o in zip(in_dims, out_dims, strict=True)]
    return tuple(min(prod(sizes[:k]), prod(sizes[k:])) for k in range(1, len(sizes)))


def near_equal_factors(number: int, parts: int) -> Dims:
    """``number`` as a product of ``parts`` near-equal factors, the biggest in the middle.

    Prime factors go, largest first, to the smallest product so far; with too few, the rest stays 1.
    Gives the lists of the MPOE reference code: 768 -> (3,4,4,4,4), 3072 -> (4,4,8,6,4),
    4096 -> (4,4,8,8,4).
    """
    if number < 1 or parts < 1:
        raise SitesError(f"cannot split {number} into {parts} factors: use numbers from 1 on")
    factors = [1] * parts
    for prime in reversed(_prime_factors(number)):
        factors[factors.index(min(factors))] *= prime
    arranged = [1] * parts
    for position, factor in zip(_from_the_middle(parts), sorted(factors, reverse=True), strict=True):
        arranged[position] = factor
    return tuple(arranged)


def one_sided(rows: int, cols: int, max_bond: int | Dims, num_sites: int) -> Sites:
    """Outer sites on the left carry input only, on the right output only; exact at any bond limit.

    ::

          64     rows/64                  768 x 3072 at bond 64, three sites:
           |        |                     in_dims (64, 12, 1), out_dims (1, 48, 64), bonds (64, 64);
          [L]--64--[C]--64--[R]           C has as many parameters as the matrix, L and R 64 * 64
                    |        |
                 cols/64     64

    With them ``W = (L (x) I) C (I (x) R)`` acts on the activations, so that no expert's matrix has
    to be rebuilt.

    Args:
        rows, cols: size of the matrix, input features first.
        max_bond: limit for every bond, or one per bond.
        num_sites: odd, at least 3.

    Raises:
        SitesError: neither size has a divisor between 2 and the limit.
    """
    limits = _limits(max_bond, num_sites)
    half = num_sites // 2
    widest = isqrt(rows * cols)  # a wider outer block would only meet a smaller rest
    left, _ = _largest_block(rows, 1, min(limits[half - 1], widest))
    _, right = _largest_block(1, cols, min(limits[half], widest))
    return _wide("one-sided", rows, cols, (left, 1), (1, right), limits)


def blocks(rows: int, cols: int, max_bond: int | Dims, num_sites: int = 3) -> Sites:
    """Untied cores on the smaller side, a square matrix per block and a scale per feature; always exact.

    ::

         1      64    12          768 x 3072 at bond 64: in_dims (1, 64, 12), out_dims (1, 1, 3072), bonds
         |      |     |           (1, 64); the 768 inputs are 12 blocks, W[block p] = diag(s_p) R_p C[block p]
        [s]--1--[R]-64-[C]--3072  with s 768 numbers, R 12 matrices of 64 x 64, and C as large as W
         |______|_____|
           768  |__12_|           s has a number for each input, R a matrix for each block of them

    The block tensor train of two cores (BTT, arXiv 2406.06248) with the small core per expert and scales
    apart from it, as in FuRA (arXiv 2605.22869). A `one_sided` chain multiplies all blocks by the same one.

    Args:
        rows, cols: size of the matrix, input features first. Of equal sizes the input is split.
        max_bond: limit for the size of a block. Of one number per bond the largest counts: the bond beside
            the scales is 1.
        num_sites: 3.

    Raises:
        SitesError: the smaller size has no divisor between 2 and the limit, or ``num_sites`` is not 3.
    """
    if num_sites != 3:
        raise SitesError(
            f"the blocks layout has 3 sites, found {num_sites}: omit {called('sites')}, or use "
            f"{assigned('layout', 'one-sided')}"
        )
    limit = max(_limits(max_bond, num_sites))
    side = min(rows, cols)
    block = max(size for size in _divisors(side) if size <= limit)
    if block == 1:
        raise SitesError(
            f"the blocks layout cannot split {rows} x {cols}: {side} has no divisor between 2 and the bond "
            f"limit {limit}, so experts would own no matrices; use "
            + (f"{called('bond_dim')} {_prime_factors(side)[0]} or more, " if side > 1 else "")
            + f"{assigned('layout', 'one-sided')} or {assigned('kind', 'dense')}"
        )
    if rows <= cols:
        return Sites((1, block, rows // block), (1, 1, cols), (1, block), (True, True, False))
    return Sites((rows, 1, 1), (cols // block, block, 1), (block, 1), (False, True, True))


def two_sided(rows: int, cols: int, max_bond: int | Dims, num_sites: int) -> Sites:
    """Outer sites carry input and output together, as in MPOE; exact at any bond limit.

    ::

          a    rows/(a a')   a'        a * b and a' * b' are as large as the limit allows;
          |        |         |         of several such pairs the most balanced one is taken
         [L]--ab--[C]-a'b'--[R]
          |        |         |
          b    cols/(b b')   b'

    Arguments and errors as for `one_sided`.
    """
    limits = _limits(max_bond, num_sites)
    half = num_sites // 2
    widest = isqrt(rows * cols)
    a, b = _largest_block(rows, cols, min(limits[half - 1], widest))
    right = _largest_block(rows // a, cols // b, min(limits[half], widest))
    return _wide("two-sided", rows, cols, (a, b), right, limits)


def balanced(rows: int, cols: int, max_bond: int | Dims, num_sites: int) -> Sites:
    """Near-equal factors at every site, as in the MPOE reference code; truncated to the limit.

    Exact only at full bonds: 768 x 3072 over five sites needs (12, 192, 384, 16). Arguments as for
    `one_sided`.

    Raises:
        SitesError: both sizes are prime (or 1): every auxiliary tensor would be a single number.
    """
    limits = _limits(max_bond, num_sites)
    sites = _build(near_equal_factors(rows, num_sites), near_equal_factors(cols, num_sites), limits)
    if _is_trivial(sites):
        raise SitesError(
            f"the balanced layout cannot split {rows} x {cols}: each size is prime or 1, so every "
            "auxiliary tensor would be a single number and all experts the same; "
            f"{_suggestion(rows, cols, 'balanced')}"
        )
    return sites


def explicit(rows: int, cols: int, in_dims: Dims, out_dims: Dims, bond_dim: int | Dims) -> Sites:
    """The site dimensions as given; bonds are the full ones, truncated to the limit.

    Raises:
        SitesError: a product is not the size it should be, the lists differ in length, or a limit
            is wrong.
    """
    for name, dims, size in (("input", in_dims, rows), ("output", out_dims, cols)):
        if prod(dims) != size:
            written = " * ".join(map(str, dims))
            raise SitesError(
                f"the factors of the {name} multiply to {prod(dims)} ({written}), but the matrix "
                f"is {rows} x {cols} and needs {size} there: give factors whose product is {size}"
            )
    if len(in_dims) != len(out_dims):
        raise SitesError(
            f"{len(in_dims)} factors for the input {in_dims} and {len(out_dims)} for the output "
            f"{out_dims}: give both as many (1 is a valid factor)"
        )
    return _build(tuple(in_dims), tuple(out_dims), _limits(bond_dim, len(in_dims)))


# Every site but the central one carries a factor of at least 2, and no matrix has 2 ** 63 entries.
MOST_SITES = 63
# As many are cut without asking: the paper's number.
_USUAL_SITES = 5
# How `mpo` computes singular vectors.
SVDS = ("auto", "exact", "randomized")
LAYOUTS: dict[str, Callable[[int, int, int | Dims, int], Sites]] = {
    "blocks": blocks,
    "one-sided": one_sided,
    "two-sided": two_sided,
    "balanced": balanced,
}


def choose(
    rows: int,
    cols: int,
    *,
    layout: str,
    num_sites: int,
    bond_dim: int | Dims,
    factors: tuple[Dims, Dims] | None = None,
) -> Sites:
    """Sites of a ``rows x cols`` matrix by layout, or by explicit factors, which take precedence.

    Args:
        rows, cols: size of the matrix, input features first.
        layout: a key of `LAYOUTS`.
        num_sites: odd, at least 3; with ``factors`` their length counts instead.
        bond_dim: limit for all bonds, or one per bond (``num_sites - 1`` of them).
        factors: dimensions of the first and of the second size. An FFN's second matrix has the
            sizes the other way round, so the two lists are swapped where only that fits.

    Raises:
        SitesError: unknown layout, impossible factors or limits, or a size it cannot split.
    """
    for name, size in (("rows", rows), ("columns", cols)):
        if size < 1:
            raise SitesError(f"a matrix with {size} {name} cannot be split: both sizes start at 1")
    if factors is not None:
        first, second = factors
        if (prod(first), prod(second)) != (rows, cols) == (prod(second), prod(first)):
            first, second = second, first
        return explicit(rows, cols, first, second, bond_dim)
    if layout not in LAYOUTS:
        raise SitesError(f"no layout is called {layout!r}: choose one of {', '.join(LAYOUTS)}")
    sites = LAYOUTS[layout](rows, cols, bond_dim, num_sites)
    if num_sites > _USUAL_SITES and (empty := _num_empty(sites)):
        raise SitesError(
            f"{num_sites} sites ({called('sites')}) are too many for {rows} x {cols} in the {layout} layout: "
            f"{empty} of them would be single numbers, which compute nothing; use "
            f"{_most_sites(layout, rows, cols, bond_dim, num_sites)} at most"
        )
    return sites


def parse_factors(text: str) -> tuple[Dims, Dims]:
    """``"3,4,4,4,4x4,4,8,6,4"`` -> ``((3, 4, 4, 4, 4), (4, 4, 8, 6, 4))``.

    Raises:
        SitesError: not two comma-separated lists of positive integers, as long as each other,
            joined by one x.
    """
    sides = text.lower().split("x")
    example = "write two lists of positive integers joined by x, like 3,4,4,4,4x4,4,8,6,4"
    if len(sides) != 2:
        raise SitesError(f"the factors {text!r} have {len(sides) - 1} x instead of one: {example}")
    parsed = []
    for side in sides:
        dims = [word.strip() for word in side.split(",")]
        for word in dims:
            if not (word.isascii() and word.isdecimal() and int(word) > 0):
                raise SitesError(f"{word!r} in the factors {text!r} is not a positive integer: {example}")
        parsed.append(tuple(map(int, dims)))
    if len(parsed[0]) != len(parsed[1]):
        raise SitesError(
            f"the factors {text!r} have {len(parsed[0])} entries before the x and {len(parsed[1])} "
            "after it: give both as many (1 is a valid factor)"
        )
    return parsed[0], parsed[1]


def check_num_sites(num_sites: int) -> None:
    """Raises SitesError for a number of sites without a central one, or that no matrix fills."""
    if num_sites > MOST_SITES:
        raise SitesError(f"{num_sites} sites are more than any matrix fills: use {MOST_SITES} at most")
    if num_sites < 3 or num_sites % 2 == 0:
        raise SitesError(
            f"{num_sites} sites have no central one with as many neighbours on both sides: "
            "use an odd number from 3 on"
        )


def _check_bond_count(bonds: Dims, num_sites: int) -> None:
    if len(bonds) != num_sites - 1:
        raise SitesError(
            f"{len(bonds)} bond dimensions {bonds} for {num_sites} sites, which have "
            f"{num_sites - 1} bonds: give {num_sites - 1}, or one number for all"
        )


def _limits(bond_dim: int | Dims, num_sites: int) -> Dims:
    check_num_sites(num_sites)
    limits = (bond_dim,) * (num_sites - 1) if isinstance(bond_dim, int) else tuple(bond_dim)
    _check_bond_count(limits, num_sites)
    if min(limits) < 1:
        raise SitesError(f"bond dimension {min(limits)} is below 1: use a limit from 1 on")
    return limits


def _build(in_dims: Dims, out_dims: Dims, limits: Dims) -> Sites:
    """Sites with the widest bonds that the limits and the neighbouring bonds leave room for."""
    check_num_sites(len(in_dims))
    sizes = [i * o for i, o in zip(in_dims, out_dims, strict=True)]
    # A bond has at most (neighbour) * (site between them) states: one pass each way settles it.
    bonds, last = list(limits), len(limits) - 1
    for k in range(len(bonds)):
        bonds[k] = min(bonds[k], sizes[k] * (bonds[k - 1] if k else 1))
    for k in reversed(range(len(bonds))):
        bonds[k] = min(bonds[k], sizes[k + 1] * (bonds[k + 1] if k < last else 1))
    return Sites(in_dims, out_dims, tuple(bonds))


def _wide(
    layout: str, rows: int, cols: int, left: tuple[int, int], right: tuple[int, int], limits: Dims
) -> Sites:
    """Sites with the given (input, output) dimensions in the outer blocks, the rest between."""
    half = len(limits) // 2
    left_sites = _split_block(left, limits[:half])
    right_sites = _split_block(right, limits[: half - 1 : -1])[::-1]
    middle = (rows // (left[0] * right[0]), cols // (left[1] * right[1]))
    in_dims, out_dims = zip(*left_sites, middle, *right_sites, strict=True)
    sites = _build(in_dims, out_dims, limits)
    if _is_trivial(sites):
        limit = max(limits[half - 1], limits[half])
        raise SitesError(
            f"the {layout} layout cannot split {rows} x {cols}: neither size has a divisor "
            f"between 2 and the bond limit {limit} that would leave the centre the larger part, so "
            "every auxiliary tensor would be a single number and all experts the same; "
            f"{_suggestion(rows, cols, layout)}"
        )
    return sites


def _split_block(block: tuple[int, int], limits: Dims) -> list[tuple[int, int]]:
    """Split an outer block over sites, from the chain's end inwards, near-equal, within limits."""
    if len(limits) == 1:
        return [block]
    size, count = prod(block), len(limits)
    # Near-equal: the part without the innermost site is at most the (count - 1)/count-th power.
    outer = _largest_block(*block, limits[-2], accept=lambda part: part**count <= size ** (count - 1))
    return [*_split_block(outer, limits[:-1]), (block[0] // outer[0], block[1] // outer[1])]


def _largest_block(
    rows: int, cols: int, limit: int, accept: Callable[[int], bool] = lambda part: True
) -> tuple[int, int]:
    """a | rows, b | cols with a * b <= limit as large as possible; of several the balanced one."""
    best = (1, 1)
    best_key: tuple[int, int, int] | None = None
    for a in _divisors(rows):
        for b in _divisors(cols):
            if a * b > limit:
                break
            # At a fixed product a small maximum is the balanced pair; then the larger input part.
            key = (a * b, -max(a, b), a)
            if (best_key is None or key > best_key) and accept(a * b):
                best, best_key = (a, b), key
    return best


def _is_trivial(sites: Sites) -> bool:
    """True if every auxiliary core is a single number, so that all experts would be the same."""
    return sites.auxiliary_params == sites.num_sites - 1


def _num_empty(sites: Sites) -> int:
    """How many cores carry neither input nor output."""
    return sum(i * o == 1 for i, o in zip(sites.in_dims, sites.out_dims, strict=True))


def _most_sites(layout: str, rows: int, cols: int, bond_dim: int | Dims, asked: int) -> int:
    """The largest number of sites, below what was asked for, all of which carry something."""
    limit = bond_dim if isinstance(bond_dim, int) else max(bond_dim)
    for count in range(asked - 2, _USUAL_SITES, -2):
        if not _num_empty(LAYOUTS[layout](rows, cols, limit, count)):
            return count
    return _USUAL_SITES


def _suggestion(rows: int, cols: int, layout: str) -> str:
    """The end of an error message: options that work for this size."""
    primes = [p for size in (rows, cols) for p in _prime_factors(size)[:1] if p * p <= rows * cols]
    options = []
    if primes:
        wide = "" if layout != "balanced" else f"{assigned('layout', 'one-sided')} with "
        options.append(f"{wide}{called('bond_dim')} {min(primes)} or more")
    if layout != "balanced" and not (_is_prime_or_one(rows) and _is_prime_or_one(cols)):
        options.append(assigned("layout", "balanced"))
    if primes:
        options.append(f"explicit {called('factors')}")
    last = assigned("kind", "dense")
    return f"use {', '.join(options)} or {last}" if options else f"use {last}"


def _is_prime_or_one(number: int) -> bool:
    return len(_prime_factors(number)) < 2


@lru_cache(maxsize=4096)
def _prime_factors(number: int) -> Dims:
    """Prime factors in ascending order, with multiplicity; none for 1."""
    primes, divisor = [], 2
    while divisor * divisor <= number:
        while number % divisor == 0:
            primes.append(divisor)
            number //= divisor
        divisor += 1
    return tuple(primes + [number] * (number > 1))


@lru_cache(maxsize=4096)
def _divisors(number: int) -> Dims:
    """All divisors in ascending order."""
    divisors = {1}
    for prime in _prime_factors(number):
        divisors |= {prime * divisor for divisor in divisors}
    return tuple(sorted(divisors))


def _from_the_middle(parts: int) -> Iterator[int]:
    """Positions 0..parts-1 from the middle outwards, right before left: 2, 3, 1, 4, 0 for five."""
    centre = parts // 2
    yield centre
    for step in range(1, parts):
        yield from (p for p in (centre + step, centre - step) if 0 <= p < parts)
