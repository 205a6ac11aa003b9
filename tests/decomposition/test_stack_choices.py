"""What a stack can become: losses at all ranks, against NumPy's SVD and the fits themselves."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from mpoe_convert.decomposition.stack_choices import stack_choices
from mpoe_convert.decomposition.stack_curves import stack_curves
from mpoe_convert.decomposition.stack_fit import fit_stack
from mpoe_convert.decomposition.stack_metric import Stack
from mpoe_convert.decomposition.stacks import (
    FORMS,
    UNEVEN,
    count_stack,
    largest_ranks,
    rank_steps,
    ranks_within,
)

EXPERTS = 4
SIZES = [(12, 9), (9, 12)]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(in_dim, out_dim, tokens=60):
    """A stack, and inputs of its own for every expert, (E, tokens, in)."""
    mixed = randn(EXPERTS, tokens, in_dim, seed=1) @ randn(EXPERTS, in_dim, in_dim, seed=2)
    scales = torch.tensor([3.0, 1.0, 1.0, 0.2])[:, None, None]
    return randn(EXPERTS, in_dim, out_dim), mixed * scales


def tails(values):
    """What is left of squares without the first 0, 1 ... n."""
    return np.append(np.cumsum(np.square(values)[..., ::-1], -1)[..., ::-1].sum(0), 0.0)


@pytest.mark.parametrize(("in_dim", "out_dim"), SIZES)
def test_curves_are_tails_of_the_outputs_singular_values(in_dim, out_dim):
    weights, inputs = problem(in_dim, out_dim)
    found = stack_curves(Stack(weights, inputs.mT @ inputs), FORMS)
    answers = (inputs @ weights).numpy()
    alone = [np.linalg.svd(answer, compute_uv=False) for answer in answers]
    flat = np.concatenate(list(inputs.numpy()))
    mean = np.linalg.lstsq(flat, np.concatenate(list(answers)), rcond=None)[0]
    rests = [
        np.linalg.svd(a - x @ mean, compute_uv=False) for a, x in zip(answers, inputs.numpy(), strict=True)
    ]
    together = np.linalg.svd(np.concatenate(list(answers)), compute_uv=False)
    near = {"rtol": 1e-3, "atol": 1e-6 * found.energy}
    np.testing.assert_allclose(found.energy, np.square(answers).sum(), rtol=1e-3)
    np.testing.assert_allclose(found.lost["none"], tails(np.stack(alone)[:, :9]), **near)
    np.testing.assert_allclose(found.lost["base"], tails(np.stack(rests)[:, :9]), **near)
    np.testing.assert_allclose(found.lost["output"], tails(together[None]), **near)


@pytest.mark.parametrize(("in_dim", "out_dim"), SIZES)
def test_curves_are_the_closed_form_starts(in_dim, out_dim):
    weights, inputs = problem(in_dim, out_dim)
    moments = inputs.mT @ inputs
    found = stack_curves(Stack(weights, moments), ("input", "both"))
    assert set(found.lost) == {"input", "both"}
    for rank in (1, 4, 8):
        fit = fit_stack(weights, "input", (rank,), moments, max_sweeps=0)
        assert float(found.lost["input"][rank]) == pytest.approx(float(fit.lost.sum()), rel=1e-4)
    both = found.lost["both"]
    torch.testing.assert_close(both[:, -1], found.lost["input"], rtol=1e-6, atol=1e-9 * found.energy)
    assert both[0, 3] == both[3, 0] == pytest.approx(found.energy)
    assert (both[1:] <= both[:-1] + 1e-9).all() and (both[:, 1:] <= both[:, :-1] + 1e-9).all()


def test_without_moments_two_bases_are_hosvd():
    weights, _ = problem(12, 9)
    left = np.linalg.svd(np.concatenate(list(weights.numpy()), 1))[0]
    right = np.linalg.svd(np.concatenate(list(weights.numpy()), 0))[2]
    both = stack_curves(Stack(weights), ("both",)).lost["both"]
    for first, second in ((2, 3), (7, 5)):
        projected = left[:, :first].T @ weights.numpy() @ right[:second].T
        expected = np.square(weights.numpy()).sum() - np.square(projected).sum()
        assert float(both[first, second]) == pytest.approx(expected, rel=1e-4)


def test_some_experts_of_a_large_stack_stand_for_all(monkeypatch):
    weights, inputs = problem(12, 9)
    weights, moments = weights[:1].expand(40, -1, -1), (inputs.mT @ inputs)[:1].expand(40, -1, -1)
    exact = stack_curves(Stack(weights, moments), FORMS)
    monkeypatch.setattr("mpoe_convert.decomposition.stack_metric.SMALL", 0)
    rough = stack_curves(Stack(weights.float(), moments), FORMS)
    for form, lost in exact.lost.items():
        torch.testing.assert_close(rough.lost[form], lost, rtol=1e-3, atol=1e-5 * exact.energy)


def test_experts_that_were_not_looked_at_count_by_their_moments(monkeypatch):
    """Forty alike, but for the size of what they get, of which sixteen are looked at."""
    weights, inputs = problem(12, 9)
    sizes = torch.linspace(0.5, 1.5, 40)[:, None, None]
    weights, moments = weights[:1].expand(40, -1, -1), (inputs.mT @ inputs)[:1] * sizes
    exact = stack_curves(Stack(weights, moments), ("none",)).squares["none"]
    monkeypatch.setattr("mpoe_convert.decomposition.stack_metric.SMALL", 0)
    found = stack_curves(Stack(weights.float(), moments), ("none",))
    torch.testing.assert_close(found.squares["none"], exact, rtol=0.05, atol=1e-5 * found.energy)
    assert float(found.squares["none"].sum()) == pytest.approx(float(found.lost["none"][0]))


def test_an_expert_of_which_rounding_left_a_negative_moment_loses_about_nothing():
    weights, moments = randn(EXPERTS, 12, 9), torch.eye(12).repeat(EXPERTS, 1, 1).double()
    moments[-1] *= -1e-4
    found = stack_curves(Stack(weights, moments), FORMS)
    moments[-1] = 0
    exact = stack_curves(Stack(weights, moments), FORMS)
    for form, lost in exact.lost.items():
        torch.testing.assert_close(found.lost[form], lost, rtol=0.01, atol=1e-3 * exact.energy)


@pytest.mark.parametrize("moments", [True, False])
def test_choices_rise_in_numbers_and_fall_in_loss(moments):
    weights, inputs = problem(12, 9)
    metric = inputs.mT @ inputs if moments else None
    numbers = weights.numel() // 2
    found = stack_choices(weights, numbers, metric)
    for less, more in pairwise(found.choices):
        assert less.numbers < more.numbers and less.lost > more.lost
    for choice in found.choices:
        assert choice.numbers == count_stack(choice.form, choice.ranks, EXPERTS, 12, 9)
    smallest = min(count_stack(f, (1,) * len(largest_ranks(f, 2, 3, 3)), EXPERTS, 12, 9) for f in FORMS)
    assert found.choices[0].numbers == smallest and found.choices[-1].form == "whole"
    assert found.choices[0].lost < found.energy * (1 + 1e-9) and found.choices[-1].lost == 0


@pytest.mark.parametrize("form", UNEVEN)
@pytest.mark.parametrize("small", [True, False])
def test_experts_that_count_less_get_lower_ranks(form, small, monkeypatch):
    """The last expert's outputs are much smaller than the others'."""
    if not small:
        monkeypatch.setattr("mpoe_convert.decomposition.stack_metric.SMALL", 10)
    weights, inputs = problem(12, 9)
    inputs[-1] *= 0.05
    numbers, metric = int(0.8 * weights.numel()), inputs.mT @ inputs
    own, one = (
        stack_choices(weights, numbers, metric, forms=(form,), uneven=uneven) for uneven in (True, False)
    )
    assert one.choices and all(len(choice.ranks) == 1 for choice in one.choices)
    best = [[each for each in found.choices if each.numbers <= numbers][-1] for found in (own, one)]
    fits = [float(fit_stack(weights, form, choice.ranks, metric).lost.sum()) for choice in best]
    assert fits[0] < 0.9 * fits[1] and best[0].ranks[-1] == 1 < max(best[0].ranks)
    if small or form == "none":  # else the descent, of which nothing is known, gains more
        assert best[0].lost == pytest.approx(fits[0], rel=0.05)


def test_experts_of_one_size_have_one_rank():
    weights = randn(12, 9).expand(EXPERTS, -1, -1) + 1e-6 * randn(EXPERTS, 12, 9)
    found = stack_choices(weights, weights.numel() // 2, forms=("none",))
    assert found.choices and all(len(choice.ranks) == 1 for choice in found.choices)


@pytest.mark.parametrize("form", FORMS[:-1])
def test_the_best_ranks_within_the_budget_lose_what_their_fit_does(form):
    weights, inputs = problem(12, 9)
    numbers, metric = int(0.7 * weights.numel()), inputs.mT @ inputs
    found = stack_choices(weights, numbers, metric, forms=(form, "whole"))
    best = [choice for choice in found.choices if choice.numbers <= numbers][-1]
    fit = fit_stack(weights, form, best.ranks, metric)
    assert best.form == form and best.lost == pytest.approx(float(fit.lost.sum()), rel=1e-4)


def stack_of(kind):
    """Stacks of which one form says it with fewest numbers, plus noise of a thousandth."""
    e, i, o, r = 6, 40, 32, 4
    own_in, own_out = randn(e, i, r, seed=1), randn(e, r, o, seed=2)
    left, right = randn(i, 2 * r, seed=3), randn(2 * r, o, seed=4)
    built = {
        "none": own_in @ own_out,
        "input": left @ randn(e, 2 * r, o, seed=5),
        "output": randn(e, i, 2 * r, seed=6) @ right,
        "both": left @ randn(e, 2 * r, 2 * r, seed=7) @ right,
        "base": 3 * randn(i, o, seed=8) + own_in @ own_out,
    }[kind]
    return built + 1e-3 * randn(*built.shape, seed=9)


RANKS = {"none": (4,), "input": (8,), "output": (8,), "both": (8, 8), "base": (4,)}


@pytest.mark.parametrize("kind", RANKS)
@pytest.mark.parametrize("small", [True, False])
def test_the_form_that_a_stack_was_made_in_is_best(kind, small, monkeypatch):
    if not small:
        monkeypatch.setattr("mpoe_convert.decomposition.stack_metric.SMALL", 10)
    weights = stack_of(kind)
    numbers = count_stack(kind, RANKS[kind], *weights.shape)
    inputs = randn(6, 80, 40, seed=11)
    found = stack_choices(weights, numbers, inputs.mT @ inputs)
    best = [choice for choice in found.choices if choice.numbers <= numbers][-1]
    assert best.form == kind and (best.lost < 1e-4 * found.energy or (kind, small) == ("base", False))


def test_ranks_from_64_on_are_multiples_of_eight():
    """Those that `ranks_within` gives for one budget or another."""
    assert rank_steps(5) == [1, 2, 3, 4, 5]
    assert rank_steps(100) == [*range(1, 65), 72, 80, 88, 96, 100]
    for largest in (5, 64, 100):
        within = [ranks_within("none", 3, largest, 120, 3 * rank * (largest + 120)) for rank in range(1, 121)]
        assert rank_steps(largest) == sorted({ranks[0] for ranks in within})


def test_a_base_and_differences_lose_about_what_a_fit_at_each_rank_does():
    _, inputs = problem(16, 14)
    weights, moments = randn(16, 14, seed=9) + 0.6 * randn(EXPERTS, 16, 14), inputs.mT @ inputs
    found = stack_choices(weights, int(0.7 * weights.numel()), moments, forms=("base",), uneven=False)
    assert [choice.ranks for choice in found.choices] == [(1,), (2,), (3,), (4,), (5,)]
    for choice in found.choices:
        fit = fit_stack(weights, "base", choice.ranks, moments)
        assert choice.lost == pytest.approx(float(fit.lost.sum()), rel=0.2)
