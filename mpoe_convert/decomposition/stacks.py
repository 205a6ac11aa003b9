"""Re-express a stack of matrices, one per expert, as chains whose cores are shared or owned: forms and sizes.

::

    none     (in)--[own]--r--[own]--(out)                     each expert alone
    input    (in)--[shared]--r--[own]--(out)                  one basis of the inputs
    output   (in)--[own]--r--[shared]--(out)                  one basis of the outputs
    both     (in)--[shared]--r1--[own]--r2--[shared]--(out)   Tucker-2
    base     (in)--[shared]--(out)  +  (in)--[own]--r--[own]--(out)
    whole    (in)--[own]--(out)                               as it is

Where both cores are owned, experts may have ranks of their own. `stack_fit` finds the cores.
Sources: MoLAE (one-sided bases), TD-MoE (Tucker), D2-MoE (arXiv 2502.17298, base
and difference), SVD-LLM (arXiv 2403.07378, each alone).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..errors import counted

FORMS = ("none", "input", "output", "both", "base", "whole")
# Kernels for groups of products want ranks that are multiples of this. Ranks below `_FEW` are left as they
# are: rounding them down would waste more than a tenth of the numbers.
MULTIPLE = 8
_FEW = 8 * MULTIPLE

# Forms whose experts may have ranks of their own.
UNEVEN = ("none", "base")

Ranks = tuple[int, ...]


def stack_terms(form: str, ranks: Ranks, in_dim: int, out_dim: int) -> list[dict]:
    """The terms of a projection as `modeling_mpoe.Chain` takes them.

    Args:
        form: one of `FORMS`.
        ranks: (r1, r2) for "both", () for "whole", else (r,); for those of `UNEVEN` also one for each expert.
        in_dim, out_dim: size of one expert's matrix.

    Raises:
        ValueError: unknown form, or a number of ranks that it never has.
    """
    _check(form, ranks)
    if form == "both":
        three = {"in_dims": [in_dim, 1, 1], "out_dims": [1, 1, out_dim], "bonds": list(ranks)}
        return [three | {"shared": [True, False, True]}]
    matrix = {"in_dims": [in_dim], "out_dims": [out_dim], "bonds": [], "shared": [form == "base"]}
    if form == "whole":
        return [matrix]
    two: dict = {"in_dims": [in_dim, 1], "out_dims": [1, out_dim], "bonds": [max(ranks)]}
    if len(set(ranks)) > 1:
        two["by_expert"] = {"bonds": [[rank] for rank in ranks]}
    two["shared"] = [form == "input", form == "output"]
    return [matrix, two] if form == "base" else [two]


def count_stack(form: str, ranks: Ranks, num_experts: int, in_dim: int, out_dim: int) -> int:
    """Numbers that are stored for all experts. Arguments as for `stack_terms`.

    Raises:
        ValueError: unknown form, or another number of ranks.
    """
    _check(form, ranks, num_experts)
    if form == "whole":
        return num_experts * in_dim * out_dim
    if form == "both":
        first, second = ranks
        return in_dim * first + num_experts * first * second + second * out_dim
    if form in UNEVEN:
        base = in_dim * out_dim if form == "base" else 0
        return base + sum(each_rank(ranks, num_experts)) * (in_dim + out_dim)
    (rank,) = ranks
    ins = 1 if form == "input" else num_experts
    outs = 1 if form == "output" else num_experts
    return rank * (ins * in_dim + outs * out_dim)


def each_rank(ranks: Ranks, num_experts: int) -> Ranks:
    """One rank for each expert, of those of a form of `UNEVEN`."""
    return ranks * num_experts if len(ranks) == 1 else ranks


def packed_cores(cores: Sequence[Tensor], ranks: Ranks) -> list[Tensor]:
    """Two owned cores (E, in, r) and (E, r, out) as they are stored: vectors where experts' ranks differ.

    Args:
        ranks: of the experts; what lies behind an expert's own is left out.
    """
    first, second = cores
    if len(set(ranks)) <= 1:
        return [first, second]
    parts = list(zip(first, second, ranks, strict=True))
    return [
        torch.cat([left[:, :rank].flatten() for left, _, rank in parts]),
        torch.cat([right[:rank].flatten() for _, right, rank in parts]),
    ]


def shared_out_ranks(squares: Tensor, totals: Iterable[int]) -> Iterator[Ranks]:
    """One rank for each expert, about as many together as each total, that lose least: of the largest values.

    Every expert has at least 1, and from 64 on multiples of `MULTIPLE`.

    Args:
        squares: (E, n) squared singular values, descending.
        totals: rising.
    """
    count, largest = squares.shape
    experts = squares.flatten().argsort(descending=True, stable=True) // largest  # of all values, sorted
    ranks, before = torch.zeros(count, dtype=torch.int64), 0
    for total in totals:
        ranks += torch.bincount(experts[before:total], minlength=count)
        before = total
        yield tuple(max(_aligned(rank, largest), 1) for rank in ranks.tolist())


def ranks_within(
    form: str,
    num_experts: int,
    in_dim: int,
    out_dim: int,
    numbers: int,
    spectra: tuple[Tensor, Tensor] | None = None,
) -> Ranks | None:
    """The largest ranks with which a form stores at most so many numbers; None if even rank 1 stores more.

    From 64 on they are multiples of `MULTIPLE`, except for a rank that is all there can be.

    Args:
        form, num_experts, in_dim, out_dim: as for `stack_terms`.
        numbers: for all experts together.
        spectra: for "both", what every direction of the inputs and of the outputs is worth, descending,
            (in,) and (out,) (see `stack_fit.side_spectra`); the two ranks lose least together. None: both
            ranks take the same part of their sides.
    """
    if form == "whole":
        return () if count_stack(form, (), num_experts, in_dim, out_dim) <= numbers else None
    if form == "both":
        return _two_ranks(num_experts, in_dim, out_dim, numbers, spectra)
    start = count_stack(form, (0,), num_experts, in_dim, out_dim)
    slope = count_stack(form, (1,), num_experts, in_dim, out_dim) - start
    rank = _aligned((numbers - start) // slope, largest_ranks(form, num_experts, in_dim, out_dim)[0])
    return (rank,) if rank else None


def largest_ranks(form: str, num_experts: int, in_dim: int, out_dim: int) -> Ranks:
    """The ranks from which on a form is exact, or adds nothing."""
    if form == "whole":
        return ()
    if form == "both":
        return min(in_dim, num_experts * out_dim), min(out_dim, num_experts * in_dim)
    if form == "input":
        return (min(in_dim, num_experts * out_dim),)
    if form == "output":
        return (min(out_dim, num_experts * in_dim),)
    return (min(in_dim, out_dim),)


def rank_steps(largest: int) -> list[int]:
    """The ranks to choose from up to the largest: those that `ranks_within` gives."""
    return sorted({*range(1, min(_FEW, largest)), *range(_FEW, largest + 1, MULTIPLE), largest})


def _check(form: str, ranks: Sequence[int], num_experts: int | None = None) -> None:
    if form not in FORMS:
        raise ValueError(f"no form is called {form!r}: choose one of {', '.join(FORMS)}")
    needed = {"both": 2, "whole": 0}.get(form, 1)
    if len(ranks) == needed or (form in UNEVEN and len(ranks) > 1 and num_experts in (None, len(ranks))):
        return
    expected = "no ranks" if form == "whole" else counted(needed, "rank")
    if form in UNEVEN:
        experts = "expert" if num_experts is None else f"of {counted(num_experts, 'expert')}"
        expected += f", or one for each {experts}"
    raise ValueError(f"the form {form} has {expected}, found {tuple(ranks)}")


def _aligned(rank: int, largest: int) -> int:
    """At most `rank`: the largest one there can be, else a multiple; a few as they are; 0: none."""
    if rank >= largest:
        return largest
    return rank - rank % MULTIPLE if rank >= _FEW else max(rank, 0)


def _two_ranks(
    num_experts: int, in_dim: int, out_dim: int, numbers: int, spectra: tuple[Tensor, Tensor] | None
) -> Ranks | None:
    """Every first rank with the largest second one beside it; of these the pair that loses least."""
    largest = largest_ranks("both", num_experts, in_dim, out_dim)
    firsts = dict.fromkeys(_aligned(rank, largest[0]) for rank in range(1, largest[0] + 1))
    pairs = []
    for first in firsts:
        second = (numbers - in_dim * first) // (num_experts * first + out_dim)
        if second := _aligned(second, largest[1]):
            pairs.append((first, second))
    if not pairs:
        return None
    if spectra is None:
        return max(pairs, key=lambda pair: (min(pair[0] / in_dim, pair[1] / out_dim), sum(pair)))
    tails = [side.flip(0).cumsum(0).flip(0) for side in spectra]  # of the directions from k on
    tails = [torch.cat([tail, tail.new_zeros(1)]) for tail in tails]
    return min(pairs, key=lambda pair: sum(float(tail[k]) for tail, k in zip(tails, pair, strict=True)))
