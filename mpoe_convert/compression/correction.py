"""Fit every matrix to the dense model's outputs, given the inputs that reach it behind compressed matrices.

The dense model and the compressed one run in lockstep over the calibration text. In front of every matrix
both wait. X are the dense model's inputs, X' those of the model whose earlier matrices are compressed. The
matrix is then fitted to X W, not to itself: the least-squares solution

    W' = (X'^T X' + ridge)^-1 (X'^T X W + ridge W)

takes the place of W, factored in the metric of X'. (SVD-LLM's closed-form update, arXiv 2403.07378, with the
dense model's own activations as the target.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..artifact.folder import TemporaryFolder
from ..decomposition.low_rank import factor, root, thin_side
from ..errors import DataError, RecipeError
from ..options import called
from ..planning.plan import FFNPlan, MatrixPlan
from ..source.matrices import read_matrix
from .batches import num_tokens, token_rows
from .dense_run import DenseRun, Progress
from .lockstep import LockstepWalk, project
from .metrics import FitMetric
from .moment_cache import Calibration
from .moments import FFNMoments, place_of
from .stream import check_activations, run_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of the mean eigenvalue of X'^T X': how strongly W' is held to W.
RIDGE = 1e-3


class Corrections:
    """The corrected matrices, on disk as long as this object lives."""

    def __init__(self) -> None:
        self._kept: TemporaryFolder | None = TemporaryFolder("mpoe-corrections-")
        self.folder = self._kept.path

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": None, "folder": self.folder}  # the folder lasts as long as the first object

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def save(self, name: str, parts: Sequence[Tensor]) -> None:
        """Keep what takes the place of the matrix called `name`."""
        from safetensors.torch import save_file

        save_file({str(k): part.cpu().contiguous() for k, part in enumerate(parts)}, self._file(name))

    def load(self, name: str) -> tuple[Tensor, ...]:
        """The two factors (in, rank) and (rank, out), or the one matrix (in, out)."""
        from safetensors.torch import load_file

        return tuple(part for _, part in sorted(load_file(self._file(name)).items()))


def check_correctable(run: DenseRun) -> None:
    """Check that the matrices of a run can be corrected.

    Raises:
        RecipeError: layers share an FFN, which then has more than one place in the order of matrices.
        DataError: fewer tokens than a matrix has inputs.
    """
    shared = next((ffn.ffn.path for ffn in run.plan.ffns if ffn.runs_per_token != 1), None)
    if shared:
        raise RecipeError(f"correct was asked for, and layers share the FFN {shared}; expected one each")
    needed, tokens = max(matrix.rows for matrix in run.plan.matrices), num_tokens(run.fitted_to)
    if tokens is not None and tokens < needed:
        raise DataError(
            f"correct was asked for with {tokens:,} calibration tokens beside those held out; expected "
            f"the {needed:,} that least squares of {needed:,} inputs need: raise "
            f"{called('calibration_tokens')}"
        )


def correct(run: DenseRun, calibration: Calibration, metric: FitMetric, progress: Progress) -> Corrections:
    """Fit all matrices of the run's plan, in the order in which tokens meet them.

    Raises:
        CheckpointError: activations hold NaN or Inf.
    """
    with run.streamed() as model:
        walk = CorrectionWalk(run, model, calibration, metric, progress)
        walk.walk_batches()
    return walk.corrections


class _LeastSquares:
    """The normal equations of the matrices that read one place: X'^T X', and X'^T X W of each.

    Sums are in float64 over batches; products in float32.

    Attributes:
        weights: by name, W (in, out) in float32.
    """

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights
        rows = next(iter(weights.values())).shape[0]
        options = {"dtype": torch.float64, "device": next(iter(weights.values())).device}
        self.gram = torch.zeros(rows, rows, **options)
        self.targets = {name: torch.zeros(*weight.shape, **options) for name, weight in weights.items()}

    def add(self, dense: Tensor, compressed: Tensor) -> None:
        """Add inputs (tokens, in): X of the dense model, X' of the compressed one."""
        self.gram += (compressed.mT @ compressed).double()
        for name, weight in self.weights.items():
            self.targets[name] += (compressed.mT @ (dense @ weight)).double()

    def solve(self) -> dict[str, Tensor]:
        """W' of each, in float64. The ridge is added to the moment for good."""
        level = RIDGE * float(self.gram.diagonal().mean())
        ridge = level if level > 0 else 1.0
        self.gram.diagonal().add_(ridge)
        half = root(self.gram, ridge)
        return {
            name: torch.cholesky_solve(self.targets[name] + level * weight.double(), half)
            for name, weight in self.weights.items()
        }


class CorrectionWalk(LockstepWalk):
    """Two passes per batch: the even ones are the dense model's, the odd ones the compressed model's."""

    def __init__(
        self,
        run: DenseRun,
        model: PreTrainedModel,
        calibration: Calibration,
        metric: FitMetric,
        progress: Progress,
    ) -> None:
        super().__init__(run, model)
        self.calibration, self.metric, self.progress = calibration, metric, progress
        self.batches = run.fitted_to
        self.corrections = Corrections()
        self.compressed: dict[str, tuple[Tensor, ...]] = {}  # by matrix name, of the FFN that passes are in
        self.dense_rows = torch.empty(0)  # of the dense pass over the batch that runs
        self.equations: _LeastSquares | None = None
        self.num_fitted = 0

    def walk_batches(self) -> None:
        self.walk([partial(run_batch, self.model, batch) for batch in self.batches for _ in range(2)])

    def meet(self, ffn: FFNPlan, place: str, x: Tensor) -> None:
        self._add(ffn, place, x)
        self.wait_at(ffn, place)
        if place == "inner" and ffn is self.run.plan.ffns[-1]:
            self.stop()  # the last matrix is fitted

    def _add(self, ffn: FFNPlan, place: str, x: Tensor) -> None:
        rows = token_rows(self.model, self.batches[self.current // 2], ffn.ffn.path, x)
        check_activations(rows, f"{ffn.ffn.path} ({place})")
        if not self._is_compressed:
            self.dense_rows = rows
            return
        if self.equations is None:
            self.equations = _LeastSquares({m.name: self._read(m) for m in _readers(ffn, place)})
        self.equations.add(self.dense_rows, rows)

    def leave(self, ffn: FFNPlan, matrices: Sequence[MatrixPlan], x: Tensor, y: Tensor) -> Tensor | None:
        """The output of the compressed matrices, in passes of the compressed model."""
        if not self._is_compressed:
            return None
        parts = sorted(matrices, key=lambda matrix: matrix.source.part or 0)
        checkpoint = self.run.checkpoint
        outputs = [project(checkpoint, part.source, x, self.compressed[part.name]) for part in parts]
        return torch.cat(outputs, -1).to(y)

    def release(self, ffn: FFNPlan | None, place: str) -> None:
        """Fit the matrices that the passes wait in front of."""
        if ffn is None or self.equations is None:
            return
        if place == "inputs":  # all passes are behind the FFN before
            self.compressed.clear()
        moments = self.calibration.load(ffn.ffn.path)
        solved = self.equations.solve()
        for matrix in _readers(ffn, place):
            parts = self._fit(matrix, solved[matrix.name], self.equations, moments)
            self.compressed[matrix.name] = parts
            self.corrections.save(matrix.name, parts)
        self.num_fitted += place == "inner"
        self.progress(f"{ffn.ffn.path} ({place})", self.num_fitted, len(self.run.plan.ffns))
        self.equations = None

    def _fit(
        self, matrix: MatrixPlan, wanted: Tensor, equations: _LeastSquares, moments: FFNMoments
    ) -> tuple[Tensor, ...]:
        """W' in float32: whole, or factored."""
        if matrix.rank is None:
            return (wanted.float(),)
        gram, weight = equations.gram, equations.weights[matrix.name]
        moment = gram if thin_side(matrix.rows, matrix.cols) == "in" else wanted.mT @ gram @ wanted
        return factor(wanted.float(), matrix.rank, self.metric.weigh(matrix, weight, moments, moment=moment))

    def _read(self, matrix: MatrixPlan) -> Tensor:
        return read_matrix(self.run.checkpoint, matrix.source, self.run.device).float()

    @property
    def _is_compressed(self) -> bool:
        return self.current % 2 == 1


def _readers(ffn: FFNPlan, place: str) -> list[MatrixPlan]:
    """The matrices of an FFN that multiply what is at a place."""
    return [matrix for matrix in ffn.matrices if place_of(matrix.role) == place]
