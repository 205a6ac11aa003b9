"""What is cut, in which metric and behind which corrections: all that is known before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch

from ..decomposition.low_rank import spectrum
from ..devices import pick_device
from ..errors import MpoeError, RecipeError
from ..extras import need
from ..planning.plan import Plan, plan_checkpoint
from ..planning.recipe import Recipe
from ..source.checkpoint import Checkpoint, open_checkpoint
from ..source.matrices import read_wide
from . import sensitivity
from .allocation import Ranks
from .batches import Batch, make_batches
from .budget import as_measured, candidates, check_smallest, choose, measured_ranks
from .calibrate import Calibration, calibrate
from .correction import Corrections, check_correctable, correct
from .moments import FFNMoments, metric_for

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
    if recipe.search:
        raise RecipeError(
            "search given to a plan; it compares what is written, and a plan writes nothing: leave it out"
        )
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
    report = progress or (lambda *_: None)
    if not recipe.compresses:
        whole = plan_checkpoint(recipe, checkpoint)
        return _prepare_chains(whole, checkpoint, batches, report, only_plan, token)
    calibrated = bool(recipe.calibrate) or batches is not None
    recipe = _resolved(recipe, calibrated)
    compressor = _Compressor(recipe, checkpoint, report)
    if calibrated:
        compressor.calibrate(recipe, batches, token)
    return compressor.prepare(recipe, only_plan)


def prepare_each(
    recipe: Recipe,
    checkpoint: Checkpoint,
    batches: Sequence[Batch] | None = None,
    progress: Progress | None = None,
    *,
    token: str | None = None,
) -> Iterator[Prepared]:
    """What a search compares, one after the other; calibrated once. Arguments as for `prepare`."""
    if not recipe.calibrate and batches is None:
        raise RecipeError("search given without --calibrate; what comes out is compared on calibration text")
    ways = alternatives(recipe)
    compressor = _Compressor(ways[0], checkpoint, progress or (lambda *_: None))
    compressor.calibrate(ways[0].replace(correct=recipe.correct), batches, token)
    for way in ways:
        if not way.correct or compressor.can_correct:
            yield compressor.prepare(way)


def alternatives(recipe: Recipe) -> list[Recipe]:
    """The combinations of metric, allocation and correction that a search tries; see `Recipe.search`."""
    found = []
    for metric in (recipe.metric,) if recipe.metric else ("loss", "outputs"):
        own = "loss" if metric == "loss" else "energy"
        allocations = (recipe.allocation,) if recipe.allocation else (own, "measured", "uniform")
        corrections = (True,) if recipe.correct else (True, False)
        if metric not in ("loss", "outputs"):
            corrections = (recipe.correct,)
        found += [
            _resolved(
                recipe.replace(search=False, metric=metric, allocation=allocation, correct=correct), True
            )
            for allocation, correct in product(allocations, corrections)
            if allocation != "loss" or metric == "loss"
        ]
    return found


class _Compressor:
    """What all ways to compress one source share: the plan without ranks, moments, spectra, sensitivities."""

    def __init__(self, recipe: Recipe, checkpoint: Checkpoint, report: Progress):
        self.checkpoint, self.report = checkpoint, report
        self.whole = plan_checkpoint(recipe, checkpoint)
        self.device = _device(recipe)
        check_smallest(recipe, self.whole)
        self.calibration: Calibration | None = None
        self.batches: Sequence[Batch] = ()
        # By metric: spectra, and what cutting one matrix alone was seen to do.
        self.spectra: dict[str, list[np.ndarray]] = {}
        self.losses: dict[str, dict[str, float]] = {}

    def calibrate(self, recipe: Recipe, batches: Sequence[Batch] | None, token: str | None) -> None:
        whole = replace(self.whole, recipe=recipe)
        self.calibration, self.batches = _calibrated(whole, self.checkpoint, batches, self.report, token)

    @property
    def can_correct(self) -> bool:
        try:
            check_correctable(self.whole, self.batches)
        except MpoeError:
            return False
        return True

    def prepare(self, recipe: Recipe, only_plan: bool = False) -> Prepared:
        """By a recipe that leaves nothing open."""
        matrices = candidates(self.whole, self._spectra(recipe.metric), recipe)
        if recipe.allocation == "measured":
            ranks = measured_ranks(recipe.keep, self.whole, matrices)
            matrices = as_measured(matrices, ranks, self._losses(recipe, ranks))
        ranks, budget = choose(
            recipe, self.whole, matrices, self.calibration.tokens if self.calibration else 0
        )
        plan = replace(plan_checkpoint(recipe, self.checkpoint, ranks), budget=budget)
        corrections = self._correct(plan) if recipe.correct and not only_plan else None
        return Prepared(plan, self.calibration, corrections, self.batches)

    def _spectra(self, metric: str) -> list[np.ndarray]:
        if metric not in self.spectra:
            self.spectra[metric] = list(self._measure_spectra(metric))
        return self.spectra[metric]

    def _measure_spectra(self, metric: str) -> Iterator[np.ndarray]:
        ffns = self.whole.ffns
        for done, ffn in enumerate(ffns):
            moments = self.calibration.load(ffn.ffn.path) if self.calibration else None
            for matrix in ffn.matrices:
                self.report(f"spectrum of {matrix.name}", done, len(ffns), None)
                weight = read_wide(self.checkpoint, matrix.source, self.device)
                yield spectrum(weight, metric_for(metric, matrix, weight, moments)).cpu().numpy()

    def _losses(self, recipe: Recipe, ranks: Ranks) -> dict[str, float]:
        if recipe.metric not in self.losses:
            self.losses[recipe.metric] = sensitivity.measure(
                replace(self.whole, recipe=recipe),
                self.checkpoint,
                self.calibration,
                self.batches,
                ranks,
                self.device,
                lambda what, *steps: self.report(f"measuring: {what}", *steps, None),
            )
        return self.losses[recipe.metric]

    def _correct(self, plan: Plan) -> Corrections:
        return correct(
            plan,
            self.checkpoint,
            self.calibration,
            self.batches,
            self.device,
            lambda what, *steps: self.report(f"correcting: {what}", *steps, None),
        )


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
    readers = ("datasets",) if recipe.calibrate else ()
    need("calibration", "accelerate", "greenlet", *readers, extra="calibrate")
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
