"""Decide what the experts of a mixture become: which form, at which ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from math import ceil
from typing import TYPE_CHECKING

import torch

from ..decomposition.stack_choices import stack_choices
from ..decomposition.stacks import FORMS, count_stack, ranks_within
from ..errors import CheckpointError, RecipeError, counted
from ..options import assigned, called
from ..planning.mixtures import (
    Chosen,
    MixturePlan,
    StackPlan,
    moment_bytes,
    plan_mixture,
    resolve_mixture,
)
from ..planning.recipe import Recipe
from ..planning.resolve import needs_calibration
from ..source.in_memory import InMemory
from ..source.mixtures import read_stack
from . import dense_run
from .batches import Batch
from .calibrate import gradient_dtype
from .moment_cache import Calibration
from .prepare import Prepared, Progress, _device, _labelled, _open_run
from .stack_budget import StackCandidate, shared_out, uniform

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .expert_moments import ExpertMoments

# The smallest ranks of a form.
_LEAST = {"whole": (), "both": (1, 1)}


@dataclass(frozen=True)
class PreparedMixture(Prepared):
    """The plan for a mixture, and the data that its experts are fitted to."""

    def expert_moments(self, path: str) -> ExpertMoments | None:
        """At the experts in the layer at that path; None without calibration."""
        return None if self.calibration is None else _load(self.calibration, path)


def prepare_mixture(
    recipe: Recipe,
    checkpoint: InMemory,
    batches: Sequence[Batch] | None = None,
    progress: Progress | None = None,
    *,
    only_plan: bool = False,
    token: str | None = None,
) -> PreparedMixture:
    """The plan for an opened mixture, with forms and ranks if the recipe compresses.

    A plan alone, without calibration, reads no weights: every matrix has the same share there, and where the
    form is to be chosen, the sizes that each expert would have alone. Other arguments as for `prepare`.

    Raises:
        MpoeError: the recipe does not fit the mixture, or its budget cannot be met.
    """
    resolved = resolve_mixture(recipe, checkpoint)
    whole = plan_mixture(resolved, checkpoint)
    if resolved.recipe.keep is None:
        return PreparedMixture(whole)
    calibrated = bool(recipe.calibrate) or batches is not None
    resolved = replace(resolved, recipe=_with_allocation(resolved.recipe, calibrated))
    _check_keep(resolved.recipe, whole)
    report = progress or (lambda *_: None)
    run = calibration = None
    if calibrated:
        run = _open_run(whole, resolved.recipe, checkpoint, batches, token)
        gradients = resolved.recipe.allocation == "loss"
        calibration = _calibrated(run, gradients, _labelled(report, "calibrating"))
    if only_plan and calibration is None:
        chosen = {matrix.name: _from_size(resolved.recipe, matrix) for matrix in _stacks(whole)}
        resolved = replace(resolved, notes=(*resolved.notes, *_unread(resolved.recipe)))
        return PreparedMixture(plan_mixture(resolved, checkpoint, chosen))
    chosen = _chosen(
        resolved.recipe, list(_candidates(resolved.recipe, whole, checkpoint, calibration, report))
    )
    notes = (*resolved.notes, *_unseen(whole, calibration))
    plan = plan_mixture(replace(resolved, notes=notes), checkpoint, chosen)
    return PreparedMixture(plan, None if run is None else replace(run, plan=plan), calibration)


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
    if recipe.keep > 1:
        raise RecipeError(
            f"{called('keep')} is {recipe.keep:g}; expected a share of the experts' numbers, such as 0.6 for "
            "60 %"
        )
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
    device = _device(recipe)
    for done, ffn in enumerate(plan.ffns):
        moments = None if calibration is None else _load(calibration, ffn.ffn.path)
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
            found = stack_choices(stack, _numbers(recipe, matrix), metric, forms=_forms(recipe))
            unit = nats[matrix.role] if nats is not None else 1 / found.energy if found.energy else 0.0
            yield StackCandidate(matrix.name, matrix.numbers, found.choices, unit, found.alike)


def _chosen(recipe: Recipe, candidates: list[StackCandidate]) -> Chosen:
    """What every matrix becomes under the recipe's budget."""
    assert recipe.keep is not None
    found = (uniform if recipe.allocation == "uniform" else shared_out)(candidates, recipe.keep)
    alike = {each.name: each.alike for each in candidates}
    return {name: (choice.form, choice.ranks, alike[name]) for name, choice in found.items()}


def _unseen(plan: MixturePlan, calibration: Calibration | None) -> Iterator[str]:
    """What calibration did not reach, for people."""
    if calibration is None:
        return
    for ffn in plan.ffns:
        if missed := _unseen_in(calibration, ffn.ffn.path):
            numbers = ", ".join(map(str, missed))
            yield (
                f"{counted(len(missed), 'expert')} of {ffn.ffn.path} ({numbers}) saw no calibration "
                f"token: fitted to "
                "what its whole layer saw."
            )


def _calibrated(run: dense_run.DenseRun, gradients: bool, report: dense_run.Progress) -> Calibration:
    """The moments at all experts, of this run or of an earlier one over the same; gradients if asked for."""
    from .expert_gradients import expert_sensitivities
    from .expert_moments import collect

    found = Calibration.of(run)
    if missing := found.missing("experts"):
        found.check_space(sum(moment_bytes(ffn) for ffn in run.plan.ffns if ffn.ffn.path in missing))
        with run.streamed() as model:
            experts = _experts_of(model, run)

            def save(path: str, moments: ExpertMoments) -> None:
                tensors = {each.name: getattr(moments, each.name) for each in fields(moments)}
                tensors["total"] = torch.tensor(moments.total)
                found.save(experts[path], {name: t.contiguous() for name, t in tensors.items()}, "experts")
                report(experts[path], len(found.paths) - len(found.missing("experts")), len(found.paths))

            with _damage_named(run):
                collect(model, run.batches, save, wanted=lambda path: experts.get(path) in missing)
    if gradients and found.missing("gradients"):
        model = run.in_memory(gradient_dtype(run.plan))
        modules = {path: model.get_submodule(name) for name, path in _experts_of(model, run).items()}
        for path, tensors in expert_sensitivities(run, model, modules, report).items():
            found.save(path, tensors, "gradients")
    return found


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
    slot = run.plan.family.slot
    layers = (ffn.ffn.path for ffn in run.plan.ffns)
    return {f"{base}{'.'.join(filter(None, [layer, slot, 'experts']))}": layer for layer in layers}


def _load_gradients(calibration: Calibration, path: str) -> dict[str, float]:
    """By role, what a unit of squared error costs, see `expert_sensitivities`."""
    from safetensors.torch import load_file

    return {name: float(t) for name, t in load_file(calibration.file(path, "gradients")).items()}


def _unseen_in(calibration: Calibration, path: str) -> list[int]:
    """`ExpertMoments.unseen`, without its moments."""
    from safetensors import safe_open

    from .expert_moments import unseen_experts

    with safe_open(calibration.file(path, "experts"), "pt") as file:
        return unseen_experts(file.get_tensor("tokens"))


def _load(calibration: Calibration, path: str) -> ExpertMoments:
    from safetensors.torch import load_file

    from .expert_moments import ExpertMoments

    found = load_file(calibration.file(path, "experts"))
    return ExpertMoments(found["tokens"], int(found["total"]), found["inputs"], found["inner"])
