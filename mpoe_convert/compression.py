"""A budget becomes ranks: the spectra of all matrices in their metric, then the allocation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

import numpy as np
import torch

from . import allocation, sensitivity
from .allocation import Candidate, Ranks
from .building import pick_device, read_wide
from .calibration import Batch, Calibration, calibrate, make_batches
from .checkpoint import Checkpoint, open_checkpoint
from .correction import Corrections, check_correctable, correct
from .errors import MachineError, RecipeError
from .factoring import spectrum
from .moments import FFNMoments, metric_for
from .planning import Budget, BudgetPoint, MatrixPlan, Plan, plan_checkpoint
from .recipe import Recipe

# Shares of the dense FFNs' numbers at which a plan predicts the error.
CURVE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

# What was measured counts at least as this part of the mean.
_LEAST = 0.01
_NOTHING = 1e-6
# Sensitivities are measured where matrices keep at most this share, whatever the budget.
_LARGEST_MEASURED = 0.9

Progress = Callable[[str, int, int, object], None]


@dataclass(frozen=True)
class Prepared:
    """A plan and what its compressed matrices are to be near in."""

    plan: Plan
    calibration: Calibration | None = None
    corrections: Corrections | None = None
    batches: Sequence[Batch] = ()

    def moments(self, path: str) -> FFNMoments | None:
        """Of the FFN in the layer at that path."""
        return None if self.calibration is None else self.calibration.load(path)


def plan(
    recipe: Recipe,
    *,
    token: str | None = None,
    calibration: Sequence[Batch] | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Plan a conversion; nothing is written.

    From headers alone, a Hub id downloads no weights; but with `keep` or `max_error` the weights are read,
    and calibrated if the recipe says so. Arguments as for `convert`.

    Raises:
        MpoeError: the source, the recipe or their combination cannot be converted.
    """
    headers_only = not recipe.compresses
    checkpoint = open_checkpoint(
        recipe.model,
        revision=recipe.revision,
        token=token,
        headers_only=headers_only,
        trust_remote_code=recipe.trust_remote_code,
    )
    return prepare(recipe, checkpoint, calibration, progress, only_plan=True, token=token).plan


def prepare(
    recipe: Recipe,
    checkpoint: Checkpoint,
    batches: Sequence[Batch] | None = None,
    progress: Progress | None = None,
    *,
    only_plan: bool = False,
    token: str | None = None,
) -> Prepared:
    """The plan for an opened checkpoint, with ranks if the recipe compresses. Raises MpoeError.

    Args:
        only_plan: leave out corrections, which change no plan.
        token: for calibration data on the Hub.
    """
    whole = plan_checkpoint(recipe, checkpoint)
    calibrated = bool(recipe.calibrate) or batches is not None
    report = progress or (lambda *_: None)
    if not recipe.compresses:
        return _prepare_chains(whole, checkpoint, batches, report, only_plan, token)
    recipe = _resolved(whole.recipe, calibrated)
    device = _device(recipe)
    _check_smallest(recipe, whole)
    calibration = None
    if calibrated:
        calibration, batches = _calibrated(replace(whole, recipe=recipe), checkpoint, batches, report, token)
    candidates = _candidates(replace(whole, recipe=recipe), checkpoint, device, calibration, report)
    if recipe.allocation == "measured":
        start = _uniform_ranks(recipe, whole, candidates)
        work = replace(whole, recipe=recipe), checkpoint, calibration, batches, start, device
        losses = sensitivity.measure(*work, lambda what, *steps: report(f"measuring: {what}", *steps, None))
        candidates = _as_measured(candidates, start, losses)
    ranks, budget = _choose(recipe, whole, candidates, calibration.tokens if calibration else 0)
    plan = replace(plan_checkpoint(recipe, checkpoint, ranks), budget=budget)
    if only_plan or not recipe.correct:
        return Prepared(plan, calibration, batches=batches or ())
    corrections = correct(
        plan,
        checkpoint,
        calibration,
        batches,
        device,
        lambda *step: report("correcting: " + step[0], *step[1:], None),
    )
    return Prepared(plan, calibration, corrections, batches)


def _prepare_chains(
    whole: Plan,
    checkpoint: Checkpoint,
    batches: Sequence[Batch] | None,
    report: Progress,
    only_plan: bool,
    token: str | None,
) -> Prepared:
    """Without a budget: metrics for the chains that --bond-dim cuts, if the recipe asks for some."""
    recipe = whole.recipe
    if not recipe.calibrate and batches is None:
        if recipe.metric not in (None, "weights"):
            raise RecipeError(f"metric is {recipe.metric!r}; expected --calibrate with it")
        return Prepared(whole)
    if not any(matrix.is_cut for matrix in whole.matrices):
        raise RecipeError(
            "calibration given, and nothing is cut; expected --keep, --max-error or, with "
            "--layout balanced, a lower --bond-dim"
        )
    whole = replace(whole, recipe=recipe.replace(metric=recipe.metric or "outputs"))
    if only_plan:
        return Prepared(whole)
    calibration, batches = _calibrated(whole, checkpoint, batches, report, token)
    return Prepared(whole, calibration, batches=batches)


def _device(recipe: Recipe) -> torch.device:
    device = pick_device(recipe.device)
    if device.type == "mps":
        raise RecipeError("device mps lacks the float64 that compression needs; expected --device cpu")
    return device


def _calibrated(
    whole: Plan,
    checkpoint: Checkpoint,
    batches: Sequence[Batch] | None,
    report: Progress,
    token: str | None,
) -> tuple[Calibration, list[Batch]]:
    """The moments that the plan's metric takes, on the batches given or those of the recipe's text."""
    recipe = whole.recipe
    _check_libraries(recipe)
    batches = make_batches(recipe, checkpoint, token) if batches is None else list(batches)
    if recipe.correct:
        check_correctable(whole, batches)
    calibration = calibrate(
        whole,
        checkpoint,
        _device(recipe),
        batches,
        gradients=recipe.metric == "loss",
        progress=lambda what, *steps: report(f"calibrating: {what}", *steps, None),
    )
    return calibration, batches


def _resolved(recipe: Recipe, calibrated: bool) -> Recipe:
    """The recipe with its defaults filled in. Raises RecipeError if it wants calibration and has none."""
    metric = recipe.metric or ("loss" if calibrated else "weights")
    allocation = recipe.allocation or ("loss" if metric == "loss" else "energy")
    for name, value in (("metric", metric), ("allocation", allocation)):
        if value not in ("weights", "energy", "uniform") and not calibrated:
            raise RecipeError(
                f"{name} is {value!r}; expected --calibrate with it (from Python: calibration, if batches "
                "were given the first time)"
            )
    if recipe.correct and metric not in ("loss", "outputs"):
        raise RecipeError(
            f"correct given with metric {metric}; expected --calibrate and metric loss or outputs"
        )
    return recipe.replace(metric=metric, allocation=allocation)


def _candidates(
    plan: Plan,
    checkpoint: Checkpoint,
    device: torch.device,
    calibration: Calibration | None,
    report: Progress,
) -> list[Candidate]:
    found = []
    for done, ffn in enumerate(plan.ffns):
        moments = calibration.load(ffn.ffn.path) if calibration else None
        for matrix in ffn.matrices:
            report(f"spectrum of {matrix.name}", done, len(plan.ffns), None)
            weight = read_wide(checkpoint, matrix.source, device)
            values = spectrum(weight, metric_for(plan.recipe.metric, matrix, weight, moments)).cpu().numpy()
            found.append(_candidate(matrix, values, plan.recipe))
    return found


def _candidate(matrix: MatrixPlan, values: np.ndarray, recipe: Recipe) -> Candidate:
    """Losses are nats per token for metric "loss" with its own allocation, else squared relative errors."""
    losses = np.append(values[::-1].cumsum()[::-1], 0.0)
    if recipe.allocation == "loss":
        losses = losses / 2
    elif losses[0] > 0:
        losses = losses / losses[0]
    rows, cols, copies = matrix.rows, matrix.cols, _copies(matrix)
    return Candidate(matrix.name, copies * (rows + cols), copies * rows * cols, losses)


def _uniform_ranks(recipe: Recipe, whole: Plan, candidates: list[Candidate]) -> Ranks:
    """Where sensitivities are measured: the same share of every matrix."""
    keep = min(recipe.keep, _LARGEST_MEASURED)
    budget = int(keep * whole.ffn_totals.dense_params) - _fixed(whole)
    return allocation.uniform(candidates, budget, allocation.smallest(candidates))


def _as_measured(candidates: list[Candidate], ranks: Ranks, losses: dict[str, float]) -> list[Candidate]:
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


def _choose(recipe: Recipe, whole: Plan, candidates: list[Candidate], tokens: int) -> tuple[Ranks, Budget]:
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


def _check_smallest(recipe: Recipe, whole: Plan) -> None:
    """Whether one rank per matrix fits, before anything is read."""
    dense, fixed = whole.ffn_totals.dense_params, _fixed(whole)
    least = (fixed + sum(_copies(m) * (m.rows + m.cols) for m in whole.matrices)) / dense
    if recipe.keep is not None and recipe.keep < least:
        raise RecipeError(_too_small(recipe, least, fixed / dense, limited=False))


def _check_libraries(recipe: Recipe) -> None:
    needed = ("accelerate", "greenlet", *(("datasets",) if recipe.calibrate else ()))
    if missing := [name for name in needed if find_spec(name) is None]:
        raise MachineError(
            f"calibration needs {' and '.join(missing)}: install them with pip install "
            "'mpoe-convert[calibrate]'"
        )


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
