"""Measure how much truncating one matrix, and nothing else, changes the model.

The dense model runs over a few batches once as it is and once per matrix, with that matrix replaced by its
two factors. All these passes run in lockstep, so that every block is read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..decomposition.low_rank import factor
from ..planning.plan import FFNPlan, MatrixPlan
from ..source.matrices import read_wide
from .allocation import Ranks
from .batches import Batch
from .dense_run import DenseRun, Progress
from .divergence import DivergenceSums, compared_output, limited
from .lockstep import LockstepWalk, project
from .metrics import FitMetric
from .moment_cache import Calibration
from .stream import run_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens that the passes run over; every pass keeps its hidden states of them in memory.
TOKENS = 2048
PIECES = 4


def measure_sensitivities(
    run: DenseRun, calibration: Calibration, metric: FitMetric, ranks: Ranks, progress: Progress
) -> dict[str, float]:
    """By matrix name, the divergence from the dense model when only that matrix is truncated to its rank.

    In nats per token of calibration text (without logits half the squared difference of the last hidden
    states). Matrices whose rank is None are left out.

    Raises:
        DataError: no token is scored.
    """
    with run.streamed() as model:
        walk = SensitivityWalk(run, model, calibration, metric, ranks, progress)
        for batch in _sample(run.fitted_to):
            walk.walk_batch(batch)
    return {name: sums.loss for name, sums in walk.divergences.items()}


def _sample(batches: list[Batch]) -> list[Batch]:
    """About `TOKENS` tokens out of batches that are evenly spread."""
    count = min(len(batches), PIECES)
    chosen = [batches[k * len(batches) // count] for k in range(count)]
    return [piece for batch in chosen for piece in limited([batch], TOKENS // count)]


class SensitivityWalk(LockstepWalk):
    """One batch at a time: pass 0 is the dense model's, every other one has its own matrix truncated."""

    def __init__(
        self,
        run: DenseRun,
        model: PreTrainedModel,
        calibration: Calibration,
        metric: FitMetric,
        ranks: Ranks,
        progress: Progress,
    ) -> None:
        super().__init__(run, model)
        self.calibration, self.metric, self.ranks, self.progress = calibration, metric, ranks, progress
        self.names = [name for name, rank in ranks.items() if rank is not None]
        self.divergences = {name: DivergenceSums("", run.is_causal) for name in self.names}
        self.passed: set[str] = set()
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}  # of the FFN that the passes are in

    def walk_batch(self, batch: Batch) -> None:
        """Run all passes over a batch, and add the divergences."""
        expected = []

        def dense() -> None:
            expected.append(compared_output(run_batch(self.model, batch)))

        def truncated(name: str) -> None:
            found = compared_output(run_batch(self.model, batch))
            self.divergences[name].add(self.model, batch, expected[0], found)

        self.walk([dense, *(partial(truncated, name) for name in self.names)])

    def meet(self, ffn: FFNPlan, place: str, x: Tensor) -> None:
        if place == "inputs":
            self.wait_at(ffn, place)

    def release(self, ffn: FFNPlan | None, place: str) -> None:
        """Factor the matrices of the FFN that the passes wait in front of."""
        self.factors = {}
        if ffn is None:
            return
        moments = self.calibration.load(ffn.ffn.path)
        for matrix in ffn.matrices:
            if (rank := self.ranks[matrix.name]) is not None:
                weight = read_wide(self.run.checkpoint, matrix.source, self.run.device)
                metric = self.metric.weigh(matrix, weight, moments)
                self.factors[matrix.name] = factor(weight, rank, metric)
        self.passed.add(ffn.ffn.path)
        self.progress(ffn.ffn.path, len(self.passed), len(self.run.plan.ffns))

    def leave(self, ffn: FFNPlan, matrices: Sequence[MatrixPlan], x: Tensor, y: Tensor) -> Tensor | None:
        """The output with this pass's own matrix truncated, beside the other half of a fused one."""
        for matrix in matrices:
            if self.current and self.names[self.current - 1] == matrix.name:
                source = matrix.source
                truncated = project(self.run.checkpoint, source, x, self.factors[matrix.name])
                parts = [y] if source.part is None else list(y.chunk(2, dim=-1))
                parts[source.part or 0] = truncated.to(y)
                return torch.cat(parts, -1)
        return None
