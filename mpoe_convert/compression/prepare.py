"""Decide the ranks: calibrate, measure spectra, divide the budget, fit the corrections."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from ..decomposition.low_rank import spectrum
from ..devices import pick_device
from ..errors import MachineError, MpoeError, RecipeError
from ..experts.ffn import Activations
from ..extras import need
from ..options import assigned, called
from ..planning.plan import Plan
from ..planning.planner import plan_checkpoint
from ..planning.recipe import METRICS, Recipe
from ..planning.resolve import Resolved, check_search, needs_calibration, resolve_recipe
from ..ranks import ALONE, Ranks
from ..source.checkpoint import Checkpoint
from ..source.matrices import read_wide
from . import activations, dense_run, metrics
from .allocation import Candidate
from .allocation import Ranks as MatrixRanks
from .batches import Batch, check_batches, make_batches
from .budget import blend_measured, check_share, make_candidates, measured_ranks, ranks_in_budget
from .calibrate import calibrate
from .correction import Corrections, check_correctable, correct
from .dense_run import DenseRun
from .divergence import Divergence, measure_divergence
from .metrics import FitMetric
from .moment_cache import Calibration
from .moments import FFNMoments
from .sensitivity import measure_sensitivities

# The options that a search varies where the recipe leaves them open.
SEARCHED = ("metric", "allocation", "correct")
# Called with (what is worked on, FFNs done, FFNs in all, None).
Progress = Callable[[str, int, int, None], None]


@dataclass(frozen=True)
class Prepared:
    """A plan, and the data that its matrices are fitted to.

    Attributes:
        run: the calibration session; None without calibration.
        calibration: its moments; None without calibration, and of plans alone.
        corrections: the corrected matrices, if the recipe asks for them.
        activated: its activations, for kinds that look at them.
    """

    plan: Plan
    run: DenseRun | None = None
    calibration: Calibration | None = None
    corrections: Corrections | None = None
    activated: Calibration | None = None

    def moments(self, path: str) -> FFNMoments | None:
        """What was measured at the FFN in the layer at that path."""
        return None if self.calibration is None else self.calibration.load(path)

    def activations(self, path: str) -> Activations | None:
        """What was measured at the FFN in the layer at that path."""
        return None if self.activated is None else activations.load(self.activated, path)

    def source(self, checkpoint: Checkpoint) -> Checkpoint:
        """What the plan's matrices are read from, where the source was opened as `checkpoint`."""
        return checkpoint

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"run": None}  # the session stays in its process

    def check_reachable(self) -> None:
        """Raises MachineError if what was measured by another process is not on this machine's disks."""
        folders = [each.folder for each in (self.calibration, self.activated, self.corrections) if each]
        if lost := next((folder for folder in folders if not folder.is_dir()), None):
            raise MachineError(
                f"'{lost}' of the first process is not there for this one: calibrate on one machine, or set "
                "HF_HOME and TMPDIR to folders that all machines see"
            )

    def divergence(self, folder: Path) -> Divergence | None:
        """Distance of the artifact in a folder from the dense model; None without calibration."""
        if self.run is None or (self.calibration is None and self.activated is None):
            return None
        return measure_divergence(self.run, folder)


def prepare(
    recipe: Recipe,
    checkpoint: Checkpoint,
    batches: Sequence[Batch] | None = None,
    progress: Progress | None = None,
    *,
    only_plan: bool = False,
    token: str | None = None,
    ranks: Ranks = ALONE,
) -> Prepared:
    """The plan for an opened checkpoint, with ranks if the recipe compresses. Raises MpoeError.

    Args:
        batches: model inputs to calibrate on, instead of the recipe's text.
        only_plan: leave out corrections and moments of chains, which change no plan.
        token: Hub token for calibration data.
        ranks: the processes that share the batches of the calibration; they help as `help_collect` does.
    """
    report = progress or (lambda *_: None)
    calibrated = bool(recipe.calibrate) or batches is not None
    resolved = resolve_recipe(recipe, checkpoint, calibrated=calibrated)
    _check_metric(resolved.recipe, calibrated)
    if not recipe.compresses:
        return _prepare_chains(resolved, checkpoint, batches, report, only_plan, token, ranks)
    compressor = _Compressor(resolved, checkpoint, report, ranks)
    if calibrated:
        compressor.calibrate([resolved.recipe], batches, token)
    return compressor.prepare(resolved.recipe, only_plan)


def prepare_each(
    recipe: Recipe,
    checkpoint: Checkpoint,
    batches: Sequence[Batch] | None = None,
    progress: Progress | None = None,
    *,
    token: str | None = None,
    ranks: Ranks = ALONE,
) -> Iterator[Prepared]:
    """The variants that a search compares, calibrated once. Arguments as for `prepare`."""
    check_search(recipe, bool(recipe.calibrate) or batches is not None)
    resolved = resolve_recipe(recipe, checkpoint, calibrated=True)
    variants = [
        resolved.recipe.replace(search=False, **{name: getattr(variant, name) for name in SEARCHED})
        for variant in alternatives(recipe)
    ]
    compressor = _Compressor(resolved, checkpoint, progress or (lambda *_: None), ranks)
    compressor.calibrate(variants, batches, token)
    for variant in variants:
        if not variant.correct or compressor.can_correct:
            yield compressor.prepare(variant)


def alternatives(recipe: Recipe) -> list[Recipe]:
    """The combinations of metric, allocation and correction that a search tries; see `Recipe.search`."""
    searched = [name for name in metrics.METRICS if metrics.load(name).is_searched]
    found = []
    for name in [recipe.metric] if recipe.metric else searched:
        metric = metrics.load(name)
        allocations = [recipe.allocation] if recipe.allocation else [metric.allocation, "measured", "uniform"]
        corrections = [True, False] if metric.is_correctable and not recipe.correct else [recipe.correct]
        found += [
            recipe.replace(search=False, metric=name, allocation=allocation, correct=correct)
            for allocation, correct in product(allocations, corrections)
            if allocation != "loss" or metric.nats is not None
        ]
    for variant in found:
        _check_metric(variant, calibrated=True)
    return found


class _Compressor:
    """The data that all ways to compress one source have in common.

    Attributes:
        uncompressed: the plan without ranks.
        spectra / sensitivities: by metric.
    """

    def __init__(self, resolved: Resolved, checkpoint: Checkpoint, report: Progress, ranks: Ranks) -> None:
        self.resolved, self.checkpoint, self.report, self.ranks = resolved, checkpoint, report, ranks
        self.uncompressed = plan_checkpoint(resolved, checkpoint)
        self.device = compute_device(resolved.recipe)
        check_share(resolved.recipe, self.uncompressed)
        self.run: DenseRun | None = None
        self.calibration: Calibration | None = None
        self.spectra: dict[str, list[np.ndarray]] = {}
        self.sensitivities: dict[str, dict[str, float]] = {}

    def calibrate(self, recipes: list[Recipe], batches: Sequence[Batch] | None, token: str | None) -> None:
        """Collect the moments that any of the recipes needs."""
        self.run = open_run(self.uncompressed, recipes[0], self.checkpoint, batches, token, self.ranks)
        if all(recipe.correct for recipe in recipes):
            check_correctable(self.run)
        gradients = any(_metric(recipe).takes_gradients for recipe in recipes)
        self.calibration = _calibrated(self.run, gradients, self.report)

    @property
    def can_correct(self) -> bool:
        try:
            check_correctable(self._calibrated_run[0])
        except MpoeError:
            return False
        return True

    def prepare(self, recipe: Recipe, only_plan: bool = False) -> Prepared:
        """The plan of a recipe whose metric and allocation are given."""
        candidates = self._candidates(recipe)
        tokens = self.calibration.tokens if self.calibration else 0
        ranks, budget = ranks_in_budget(recipe, self.uncompressed, candidates, tokens)
        resolved = replace(self.resolved, recipe=recipe)
        plan = replace(plan_checkpoint(resolved, self.checkpoint, ranks), budget=budget)
        run = None if self.run is None else replace(self.run, plan=plan)
        corrections = None
        if recipe.correct and not only_plan:
            corrections = self._correct(plan, recipe)
        return Prepared(plan, run, self.calibration, corrections)

    def _candidates(self, recipe: Recipe) -> list[Candidate]:
        in_nats = recipe.allocation == "loss"
        candidates = make_candidates(
            self.uncompressed, self._spectra(recipe), _metric(recipe), in_nats=in_nats
        )
        if recipe.allocation != "measured":
            return candidates
        assert recipe.keep is not None  # the recipe refuses the allocation without
        ranks = measured_ranks(recipe.keep, self.uncompressed, candidates)
        return blend_measured(candidates, ranks, self._sensitivities(recipe, ranks))

    def _spectra(self, recipe: Recipe) -> list[np.ndarray]:
        """Per matrix, the squared singular values in the recipe's metric."""
        name = _metric_name(recipe)
        if name not in self.spectra:
            self.spectra[name] = list(self._measure_spectra(metrics.load(name)))
        return self.spectra[name]

    def _measure_spectra(self, metric: FitMetric) -> Iterator[np.ndarray]:
        ffns = self.uncompressed.ffns
        for done, ffn in enumerate(ffns):
            moments = self.calibration.load(ffn.ffn.path) if self.calibration else None
            for matrix in ffn.matrices:
                self.report(f"spectrum of {matrix.name}", done, len(ffns), None)
                weight = read_wide(self.checkpoint, matrix.source, self.device)
                yield spectrum(weight, metric.weigh(matrix, weight, moments)).cpu().numpy()

    def _sensitivities(self, recipe: Recipe, ranks: MatrixRanks) -> dict[str, float]:
        name = _metric_name(recipe)
        if name not in self.sensitivities:
            report = labelled(self.report, "measuring")
            self.sensitivities[name] = measure_sensitivities(
                *self._calibrated_run, _metric(recipe), ranks, report
            )
        return self.sensitivities[name]

    def _correct(self, plan: Plan, recipe: Recipe) -> Corrections:
        run, calibration = self._calibrated_run
        report = labelled(self.report, "correcting")
        return correct(replace(run, plan=plan), calibration, _metric(recipe), report)

    @property
    def _calibrated_run(self) -> tuple[DenseRun, Calibration]:
        assert self.run is not None and self.calibration is not None  # recipes that need them were refused
        return self.run, self.calibration


def _prepare_chains(
    resolved: Resolved,
    checkpoint: Checkpoint,
    batches: Sequence[Batch] | None,
    report: Progress,
    only_plan: bool,
    token: str | None,
    ranks: Ranks,
) -> Prepared:
    """Without a budget: moments for the chains that --bond-dim truncates, if the recipe asks for some."""
    plan, recipe = plan_checkpoint(resolved, checkpoint), resolved.recipe
    if not recipe.calibrate and batches is None:
        return Prepared(plan)
    if recipe.own_options.takes_activations():
        if only_plan:
            return Prepared(plan)
        run = open_run(plan, recipe, checkpoint, batches, token, ranks)
        return Prepared(plan, run, activated=activations.collect(run, labelled(report, "calibrating")))
    if not any(matrix.is_truncated for matrix in plan.matrices):
        raise RecipeError(
            f"{called('calibrate')} given, and nothing is truncated; expected {called('keep')}, "
            f"{called('max_error')} or, with {assigned('layout', 'balanced')}, a lower {called('bond_dim')}"
        )
    if not _metric(recipe).takes_chains:
        raise RecipeError(
            f"{assigned('metric', recipe.metric)} given without {called('keep')} or {called('max_error')}; "
            "chains do not take it"
        )
    if only_plan:
        return Prepared(plan)
    run = open_run(plan, recipe, checkpoint, batches, token, ranks)
    return Prepared(plan, run, _calibrated(run, _metric(recipe).takes_gradients, report))


def compute_device(recipe: Recipe) -> torch.device:
    """The recipe's device, which has float64. Raises RequestError, and RecipeError for MPS."""
    device = pick_device(recipe.device)
    if device.type == "mps":
        raise RecipeError(
            f"{assigned('device', 'mps')} lacks the float64 that compression needs; expected "
            f"{assigned('device', 'cpu')}"
        )
    return device


def open_run(
    plan: Plan,
    recipe: Recipe,
    checkpoint: Checkpoint,
    batches: Sequence[Batch] | None,
    token: str | None,
    ranks: Ranks,
) -> DenseRun:
    """The dense model on the batches given, or on those of the recipe's text."""
    readers = ("datasets",) if recipe.calibrate else ()
    need("calibration", "accelerate", "greenlet", *readers, extra="calibrate")
    if batches is None:
        batches = make_batches(recipe, checkpoint, token)
    else:
        is_one = isinstance(batches, (str, Mapping))  # which is told as no list, or as too few
        batches = [cast("Batch", batches)] if is_one else list(batches)
        check_batches(batches, checkpoint)
    return DenseRun(plan, checkpoint, tuple(batches), compute_device(recipe), ranks)


def _calibrated(run: DenseRun, gradients: bool, report: Progress) -> Calibration:
    return calibrate(run, gradients=gradients, progress=labelled(report, "calibrating"))


def labelled(report: Progress, label: str) -> dense_run.Progress:
    """`report` for one stage of the work."""
    return lambda what, done, total: report(f"{label}: {what}", done, total, None)


def _metric_name(recipe: Recipe) -> str:
    assert recipe.metric is not None  # filled in by `resolve_recipe`
    return recipe.metric


def _metric(recipe: Recipe) -> FitMetric:
    return metrics.load(_metric_name(recipe))


def _check_metric(recipe: Recipe, calibrated: bool) -> None:
    """Raises RecipeError: the metric needs calibration data, or cannot be corrected in."""
    if recipe.metric is None:
        return
    metric = _metric(recipe)
    if metric.takes_calibration and not calibrated:
        raise RecipeError(needs_calibration("metric", recipe.metric))
    if recipe.correct and not metric.is_correctable:
        correctable = assigned("metric", *(name for name in METRICS if metrics.load(name).is_correctable))
        raise RecipeError(
            f"{called('correct')} given with {assigned('metric', recipe.metric)}; expected "
            f"{called('calibrate')} and {correctable}"
        )
