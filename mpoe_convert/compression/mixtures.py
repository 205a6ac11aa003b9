"""Decide what the experts of a mixture become: which form, at which ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any

import torch

from ..decomposition.stack_choices import stack_choices
from ..decomposition.stacks import FORMS, UNEVEN, count_stack, ranks_within
from ..errors import CheckpointError, RecipeError, counted
from ..options import assigned, called
from ..planning.fewer_experts import FewerExperts, by_size
from ..planning.mixtures import (
    Chosen,
    MixturePlan,
    StackPlan,
    moment_bytes,
    plan_mixture,
    resolve_mixture,
)
from ..planning.plan import FFNPlan, MatrixPlan
from ..planning.recipe import Recipe
from ..planning.resolve import needs_calibration
from ..ranks import ALONE, Ranks
from ..source.checkpoint import Checkpoint
from ..source.in_memory import InMemory
from ..source.mixtures import Located, MixtureFamily, locate_experts, read_stack
from ..source.pruned import with_experts
from . import dense_run
from .batches import Batch
from .calibrate import check_spans, gradient_dtype
from .kept_experts import scored_layer
from .moment_cache import Calibration
from .prepare import Prepared, Progress, compute_device, labelled, open_run
from .shared import collect_shared
from .stack_budget import StackCandidate, shared_out, uniform

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .expert_moments import ExpertMoments, ExpertScores

# The smallest ranks of a form.
_LEAST = {"whole": (), "both": (1, 1)}


@dataclass(frozen=True)
class PreparedMixture(Prepared):
    """The plan for a mixture, and the data that its experts are fitted to."""

    def source(self, checkpoint: Checkpoint) -> Checkpoint:
        """The source with the experts that stay."""
        assert isinstance(self.plan, MixturePlan) and isinstance(checkpoint, InMemory)
        if self.plan.fewer is None:
            return checkpoint
        return with_experts(checkpoint, locate_experts(checkpoint), self.plan.fewer.kept)

    def expert_moments(self, path: str) -> ExpertMoments | None:
        """The moments at the experts of a layer; None where nothing is fitted to calibration text."""
        assert isinstance(self.plan, MixturePlan)
        if self.calibration is None or self.plan.recipe.keep is None:
            return None
        return _load(self.calibration, path, self.plan.fewer)


def prepare_mixture(
    recipe: Recipe,
    checkpoint: InMemory,
    batches: Sequence[Batch] | None = None,
    progress: Progress | None = None,
    *,
    only_plan: bool = False,
    token: str | None = None,
    ranks: Ranks = ALONE,
) -> PreparedMixture:
    """The plan for an opened mixture, with its experts, and forms and ranks if the recipe compresses.

    A plan alone, without calibration, reads no weights: every matrix has the same share there, and where the
    form is to be chosen, the sizes that each expert would have alone. Other arguments as for `prepare`.

    Raises:
        MpoeError: the recipe does not fit the mixture, or its budget cannot be met.
    """
    small, fewer = by_size(recipe, checkpoint)
    resolved = resolve_mixture(recipe, small)
    whole = plan_mixture(resolved, small, fewer=fewer)
    calibrated = bool(recipe.calibrate) or batches is not None
    _check_calibrated(recipe, fewer, calibrated, only_plan)
    if recipe.keep is not None:
        resolved = replace(resolved, recipe=_with_allocation(resolved.recipe, calibrated))
        _check_keep(resolved.recipe, whole)
    elif fewer is None:
        return PreparedMixture(whole)
    report = progress or (lambda *_: None)
    run = calibration = None
    if calibrated:
        source_plan = whole if fewer is None else _source_plan(recipe, checkpoint, fewer)
        run = open_run(source_plan, resolved.recipe, checkpoint, batches, token, ranks)
        if recipe.keep is not None:
            check_spans(run, max(_distinct_rows(matrix, resolved.recipe.top_k) for matrix in whole.matrices))
        calibration = _calibrated(run, resolved.recipe, labelled(report, "calibrating"))
    if calibration is not None and fewer is not None:
        located = locate_experts(checkpoint, recipe.experts_at)
        fewer = _scored(calibration, located, resolved.recipe.experts)
        small = with_experts(checkpoint, located, fewer.kept)
        whole = plan_mixture(resolved, small, fewer=fewer)
    plan = whole
    if recipe.keep is not None:
        if only_plan and calibration is None:
            chosen = {matrix.name: _from_size(resolved.recipe, matrix) for matrix in _stacks(whole)}
            notes = (*resolved.notes, *_unread(resolved.recipe))
        else:
            candidates = list(_candidates(resolved.recipe, whole, small, calibration, report))
            chosen = _chosen(resolved.recipe, candidates)
            notes = (*resolved.notes, *_unseen(whole, calibration, chosen))
        plan = plan_mixture(replace(resolved, notes=notes), small, chosen, fewer)
    return PreparedMixture(plan, None if run is None else replace(run, plan=plan), calibration)


def _distinct_rows(matrix: MatrixPlan, top_k: int) -> int:
    """How many tokens bring as many different inputs to the experts of a layer as a matrix has features."""
    return ceil(matrix.rows / top_k) if matrix.role == "down" else matrix.rows


def _check_calibrated(recipe: Recipe, fewer: FewerExperts | None, calibrated: bool, only_plan: bool) -> None:
    """Raises RecipeError if text is needed and missing, or of no use."""
    if fewer is not None and not (calibrated or only_plan):
        raise RecipeError(
            f"{called('experts')} is {recipe.experts} of {fewer.source_experts}; expected "
            f"{called('calibrate')} with it (from Python also: calibration): text shows which experts stay"
        )
    if fewer is None and recipe.keep is None and recipe.calibrate:
        raise RecipeError(
            f"{called('calibrate')} given without {called('keep')}, and {called('experts')} is not below the "
            "source's number; nothing is compressed then"
        )


def _source_plan(recipe: Recipe, checkpoint: InMemory, fewer: FewerExperts) -> MixturePlan:
    """The plan of all experts of all layers, which are scored even where a layer is not converted."""
    every = recipe.replace(experts=fewer.source_experts, layers=None, include=(), exclude=())
    return plan_mixture(resolve_mixture(every, checkpoint), checkpoint)


def _scored(calibration: Calibration, located: Located, count: int) -> FewerExperts:
    """Which `count` experts of every layer stay."""
    layers = []
    for ffn in located.ffns:
        found = _load_scores(calibration, ffn.path)
        layers.append(scored_layer(ffn.path, found.scores, found.tokens, count, located.groups))
    return FewerExperts(located.num_experts, tuple(layers))


def _with_allocation(recipe: Recipe, calibrated: bool) -> Recipe:
    """The recipe with the allocation of a mixture's budget.

    Raises:
        RecipeError: it needs calibration data and there are none, or is for dense sources.
    """
    allocation = recipe.allocation or ("loss" if calibrated else "energy")
    if allocation == "measured":
        raise RecipeError(
            f"{assigned('allocation', 'measured')} given with a mixture of experts as the source; expected "
            "loss, energy or uniform"
        )
    if allocation == "loss" and not calibrated:
        raise RecipeError(needs_calibration("allocation", allocation))
    return recipe.replace(allocation=allocation)


def _stacks(plan: MixturePlan) -> Iterator[StackPlan]:
    for matrix in plan.matrices:
        assert isinstance(matrix, StackPlan)
        yield matrix


def _forms(recipe: Recipe) -> tuple[str, ...]:
    """What a matrix may become."""
    return FORMS if recipe.share == "auto" else (str(recipe.share), "whole")


def _numbers(recipe: Recipe, matrix: StackPlan) -> int:
    """How many numbers may be stored for a matrix of all experts."""
    assert recipe.keep is not None
    return int(recipe.keep * matrix.numbers)


def _check_keep(recipe: Recipe, plan: MixturePlan) -> None:
    """Raises RecipeError if a matrix cannot be stored in so few numbers in any form."""
    assert recipe.keep is not None
    least, name = 0.0, ""
    for matrix in _stacks(plan):
        sizes = [
            count_stack(form, _LEAST.get(form, (1,)), matrix.num_experts, matrix.rows, matrix.cols)
            for form in _forms(recipe)
        ]
        if min(sizes) / matrix.numbers > least:
            least, name = min(sizes) / matrix.numbers, matrix.name
    if recipe.keep < least:
        raise RecipeError(
            f"{called('keep')} is {recipe.keep:g}; the smallest that can be met with {called('share')} "
            f"{recipe.share} is {ceil(1e4 * least) / 1e4:g}, by {name}"
        )


def _from_size(recipe: Recipe, matrix: StackPlan) -> tuple[str, tuple[int, ...], None]:
    """A form and its ranks where nothing is read; that of the recipe, or each expert alone."""
    numbers, size = _numbers(recipe, matrix), (matrix.num_experts, matrix.rows, matrix.cols)
    first = "none" if recipe.share == "auto" else str(recipe.share)
    for form in ("whole", first, *_forms(recipe)):
        ranks = ranks_within(form, *size, numbers)
        if ranks is not None:
            return form, ranks, None
    raise AssertionError("the budget was checked")


def _unread(recipe: Recipe) -> Iterator[str]:
    """What a plan from sizes does not know, for people."""
    if recipe.share == "auto":
        yield (
            "no weights were read: each expert is planned alone. A conversion, or a plan with "
            f"{called('calibrate')}, shares the budget out over forms and matrices."
        )


def _candidates(
    recipe: Recipe,
    plan: MixturePlan,
    checkpoint: InMemory,
    calibration: Calibration | None,
    report: Progress,
) -> Iterator[StackCandidate]:
    """What every matrix can become, one layer in memory at a time.

    With the allocation "loss" a unit of error counts what it costs in nats per token; else errors are
    relative to the size of the matrix' outputs.
    """
    device = compute_device(recipe)
    for done, ffn in enumerate(plan.ffns):
        moments = None if calibration is None else _load(calibration, ffn.ffn.path, plan.fewer)
        nats = None
        if calibration is not None and recipe.allocation == "loss":
            nats = _load_gradients(calibration, ffn.ffn.path)
        for matrix in ffn.matrices:
            assert isinstance(matrix, StackPlan)
            report(f"forms of {matrix.name}", done, len(plan.ffns), None)
            stack = read_stack(checkpoint, matrix.source).to(device)
            metric = (
                None if moments is None else moments.metric("inner" if matrix.role == "down" else "inputs")
            )
            found = stack_choices(
                stack,
                _numbers(recipe, matrix),
                metric,
                forms=_forms(recipe),
            )
            unit = nats[matrix.role] if nats is not None else 1 / found.energy if found.energy else 0.0
            yield StackCandidate(matrix.name, matrix.numbers, found.choices, unit, found.alike)


def _chosen(recipe: Recipe, candidates: list[StackCandidate]) -> Chosen:
    """What every matrix becomes under the recipe's budget."""
    assert recipe.keep is not None
    found = (uniform if recipe.allocation == "uniform" else shared_out)(candidates, recipe.keep)
    alike = {each.name: each.alike for each in candidates}
    return {name: (choice.form, choice.ranks, alike[name]) for name, choice in found.items()}


def _unseen(plan: MixturePlan, calibration: Calibration | None, chosen: Chosen) -> Iterator[str]:
    """What calibration did not reach, and how low the ranks are that it got, for people."""
    if calibration is None:
        return
    for ffn in plan.ffns:
        if missed := _unseen_in(calibration, ffn.ffn.path, plan.fewer):
            numbers = ", ".join(map(str, missed))
            yield (
                f"{counted(len(missed), 'expert')} of {ffn.ffn.path} ({numbers}) saw no calibration token: "
                f"fitted to what its whole layer saw{_cut_to(missed, ffn, plan.fewer, chosen)}."
            )


def _cut_to(missed: Sequence[int], ffn: FFNPlan, fewer: FewerExperts | None, chosen: Chosen) -> str:
    """The lowest rank of these experts beside the highest of all, if they have ranks of their own."""
    stacks = (chosen[each.name] for each in ffn.matrices)
    own = [ranks for form, ranks, _ in stacks if form in UNEVEN and len(ranks) > 1]
    if not own:
        return ""
    at = missed if fewer is None else [fewer.kept[ffn.ffn.path].index(expert) for expert in missed]
    lowest, highest = min(ranks[expert] for ranks in own for expert in at), max(map(max, own))
    return f", with ranks down to {lowest} where others have up to {highest}"


def _calibrated(run: dense_run.DenseRun, recipe: Recipe, report: dense_run.Progress) -> Calibration:
    """What the recipe needs of all experts, of this run or of an earlier one over the same.

    Moments where matrices are fitted, gradients where the budget is shared out by loss, else scores alone.
    """
    found = Calibration.of(run)
    if recipe.keep is not None:
        _collect(found, run, "experts", report)
    elif found.missing("experts"):
        _collect(found, run, "scores", report)
    by_loss = recipe.keep is not None and recipe.allocation == "loss"
    if by_loss and (missing := found.missing("gradients")):
        keep = partial(found.save, what="gradients")
        collect_shared(run, _collect_gradients, missing, keep, report)
    return found


def _collect(found: Calibration, run: dense_run.DenseRun, what: str, report: dense_run.Progress) -> None:
    """Save what is missing of the "experts", with their moments, or of their "scores" alone."""
    if not (missing := found.missing(what)):
        return
    if what == "experts":
        found.check_space(sum(moment_bytes(ffn) for ffn in run.plan.ffns if ffn.ffn.path in missing))

    def save(path: str, found_there: ExpertScores) -> None:
        tensors = {each.name: getattr(found_there, each.name) for each in fields(found_there)}
        tensors["total"] = torch.tensor(found_there.total)
        found.save(path, {name: t.contiguous() for name, t in tensors.items()}, what)
        report(path, len(found.paths) - len(found.missing(what)), len(found.paths))

    collect_shared(run, _collect_moments if what == "experts" else _collect_scores, missing, save, report)


def _collect_moments(
    run: dense_run.DenseRun,
    wanted: Sequence[str],
    save: Callable[[str, ExpertScores], None],
    progress: dense_run.Progress,
    moments: bool = True,
) -> None:
    from .expert_moments import collect

    with run.streamed() as model, _damage_named(run):
        experts = _experts_of(model, run)
        collect(
            model,
            run.batches,
            lambda path, found: save(experts[path], found),
            wanted=lambda path: experts.get(path) in wanted,
            moments=moments,
            layout=_family(run).layout,
            ranks=run.ranks,
        )


def _collect_scores(
    run: dense_run.DenseRun,
    wanted: Sequence[str],
    save: Callable[[str, ExpertScores], None],
    progress: dense_run.Progress,
) -> None:
    _collect_moments(run, wanted, save, progress, moments=False)


def _collect_gradients(
    run: dense_run.DenseRun,
    wanted: Sequence[str],
    save: Callable[[str, dict[str, torch.Tensor]], None],
    progress: dense_run.Progress,
) -> None:
    from .expert_gradients import expert_sensitivities

    model = run.in_memory(gradient_dtype(run.plan))
    modules = {path: model.get_submodule(name) for name, path in _experts_of(model, run).items()}
    for path, tensors in expert_sensitivities(run, model, modules, progress).items():
        if run.ranks.is_first:
            save(path, tensors)


@contextmanager
def _damage_named(run: dense_run.DenseRun) -> Iterator[None]:
    """A model that computes NaN because an expert holds some: its tensor is named."""
    try:
        yield
    except CheckpointError:
        for matrix in run.plan.matrices:
            read_stack(run.checkpoint, matrix.source)
        raise


def _experts_of(model: PreTrainedModel, run: dense_run.DenseRun) -> dict[str, str]:
    """Path of an experts module in the model -> path of its layer."""
    base = "" if model.base_model is model else f"{model.base_model_prefix}."
    family = _family(run)
    layers = (ffn.ffn.path for ffn in run.plan.ffns)
    return {
        f"{base}{'.'.join(filter(None, [layer, family.slot, family.experts]))}": layer for layer in layers
    }


def _family(run: dense_run.DenseRun) -> MixtureFamily:
    assert isinstance(run.plan.family, MixtureFamily), "of a mixture"
    return run.plan.family


def _load_gradients(calibration: Calibration, path: str) -> dict[str, float]:
    """By role, what a unit of squared error costs, see `expert_sensitivities`."""
    from safetensors.torch import load_file

    return {name: float(t) for name, t in load_file(calibration.file(path, "gradients")).items()}


def _unseen_in(calibration: Calibration, path: str, fewer: FewerExperts | None) -> list[int]:
    """Experts that stay and that no token was routed to, by their numbers in the source."""
    from .expert_moments import unseen_experts

    unseen = unseen_experts(_load_scores(calibration, path).tokens)
    return unseen if fewer is None else [expert for expert in unseen if expert in fewer.kept[path]]


def _load(calibration: Calibration, path: str, fewer: FewerExperts | None) -> ExpertMoments:
    """Of the experts that stay."""
    from safetensors.torch import load_file

    from .expert_moments import ExpertMoments

    found: dict[str, Any] = load_file(calibration.file(path, "experts"))
    found["total"] = int(found["total"])
    moments = ExpertMoments(**found)
    return moments if fewer is None else moments.of(fewer.kept[path])


def _load_scores(calibration: Calibration, path: str) -> ExpertScores:
    """Of all experts, without their moments."""
    from safetensors import safe_open

    from .expert_moments import ExpertScores

    file = calibration.file(path, "experts")
    with safe_open(file if file.is_file() else calibration.file(path, "scores"), "pt") as opened:
        found: dict[str, Any] = {each.name: opened.get_tensor(each.name) for each in fields(ExpertScores)}
    found["total"] = int(found["total"])
    return ExpertScores(**found)
