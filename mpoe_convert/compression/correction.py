"""Fit every matrix to what it should compute from what really reaches it.

The dense model and the one that is being made walk side by side over the calibration text. In front of every
matrix both stop; X are the dense model's inputs, X' those of the model whose matrices before this one are
compressed already. The matrix is then fitted to X W, not to itself: the least-squares solution

    W' = (X'^T X' + ridge)^-1 (X'^T X W + ridge W)

is what takes W's place, factored in the metric of X'. (SVD-LLM's closed-form update, arXiv 2403.07378, with
the dense model's own activations as the target.)
"""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import mkdtemp

import torch
from torch import Tensor, nn

from ..decomposition.low_rank import Metric, factor, thin_side
from ..errors import DataError, RecipeError
from ..planning.plan import FFNPlan, MatrixPlan, Plan
from ..source.checkpoint import Checkpoint
from ..source.matrices import read_bias, read_matrix
from .batches import Batch, split, token_rows, used_tokens
from .calibrate import Calibration, Progress
from .moments import place_of
from .stream import InStep, check_activations, projection_modules, run_batch, streamed_model

# Of the mean eigenvalue of X'^T X': how strongly W' is held to W.
RIDGE = 1e-3


class Corrections:
    """What takes the place of the matrices, on disk as long as this object lives."""

    def __init__(self):
        self.folder = Path(mkdtemp(prefix="mpoe-corrections-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def save(self, name: str, parts: Sequence[Tensor]) -> None:
        from safetensors.torch import save_file

        save_file({str(k): part.cpu().contiguous() for k, part in enumerate(parts)}, self._file(name))

    def load(self, name: str) -> tuple[Tensor, ...]:
        """The two factors, or the one matrix (in, out)."""
        from safetensors.torch import load_file

        return tuple(part for _, part in sorted(load_file(self._file(name)).items()))


def check_correctable(plan: Plan, batches: Sequence[Batch]) -> None:
    """Whether a plan's matrices can be corrected.

    Raises:
        RecipeError: layers share an FFN, which then has more than one place in the order of matrices.
        DataError: fewer tokens than a matrix has inputs.
    """
    shared = next((ffn.ffn.path for ffn in plan.ffns if ffn.runs_per_token != 1), None)
    if shared:
        raise RecipeError(f"correct was asked for, and layers share the FFN {shared}; expected one each")
    needed, tokens = max(matrix.rows for matrix in plan.matrices), used_tokens(batches)
    if tokens is not None and tokens < needed:
        raise DataError(
            f"correct was asked for with {tokens:,} calibration tokens beside those held out; expected "
            f"the {needed:,} that least squares of {needed:,} inputs need: raise --calibration-tokens"
        )


def correct(
    plan: Plan,
    checkpoint: Checkpoint,
    calibration: Calibration,
    batches: Sequence[Batch],
    device: torch.device,
    progress: Progress,
) -> Corrections:
    """Fit all matrices of a plan, in the order in which tokens meet them.

    Raises:
        CheckpointError: activations hold NaN or Inf.
    """
    with streamed_model(plan, checkpoint, device) as model:
        walk = _Walk(model, plan, checkpoint, calibration, split(batches)[0], device, progress)
        walk.run()
    return walk.corrections


class _Walk:
    """Two passes per batch, the dense one's number even, the other's odd."""

    def __init__(self, model, plan, checkpoint, calibration, batches, device, progress):
        self.model, self.plan, self.checkpoint, self.calibration = model, plan, checkpoint, calibration
        self.batches, self.device, self.progress = batches, device, progress
        self.corrections = Corrections()
        self.steps = InStep()
        self.made: dict[str, tuple[Tensor, ...]] = {}  # by matrix name: factors, of the FFN in work
        self.weights: dict[str, Tensor] = {}
        self.rows: Tensor | None = None  # of the dense pass of the batch in work
        self.at: tuple[FFNPlan, str] | None = None
        self.gram: Tensor | None = None
        self.targets: dict[str, Tensor] = {}
        self.fitted = 0
        self.handles = []
        for ffn in plan.ffns:
            self._watch(ffn)

    def run(self) -> None:
        passes = [partial(run_batch, self.model, batch) for batch in self.batches for _ in range(2)]
        try:
            with torch.no_grad():
                self.steps.run(passes, self._fit)
        finally:
            for handle in self.handles:
                handle.remove()

    @property
    def _is_made(self) -> bool:
        return self.steps.current % 2 == 1

    def _watch(self, ffn: FFNPlan) -> None:
        modules = projection_modules(self.model, self.plan.family, ffn)
        by_module: dict[nn.Module, list[MatrixPlan]] = {}
        for matrix in ffn.matrices:
            by_module.setdefault(modules[matrix.role], []).append(matrix)

        def arrive(place: str, module, args):
            self._arrive(ffn, place, args[0])
            self.steps.wait()
            if place == "inner" and ffn is self.plan.ffns[-1]:
                self.steps.stop()  # the last one is fitted

        def replace(matrices: list[MatrixPlan], module, args, output):
            if self._is_made:
                parts = sorted(matrices, key=lambda matrix: matrix.source.part or 0)
                return torch.cat([self._apply(part, args[0]) for part in parts], -1).to(output)
            return None

        first = modules.get("gate", modules["up"])
        self.handles.append(first.register_forward_pre_hook(partial(arrive, "inputs")))
        self.handles.append(modules["down"].register_forward_pre_hook(partial(arrive, "inner")))
        for module, matrices in by_module.items():
            self.handles.append(module.register_forward_hook(partial(replace, matrices)))

    def _apply(self, matrix: MatrixPlan, x: Tensor) -> Tensor:
        y = x.float()
        for part in self.made[matrix.name]:
            y = y @ part
        if matrix.source.bias:
            y = y + read_bias(self.checkpoint, matrix.source).to(y)
        return y

    def _arrive(self, ffn: FFNPlan, place: str, x: Tensor) -> None:
        batch = self.batches[self.steps.current // 2]
        rows = token_rows(self.model, batch, ffn.ffn.path, x)
        check_activations(rows, f"{ffn.ffn.path} ({place})")
        if not self._is_made:
            self.rows = rows
            return
        if self.at is None:
            self._begin(ffn, place)
        self.gram += (rows.mT @ rows).double()
        for name, weight in self.weights.items():
            self.targets[name] += (rows.mT @ (self.rows @ weight)).double()

    def _begin(self, ffn: FFNPlan, place: str) -> None:
        self.at = (ffn, place)
        self.weights = {
            matrix.name: read_matrix(self.checkpoint, matrix.source, self.device).float()
            for matrix in ffn.matrices
            if place_of(matrix.role) == place
        }
        options = {"dtype": torch.float64, "device": self.device}
        rows = next(iter(self.weights.values())).shape[0]
        self.gram = torch.zeros(rows, rows, **options)
        self.targets = {name: torch.zeros(*w.shape, **options) for name, w in self.weights.items()}

    def _fit(self) -> None:
        """All passes wait in front of the same matrices."""
        if self.at is None:
            return
        ffn, place = self.at
        if place == "inputs":  # all are past the FFN before
            self.made.clear()
        moments = self.calibration.load(ffn.ffn.path)
        level = RIDGE * float(self.gram.diagonal().mean())
        self.gram.diagonal().add_(level if level > 0 else 1.0)
        root = torch.linalg.cholesky(self.gram)
        for matrix in ffn.matrices:
            if matrix.name not in self.weights:
                continue
            weight = self.weights[matrix.name]
            wanted = torch.cholesky_solve(self.targets[matrix.name] + level * weight.double(), root)
            parts = (wanted.float(),)
            if matrix.rank is not None:
                inputs = thin_side(matrix.rows, matrix.cols) == "in"
                moment = self.gram if inputs else wanted.mT @ self.gram @ wanted
                answer = moments.answer(matrix, weight) if self.plan.recipe.metric == "loss" else None
                parts = factor(wanted.float(), matrix.rank, Metric(moment, answer))
            self.made[matrix.name] = parts
            self.corrections.save(matrix.name, parts)
        self.fitted += place == "inner"
        self.progress(f"{ffn.ffn.path} ({place})", self.fitted, len(self.plan.ffns))
        self.at, self.rows = None, None
