"""What cutting one matrix, and nothing else, does to the model: measured.

The dense model runs over a few batches once as it is and once per matrix, with that matrix replaced by its
two thin ones. All these passes walk in step (see `stream.InStep`), so that every block is read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..decomposition.low_rank import factor
from ..planning.plan import FFNPlan, MatrixPlan, Plan
from ..source.checkpoint import Checkpoint
from ..source.matrices import read_bias, read_wide
from .allocation import Ranks
from .batches import Batch, says_next, split
from .calibrate import Calibration, Progress
from .divergence import Comparison, compared_output, limited
from .moments import metric_for
from .stream import InStep, projection_modules, run_batch, streamed_model

# Tokens that the passes run over; every pass keeps its hidden states of them in memory.
TOKENS = 2048
PIECES = 4


def measure(
    plan: Plan,
    checkpoint: Checkpoint,
    calibration: Calibration,
    batches: Sequence[Batch],
    ranks: Ranks,
    device: torch.device,
    progress: Progress,
) -> dict[str, float]:
    """By matrix name, how far the model is from the dense one when only that matrix is cut to its rank.

    Divergence in nats per token of calibration text (without logits half the squared difference of the last
    hidden states). Matrices whose rank is None are left out.
    """
    with streamed_model(plan, checkpoint, device) as model:
        walk = _Walk(model, plan, checkpoint, calibration, ranks, device, progress)
        for batch in _sample(split(batches)[0]):
            walk.run(batch)
    return {name: comparison.loss for name, comparison in walk.comparisons.items()}


def _sample(batches: list[Batch]) -> list[Batch]:
    """About `TOKENS` tokens out of batches that are evenly spread."""
    count = min(len(batches), PIECES)
    chosen = [batches[k * len(batches) // count] for k in range(count)]
    return [piece for batch in chosen for piece in limited([batch], TOKENS // count)]


class _Walk:
    """One batch at a time: pass 0 is the dense model's, every other one has its own matrix cut."""

    def __init__(self, model, plan, checkpoint, calibration, ranks, device, progress):
        self.model, self.plan, self.checkpoint, self.calibration = model, plan, checkpoint, calibration
        self.ranks, self.device, self.progress = ranks, device, progress
        self.names = [name for name, rank in ranks.items() if rank is not None]
        about_next = says_next(checkpoint)
        self.comparisons = {name: Comparison("", about_next) for name in self.names}
        self.steps = InStep()
        self.at: FFNPlan | None = None
        self.passed: set[str] = set()
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}  # of the FFN in work

    def run(self, batch: Batch) -> None:
        """Adds what a batch shows."""
        handles = [handle for ffn in self.plan.ffns for handle in self._watch(ffn)]
        expected = []

        def dense() -> None:
            expected.append(compared_output(run_batch(self.model, batch)))

        def cut(name: str) -> None:
            found = compared_output(run_batch(self.model, batch))
            self.comparisons[name].add(self.model, batch, expected[0], found)

        try:
            with torch.no_grad():
                self.steps.run([dense, *(partial(cut, name) for name in self.names)], self._factor)
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, ffn: FFNPlan):
        modules = projection_modules(self.model, self.plan.family, ffn)

        def enter(module, args):
            self.at = ffn
            self.steps.wait()

        def replace(matrix: MatrixPlan, module, args, output):
            if self.steps.current and self.names[self.steps.current - 1] == matrix.name:
                return self._replaced(matrix, args[0], output)
            return None

        first = modules.get("gate", modules["up"])
        yield first.register_forward_pre_hook(enter)
        for matrix in ffn.matrices:
            yield modules[matrix.role].register_forward_hook(partial(replace, matrix))

    def _replaced(self, matrix: MatrixPlan, x: Tensor, output: Tensor) -> Tensor:
        """The module's output with this matrix cut, beside the other half of a fused one."""
        first, second = self.factors[matrix.name]
        y = x.to(first) @ first @ second
        if matrix.source.bias:
            y = y + read_bias(self.checkpoint, matrix.source).to(y)
        parts = [output] if matrix.source.part is None else list(output.chunk(2, dim=-1))
        parts[matrix.source.part or 0] = y.to(output)
        return torch.cat(parts, -1)

    def _factor(self) -> None:
        """All passes wait in front of the same FFN, or are over."""
        ffn, self.at, self.factors = self.at, None, {}
        if ffn is None:
            return
        moments = self.calibration.load(ffn.ffn.path)
        for matrix in ffn.matrices:
            if (rank := self.ranks[matrix.name]) is not None:
                weight = read_wide(self.checkpoint, matrix.source, self.device)
                metric = metric_for(self.plan.recipe.metric, matrix, weight, moments)
                self.factors[matrix.name] = factor(weight, rank, metric)
        self.passed.add(ffn.ffn.path)
        self.progress(ffn.ffn.path, len(self.passed), len(self.plan.ffns))
