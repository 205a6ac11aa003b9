"""Turn a recipe's budget into ranks and a `Budget`, with the algorithms of `allocation`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..errors import RecipeError
from ..options import called
from ..planning.plan import Budget, BudgetPoint, MatrixPlan, Plan
from ..planning.recipe import Recipe
from . import allocation
from .allocation import Candidate, Ranks
from .metrics import FitMetric

# Fractions of the dense FFNs' parameters at which a plan predicts the error.
CURVE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

# A measured loss counts at least as this fraction of the mean.
_LEAST = 0.01
# Expected losses below this fraction of the whole are rounding errors.
_NOTHING = 1e-6
# Sensitivities are measured where matrices keep at most this fraction, whatever the budget.
_LARGEST_MEASURED = 0.9
# Of a share that is computed.
_ROUNDING = 1e-9
# Allocations whose losses are nats per token.
_IN_NATS = ("loss", "measured")


def make_candidates(
    uncompressed: Plan, spectra: Sequence[np.ndarray], metric: FitMetric, *, in_nats: bool
) -> list[Candidate]:
    """The matrices of a plan without ranks, with their losses at every rank.

    Args:
        spectra: per matrix the (n,) squared singular values in the metric, descending.
        in_nats: losses are nats per token, by a metric that has them; else squared relative errors.
    """
    nats = metric.nats if in_nats else None
    return [_candidate(*each, nats) for each in zip(uncompressed.matrices, spectra, strict=True)]


def _candidate(matrix: MatrixPlan, values: np.ndarray, nats: float | None) -> Candidate:
    losses = np.append(values[::-1].cumsum()[::-1], 0.0)
    if nats is not None:
        losses = losses * nats
    elif losses[0] > 0:
        losses = losses / losses[0]
    rows, cols, copies = matrix.rows, matrix.cols, _copies(matrix)
    return Candidate(matrix.name, copies * (rows + cols), copies * rows * cols, losses)


def measured_ranks(keep: float, uncompressed: Plan, candidates: list[Candidate]) -> Ranks:
    """The ranks that sensitivities are measured at: the same fraction of every matrix."""
    dense = uncompressed.ffn_totals.dense_params
    budget = int(min(keep, _LARGEST_MEASURED) * dense) - _fixed(uncompressed)
    return allocation.uniform(candidates, budget, allocation.smallest(candidates))


def blend_measured(candidates: list[Candidate], ranks: Ranks, losses: dict[str, float]) -> list[Candidate]:
    """The candidates with the geometric mean of expected and measured losses, in nats.

    A measurement at one rank and on little text is noisy; alone it would starve a matrix. The sum of the
    losses at the measured ranks is that of the measurements.

    Args:
        losses: measured, by matrix name, at `ranks`.
    """
    expected = {each.name: each.loss(ranks[each.name]) for each in candidates}
    whole = {each.name: float(each.losses[0]) for each in candidates}
    seen = [name for name in losses if expected[name] > _NOTHING * whole[name]]
    if not seen or not (mean := sum(max(losses[name], 0.0) for name in seen) / len(seen)):
        return candidates
    measured = {name: max(losses[name], _LEAST * mean) for name in seen}
    factors = {name: (measured[name] / expected[name]) ** 0.5 for name in seen}
    unit = sum(measured.values()) / sum(factors[name] * expected[name] for name in seen)
    others = sum(factors.values()) / len(seen)
    return [replace(each, losses=each.losses * unit * factors.get(each.name, others)) for each in candidates]


def ranks_in_budget(
    recipe: Recipe, uncompressed: Plan, candidates: list[Candidate], tokens: int
) -> tuple[Ranks, Budget]:
    """The rank of every matrix under the recipe's `keep` and `max_error`, and what they promise.

    Args:
        tokens: of calibration text.

    Raises:
        RecipeError: `keep` is smaller than what rank 1, or the smallest ranks within `max_error`, need.
    """
    dense, fixed = uncompressed.ffn_totals.dense_params, _fixed(uncompressed)
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
    curve = [(fraction, ranks_for(fraction)) for fraction in CURVE if fraction >= least]
    budget = Budget(
        smallest_keep=least,
        fixed=fixed / dense,
        tokens=tokens,
        errors={each.name: each.error(ranks[each.name]) for each in candidates},
        chosen=_point(keep, candidates, ranks, recipe),
        curve=tuple(_point(fraction, candidates, ranks, recipe) for fraction, ranks in curve),
    )
    return ranks, budget


def _fixed(uncompressed: Plan) -> int:
    """Parameters that no rank changes: those of single experts, biases, routers."""
    matrices = sum(_copies(m) * m.rows * m.cols for m in uncompressed.matrices)
    return uncompressed.ffn_totals.stored_params - matrices


def _copies(matrix: MatrixPlan) -> int:
    return 1 if matrix.shares_whole else matrix.num_experts


def check_share(recipe: Recipe, uncompressed: Plan) -> None:
    """Check before anything is read that `keep` compresses, and that rank 1 of every matrix fits.

    Raises:
        RecipeError: it is above what the uncompressed experts store, or below the smallest.
    """
    whole = uncompressed.ffn_totals.stored_params / uncompressed.ffn_totals.dense_params
    if recipe.keep is not None and recipe.keep > whole + _ROUNDING:
        raise RecipeError(
            f"{called('keep')} is {recipe.keep:g}, and uncompressed the experts store only {whole:.3f} times "
            "the parameters of the dense FFNs; expected less, such as 0.6 for 60 %"
        )
    dense, fixed = uncompressed.ffn_totals.dense_params, _fixed(uncompressed)
    least = (fixed + sum(_copies(m) * (m.rows + m.cols) for m in uncompressed.matrices)) / dense
    if recipe.keep is not None and recipe.keep < least:
        raise RecipeError(_too_small(recipe, least, fixed / dense, limited=False))


def _point(keep: float, candidates: list[Candidate], ranks: Ranks, recipe: Recipe) -> BudgetPoint:
    errors = [each.error(ranks[each.name]) for each in candidates]
    in_nats = recipe.allocation in _IN_NATS
    loss = sum(each.loss(ranks[each.name]) for each in candidates) if in_nats else None
    return BudgetPoint(keep, float(np.mean(np.square(errors)) ** 0.5), loss)


def _too_small(recipe: Recipe, least: float, fixed: float, *, limited: bool) -> str:
    limit = f" with {called('max_error')} {recipe.max_error:g}" if limited else ""
    other = called("max_error" if limited else "keep")
    return (
        f"{called('keep')} is {recipe.keep:g}, and the smallest that can be met{limit} is "
        f"{_round_up(least):g}: the experts' own tensors, biases and routers alone take {fixed:.3f} of the "
        f"dense FFNs; raise {other}, or lower {called('bond_dim')} or {called('experts')}"
    )


def _round_up(value: float) -> float:
    """To three decimals."""
    return float(np.ceil(value * 1000) / 1000)
