"""Activations at every FFN of the dense model on calibration text: some tokens' inputs and hidden neurons."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from ..experts.ffn import Activations
from ..planning.plan import FFNPlan, MatrixPlan
from .batches import evenly_spread, is_held_out, token_rows
from .calibrate import check_scored
from .dense_run import DenseRun, Progress
from .lockstep import LockstepWalk
from .moment_cache import Calibration
from .moments import joined, merge_rows
from .shared import collect_shared
from .stream import check_activations, run_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens that are kept per FFN: to fit to, and held out.
FITTED, HELD_OUT = 4096, 512
WHAT = "activations"

Save = Callable[[str, dict[str, Tensor]], None]


def collect(run: DenseRun, progress: Progress) -> Calibration:
    """Run the dense model over its batches, or find the activations of an earlier run over the same.

    Raises:
        DataError: too little text, or no label that is scored.
        CheckpointError: the model computes NaN or Inf.
    """
    check_scored(run)
    found = Calibration.of(run)

    def save(path: str, tensors: dict[str, Tensor]) -> None:
        found.save(path, tensors, WHAT)
        progress(path, len(found.paths) - len(found.missing(WHAT)), len(found.paths))

    if missing := found.missing(WHAT):
        collect_shared(run, _collect, missing, save, progress)
    return found


def _collect(run: DenseRun, wanted: Sequence[str], save: Save, progress: Progress) -> None:
    with run.streamed() as model:
        walk = _Walk(run, model, wanted, save)
        walk.walk([partial(run_batch, model, run.batches[number]) for number in walk.own])


def load(found: Calibration, path: str) -> Activations:
    """Those of the FFN in the layer at `path`, in float32."""
    from safetensors.torch import load_file

    tensors = {name: tensor.float() for name, tensor in load_file(found.file(path, WHAT)).items()}
    return Activations(**tensors)


class _Walk(LockstepWalk):
    """One pass per batch of this process; all wait in front of every FFN, to keep one FFN's activations."""

    def __init__(self, run: DenseRun, model: PreTrainedModel, wanted: Collection[str], save: Save) -> None:
        super().__init__(run, model)
        self.wanted, self.save, self.own = set(wanted), save, run.own
        self.rows: dict[str, dict[int, list[Tensor]]] = {}
        self.inside: FFNPlan | None = None
        self.times_left = {ffn.ffn.path: ffn.runs_per_token for ffn in run.plan.ffns}

    def release(self, ffn: FFNPlan | None, place: str) -> None:
        if self.inside is not None:
            self._finish(self.inside.ffn.path)
        self.inside = ffn

    def meet(self, ffn: FFNPlan, place: str, x: Tensor) -> None:
        path = ffn.ffn.path
        if place == "inputs":
            self.wait_at(ffn, place)
        if path not in self.wanted or self.run.is_spare:
            return
        number = self.own[self.current]
        rows = token_rows(self.model, self.run.batches[number], path, x)
        check_activations(rows, f"{path} ({place})")
        held_out = is_held_out(number, self.run.batches)
        wanted = HELD_OUT if held_out else FITTED
        share = -(-wanted // len(self.run.held_out if held_out else self.run.fitted_to))
        chosen = rows[evenly_spread(len(rows), min(share, len(rows)))].cpu()
        # Hidden neurons are many, and coarse numbers will do.
        chosen = chosen.bfloat16() if place == "inner" else chosen
        name = f"held_{place}" if held_out else place
        self.rows.setdefault(name, {}).setdefault(number, []).append(chosen)

    def leave(self, ffn: FFNPlan, matrices: Sequence[MatrixPlan], x: Tensor, y: Tensor) -> None:
        pass

    def _finish(self, path: str) -> None:
        """All passes are through; layers may share the FFN, so only the last time counts."""
        self.times_left[path] -= 1
        if not self.times_left[path] and path in self.wanted:
            own = {name: joined(parts) for name, parts in self.rows.items()}
            tensors = merge_rows(own, self.run.ranks)
            if self.run.ranks.is_first:
                self.save(path, tensors)
        self.rows = {}
