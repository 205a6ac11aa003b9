"""A budget becomes ranks: what every rank of every matrix loses, and the ranks that lose least.

`allocation` has the algorithms; here is what they are fed with and what comes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..errors import RecipeError
from ..planning.plan import Budget, BudgetPoint, MatrixPlan, Plan
from ..planning.recipe import Recipe
from . import allocation
from .allocation import Candidate, Ranks

# Shares of the dense FFNs' numbers at which a plan predicts the error.
CURVE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

# What was measured counts at least as this part of the mean.
_LEAST = 0.01
_NOTHING = 1e-6
# Sensitivities are measured where matrices keep at most this share, whatever the budget.
_LARGEST_MEASURED = 0.9


def candidates(whole: Plan, spectra: Sequence[np.ndarray], recipe: Recipe) -> list[Candidate]:
    """The matrices of a plan that compresses nothing, with what every rank of them loses.

    Losses are nats per token for metric "loss" with its own allocation, else squared relative errors.

    Args:
        spectra: per matrix the squared singular values in the recipe's metric.
    """
    return [_candidate(*each, recipe) for each in zip(whole.matrices, spectra, strict=True)]


def _candidate(matrix: MatrixPlan, values: np.ndarray, recipe: Recipe) -> Candidate:
    losses = np.append(values[::-1].cumsum()[::-1], 0.0)
    if recipe.allocation == "loss":
        losses = losses / 2
    elif losses[0] > 0:
        losses = losses / losses[0]
    rows, cols, copies = matrix.rows, matrix.cols, _copies(matrix)
    return Candidate(matrix.name, copies * (rows + cols), copies * rows * cols, losses)


def measured_ranks(keep: float, whole: Plan, candidates: list[Candidate]) -> Ranks:
    """Where sensitivities are measured: the same share of every matrix."""
    budget = int(min(keep, _LARGEST_MEASURED) * whole.ffn_totals.dense_params) - _fixed(whole)
    return allocation.uniform(candidates, budget, allocation.smallest(candidates))


def as_measured(candidates: list[Candidate], ranks: Ranks, losses: dict[str, float]) -> list[Candidate]:
    """The candidates with losses between the expected and the measured ones, in nats: their geometric mean.

    A measurement at one rank and on little text is noisy, and taken at its word starves a matrix. In sum the
    losses are the measured ones at those ranks.
    """
    expected = {each.name: each.loss(ranks[each.name]) for each in candidates}
    # Where next to nothing should be lost, rounding is measured.
    whole = {each.name: float(each.losses[0]) for each in candidates}
    seen = [name for name in losses if expected[name] > _NOTHING * whole[name]]
    if not seen or not (mean := sum(max(losses[name], 0.0) for name in seen) / len(seen)):
        return candidates
    measured = {name: max(losses[name], _LEAST * mean) for name in seen}
    factors = {name: (measured[name] / expected[name]) ** 0.5 for name in seen}
    unit = sum(measured.values()) / sum(factors[name] * expected[name] for name in seen)
    others = sum(factors.values()) / len(seen)
    return [replace(each, losses=each.losses * unit * factors.get(each.name, others)) for each in candidates]


def choose(recipe: Recipe, whole: Plan, candidates: list[Candidate], tokens: int) -> tuple[Ranks, Budget]:
    dense, fixed = whole.ffn_totals.dense_params, _fixed(whole)
    start = allocation.smallest(candidates, recipe.max_error)
    least = (fixed + allocation.cost(candidates, start)) / dense
    allocate = allocation.uniform if recipe.allocation == "uniform" else allocation.greedy

    def ranks_for(keep: float) -> Ranks:
        return allocate(candidates, int(keep * dense) - fixed, start)

    if recipe.keep is None:
        ranks = start
    elif recipe.keep < least:
        raise RecipeError(_too_small(recipe, least, fixed / dense, limited=recipe.max_error is not None))
    else:
        ranks = ranks_for(recipe.keep)
    keep = (fixed + allocation.cost(candidates, ranks)) / dense
    shares = [(share, ranks_for(share)) for share in CURVE if share >= least]
    budget = Budget(
        smallest_keep=least,
        fixed=fixed / dense,
        tokens=tokens,
        errors={each.name: each.error(ranks[each.name]) for each in candidates},
        chosen=_point(keep, candidates, ranks, recipe),
        curve=tuple(_point(share, candidates, ranks, recipe) for share, ranks in shares),
    )
    return ranks, budget


def _fixed(whole: Plan) -> int:
    """Numbers that no rank changes: what experts own, biases, routers."""
    return whole.ffn_totals.stored_params - sum(_copies(m) * m.rows * m.cols for m in whole.matrices)


def _copies(matrix: MatrixPlan) -> int:
    return 1 if matrix.shares_whole else matrix.num_experts


def check_smallest(recipe: Recipe, whole: Plan) -> None:
    """Whether one rank per matrix fits, before anything is read."""
    dense, fixed = whole.ffn_totals.dense_params, _fixed(whole)
    least = (fixed + sum(_copies(m) * (m.rows + m.cols) for m in whole.matrices)) / dense
    if recipe.keep is not None and recipe.keep < least:
        raise RecipeError(_too_small(recipe, least, fixed / dense, limited=False))


def _point(keep: float, candidates: list[Candidate], ranks: Ranks, recipe: Recipe) -> BudgetPoint:
    errors = [each.error(ranks[each.name]) for each in candidates]
    in_nats = recipe.allocation in ("loss", "measured")
    loss = sum(each.loss(ranks[each.name]) for each in candidates) if in_nats else None
    return BudgetPoint(keep, float(np.mean(np.square(errors)) ** 0.5), loss)


def _too_small(recipe: Recipe, least: float, fixed: float, *, limited: bool) -> str:
    limit = f" with max_error {recipe.max_error:g}" if limited else ""
    other = "--max-error" if limited else "--keep"
    return (
        f"keep is {recipe.keep:g}, and the smallest that can be met{limit} is {_round_up(least):g}: what "
        f"experts own, biases and routers alone take {fixed:.3f} of the dense FFNs; raise {other}, or lower "
        "--bond-dim or --experts"
    )


def _round_up(value: float) -> float:
    return float(np.ceil(value * 1000) / 1000)
