"""Collect the second moments at every FFN of the dense model on calibration text.

The stock model runs as it is, with the weights of one block after the other read from the checkpoint's files
(accelerate's disk offload). All batches wait for each other in front of every FFN, so that the moments of one
FFN alone are in memory. Those of finished FFNs are on disk: an interrupted run continues where it was, and a
second run reads what the first one found.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import DataError, counted
from ..planning.plan import FFNPlan, MatrixPlan, Plan
from ..source.matrices import read_bias
from .batches import NOTHING_COUNTS, num_tokens
from .collecting import CollectingWalk
from .dense_run import DenseRun, Progress
from .fisher import gradient_moments
from .moment_cache import Calibration
from .moments import FFNMoments, MomentSums, observed_side
from .shared import collect_shared

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Save = Callable[[str, FFNMoments], None]


def calibrate(run: DenseRun, *, gradients: bool = False, progress: Progress | None = None) -> Calibration:
    """Run the dense model over its batches, or find the moments of an earlier run over the same.

    Args:
        gradients: collect the moments of gradients, too: takes the whole model in memory and a backward pass.

    Raises:
        DataError: too little text, or no label that is scored.
        CheckpointError: the model computes NaN or Inf.
    """
    _check_enough(run)
    found = Calibration.of(run)
    report = progress or (lambda *_: None)
    count = len(found.paths)

    def save(path: str, moments: FFNMoments) -> None:
        found.save(path, moments.tensors)
        report(path, count - len(found.missing()), count)

    if missing := found.missing():
        collect_shared(run, _collect_moments, missing, save, report)
    if gradients and (missing := found.missing("gradients")):
        keep = partial(found.save, what="gradients")
        collect_shared(run, _collect_gradients, missing, keep, report)
    return found


def _collect_moments(run: DenseRun, wanted: Sequence[str], save: Save, progress: Progress) -> None:
    with run.streamed() as model:
        MomentsWalk(run, model, wanted, save).walk_batches()


def _collect_gradients(
    run: DenseRun, wanted: Sequence[str], save: Callable[[str, dict[str, Tensor]], None], progress: Progress
) -> None:
    model = run.in_memory(gradient_dtype(run.plan))
    for path, tensors in gradient_moments(run, model, progress).items():
        save(path, tensors)


class MomentsWalk(CollectingWalk):
    """Sums what goes through each FFN, up to where all batches wait again."""

    def __init__(self, run: DenseRun, model: PreTrainedModel, wanted: Collection[str], save: Save) -> None:
        super().__init__(run, model, wanted)
        self.save = save
        self.sums: dict[str, MomentSums] = {}

    def see(self, ffn: FFNPlan, place: str, x: Tensor) -> None:
        path = ffn.ffn.path
        rows, sums = self.rows(path, x), self.sums.setdefault(path, MomentSums())
        if self.holds_out:
            sums.add_sample(place, rows, self.number)
            return
        readers = [matrix for matrix in ffn.matrices if (matrix.role == "down") == (place == "inner")]
        squares_only = all(observed_side(matrix) == "out" for matrix in readers)
        sums.add(place, rows, squares_only=squares_only, where=f"{path} ({place})")

    def leave(self, ffn: FFNPlan, matrices: Sequence[MatrixPlan], x: Tensor, y: Tensor) -> None:
        if self.sees(ffn) and not self.holds_out:
            for matrix in matrices:
                if observed_side(matrix) == "out":
                    self._add_outputs(ffn.ffn.path, matrix, y)
        super().leave(ffn, matrices, x, y)

    def _add_outputs(self, path: str, matrix: MatrixPlan, y: Tensor) -> None:
        source = matrix.source
        if source.part is not None:
            y = y.chunk(2, dim=-1)[source.part]
        rows = self.rows(path, y)
        if source.bias:  # from the checkpoint: the streamed module has given its own away
            rows = rows - read_bias(self.run.checkpoint, source).to(rows)
        where = f"{path} (outputs of {matrix.role})"
        self.sums[path].add(f"{matrix.role}.outputs", rows, squares_only=False, where=where)

    def finish(self, path: str) -> None:
        found = self.sums.pop(path, MomentSums()).finish(path, self.run.ranks)
        if found is not None:
            self.save(path, found)


def check_scored(run: DenseRun) -> None:
    """Raises DataError unless there are batches to fit to and to hold out, with labels that are scored."""
    if len(run.batches) < 2:
        raise DataError(
            f"calibration has {counted(len(run.batches), 'batch')}; expected two or more: one is held out"
        )
    for part, what in ((run.fitted_to, "beside those held out"), (run.held_out, "that are held out")):
        labels = [batch.get("labels") for batch in part]
        if all(each is not None and each.dim() == 2 and not (each != -100).any() for each in labels):
            raise DataError(NOTHING_COUNTS.format(what))


def _check_enough(run: DenseRun) -> None:
    """A moment of n features needs n tokens, and one batch has to be held out."""
    check_scored(run)
    check_spans(run, max(m.rows if observed_side(m) == "in" else m.cols for m in run.plan.matrices))


def check_spans(run: DenseRun, needed: int) -> None:
    """Raises DataError if there are fewer tokens to fit to than features."""
    seen = num_tokens(run.fitted_to)
    if seen is not None and seen < needed:
        raise DataError(
            f"calibration has {seen:,} tokens beside those held out; expected the {needed:,} that moments of "
            f"{needed:,} features need"
        )


def gradient_dtype(plan: Plan) -> str | torch.dtype:
    """Gradients leave the range of float16."""
    halves = any(tensor.dtype == "float16" for tensor in plan.tensors)
    return torch.float32 if halves else "auto"
