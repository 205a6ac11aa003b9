"""Activations at every FFN of the dense model on calibration text: some tokens' inputs and hidden neurons."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..experts.ffn import Activations
from ..planning.plan import FFNPlan, MatrixPlan
from .batches import evenly_spread, is_held_out, token_rows
from .calibrate import check_scored
from .dense_run import DenseRun, Progress
from .lockstep import LockstepWalk
from .moment_cache import Calibration
from .stream import check_activations, run_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens that are kept per FFN: to fit to, and held out.
FITTED, HELD_OUT = 4096, 512
WHAT = "activations"


def collect(run: DenseRun, progress: Progress) -> Calibration:
    """Run the dense model over its batches, or find the activations of an earlier run over the same.

    Raises:
        DataError: too little text, or no label that is scored.
        CheckpointError: the model computes NaN or Inf.
    """
    check_scored(run)
    found = Calibration.of(run)
    if missing := found.missing(WHAT):
        with run.streamed() as model:
            _Walk(run, model, missing, found, progress).walk(
                [partial(run_batch, model, batch) for batch in run.batches]
            )
    return found


def load(found: Calibration, path: str) -> Activations:
    """Those of the FFN in the layer at `path`, in float32."""
    from safetensors.torch import load_file

    tensors = {name: tensor.float() for name, tensor in load_file(found.file(path, WHAT)).items()}
    return Activations(**tensors)


class _Walk(LockstepWalk):
    """One pass per batch; all wait in front of every FFN, so that one FFN's activations are in memory."""

    def __init__(
        self,
        run: DenseRun,
        model: PreTrainedModel,
        wanted: Collection[str],
        found: Calibration,
        progress: Progress,
    ) -> None:
        super().__init__(run, model)
        self.wanted, self.found, self.progress = set(wanted), found, progress
        self.rows: dict[str, list[Tensor]] = {}
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
        if path not in self.wanted:
            return
        rows = token_rows(self.model, self.run.batches[self.current], path, x)
        check_activations(rows, f"{path} ({place})")
        held_out = is_held_out(self.current, self.run.batches)
        wanted = HELD_OUT if held_out else FITTED
        share = -(-wanted // len(self.run.held_out if held_out else self.run.fitted_to))
        chosen = rows[evenly_spread(len(rows), min(share, len(rows)))].cpu()
        # Hidden neurons are many, and coarse numbers will do.
        chosen = chosen.bfloat16() if place == "inner" else chosen
        self.rows.setdefault(f"held_{place}" if held_out else place, []).append(chosen)

    def leave(self, ffn: FFNPlan, matrices: Sequence[MatrixPlan], x: Tensor, y: Tensor) -> None:
        pass

    def _finish(self, path: str) -> None:
        """All passes are through; layers may share the FFN, so only the last time counts."""
        self.times_left[path] -= 1
        if not self.times_left[path] and path in self.wanted:
            tensors = {name: torch.cat(parts).contiguous() for name, parts in self.rows.items()}
            self.found.save(path, tensors, WHAT)
            done = len(self.found.paths) - len(self.found.missing(WHAT))
            self.progress(path, done, len(self.found.paths))
        self.rows = {}
