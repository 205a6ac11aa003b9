"""Forms of a stack of experts' matrices: their sizes, and the ranks that a budget allows."""

from itertools import pairwise, product
from math import prod

import pytest
import torch

from mpoe_convert.decomposition.stacks import (
    FORMS,
    MULTIPLE,
    UNEVEN,
    count_stack,
    largest_ranks,
    packed_cores,
    ranks_within,
    shared_out_ranks,
    stack_terms,
)
from mpoe_convert.runtime.modeling_mpoe import Chain

RANKS = {"both": (3, 5), "whole": ()}


@pytest.mark.parametrize("form", FORMS)
def test_terms_store_what_is_counted(form):
    ranks = RANKS.get(form, (3,))
    chains = [Chain(term, 4) for term in stack_terms(form, ranks, 12, 10)]
    stored = sum(parameter.numel() for chain in chains for parameter in chain.parameters())
    assert count_stack(form, ranks, 4, 12, 10) == stored
    assert all(chain.acts for chain in chains)


@pytest.mark.parametrize(("form", "share"), list(product(FORMS, (0.15, 0.3, 0.5, 0.9, 1.2))))
@pytest.mark.parametrize(("num_experts", "in_dim", "out_dim"), [(5, 24, 16), (3, 7, 11), (6, 256, 192)])
def test_ranks_are_the_largest_within_a_budget(form, share, num_experts, in_dim, out_dim):
    numbers = int(share * num_experts * in_dim * out_dim)
    sizes = (num_experts, in_dim, out_dim)
    ranks = ranks_within(form, *sizes, numbers)
    if ranks is None:
        least = (1,) * len(RANKS.get(form, (3,)))
        assert count_stack(form, least, *sizes) > numbers
        return
    assert count_stack(form, ranks, *sizes) <= numbers
    for k, (rank, largest) in enumerate(zip(ranks, largest_ranks(form, *sizes), strict=True)):
        assert rank <= largest
        assert rank < 64 or rank % MULTIPLE == 0 or rank == largest
        more = min(rank + (1 if rank + 1 < 64 else MULTIPLE), largest)
        wider = (*ranks[:k], more, *ranks[k + 1 :])
        assert rank == largest or count_stack(form, wider, *sizes) > numbers


def test_two_ranks_go_where_the_spectra_are_long():
    flat, steep = torch.ones(64), torch.logspace(0, -6, 64)
    numbers = 3 * 64 * 64
    wide_in = ranks_within("both", 6, 64, 64, numbers, (flat, steep))
    wide_out = ranks_within("both", 6, 64, 64, numbers, (steep, flat))
    assert wide_in is not None and wide_out is not None
    assert wide_in[0] > 2 * wide_in[1] and wide_out[1] > 2 * wide_out[0]
    lost = [
        float(flat[first:].sum() + steep[second:].sum())
        for first, second in product(range(1, 65), repeat=2)
        if count_stack("both", (first, second), 6, 64, 64) <= numbers
    ]
    # Ranks from 64 on are multiples of 8: here only the full one.
    assert float(flat[wide_in[0] :].sum() + steep[wide_in[1] :].sum()) == pytest.approx(min(lost))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_without_spectra_both_ranks_take_the_same_part_of_their_sides(share):
    first, second = ranks_within("both", 8, 400, 200, int(share * 8 * 400 * 200))
    assert first / 400 == pytest.approx(second / 200, abs=0.06)


@pytest.mark.parametrize(
    ("form", "ranks", "message"),
    [
        ("tucker", (3,), "no form is called 'tucker': choose one of none, input, output, both, base, whole"),
        ("both", (3,), r"the form both has 2 ranks, found \(3,\)"),
        ("whole", (3,), r"the form whole has no ranks, found \(3,\)"),
        ("none", (), r"the form none has 1 rank, or one for each (expert|of 2 experts), found \(\)"),
        ("input", (3, 2), r"the form input has 1 rank, found \(3, 2\)"),
    ],
)
def test_wrong_forms_and_ranks(form, ranks, message):
    for call in (lambda: stack_terms(form, ranks, 4, 4), lambda: count_stack(form, ranks, 2, 4, 4)):
        with pytest.raises(ValueError, match=message):
            call()


def test_terms_keep_the_sizes():
    for form in FORMS:
        for term in stack_terms(form, RANKS.get(form, (3,)), 12, 10):
            assert (prod(term["in_dims"]), prod(term["out_dims"])) == (12, 10)


@pytest.mark.parametrize("form", UNEVEN)
def test_experts_with_ranks_of_their_own_store_what_is_counted(form):
    ranks = (3, 1, 5, 2)
    *base, term = stack_terms(form, ranks, 12, 10)
    chains = [Chain(each, 4).double() for each in (*base, term)]
    stored = sum(parameter.numel() for chain in chains for parameter in chain.parameters())
    assert count_stack(form, ranks, 4, 12, 10) == stored == len(base) * 120 + 11 * 22
    left, right = torch.randn(4, 12, 5).double(), torch.randn(4, 5, 10).double()
    cores = packed_cores([left, right], ranks)
    for core, name in zip(cores, chains[-1].core_names, strict=True):
        assert core.shape == getattr(chains[-1], name).shape
    for expert, rank in enumerate(ranks):
        torch.testing.assert_close(
            chains[-1].matrix(cores, expert), left[expert, :, :rank] @ right[expert, :rank]
        )
    assert stack_terms(form, (3,) * 4, 12, 10) == stack_terms(form, (3,), 12, 10)
    with pytest.raises(ValueError, match=r"has 1 rank, or one for each of 4 experts, found \(3, 1\)"):
        count_stack(form, (3, 1), 4, 12, 10)


def test_ranks_are_shared_out_where_least_is_lost():
    squares = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)).sort(1, descending=True).values
    squares *= torch.tensor([[4.0], [1.0], [0.3]])
    every = list(product(range(1, 5), repeat=3))
    lost = {each: sum(float(s[r:].sum()) for s, r in zip(squares, each, strict=True)) for each in every}
    totals = range(5, 13)
    for total, found in zip(totals, shared_out_ranks(squares, totals), strict=True):
        best = min((each for each in every if sum(each) == sum(found)), key=lost.__getitem__)
        assert lost[found] == pytest.approx(lost[best]) and total <= sum(found) <= total + 2
    long = torch.logspace(0, -3, 200).repeat(3, 1) * torch.tensor([[1.0], [0.5], [1e-9]])
    ranks = list(shared_out_ranks(long, [3 * rank for rank in range(20, 200, 7)]))
    assert all(rank < 64 or rank % MULTIPLE == 0 or rank == 200 for each in ranks for rank in each)
    assert all(less <= more for pair in pairwise(ranks) for less, more in zip(*pair, strict=True))
