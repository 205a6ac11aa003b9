"""What a conversion's work costs on this machine: its own code on random matrices like its FFNs'."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from math import lcm, sqrt
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from .. import experts
from ..allocator import keeping_freed_memory
from ..decomposition.stack_fit import Stack, fit_stack, stack_errors
from ..decomposition.stacks import largest_ranks
from ..devices import pick_device
from ..experts.ffn import FFNShape, Fitted, MatrixShape
from ..planning.mixtures import StackPlan
from ..planning.plan import FFNPlan, MatrixPlan, Plan
from ..planning.shares import Costs
from ..source.checkpoint import Checkpoint
from ..source.safetensors_file import TensorInfo
from ..source.torch_file import dtype_name
from .build import FFNTargets, choose_order, finish_projection
from .slices import finish_slices

# Larger matrices are tried at this many numbers: more than a processor's caches hold, done in a second.
TRIED = 1 << 23
# Experts of a mixture's layer that are tried.
TRIED_EXPERTS = 8
# Sizes are cut to multiples of this, which every layout can split, and of what the kind asks for.
STEP = 64
# Bytes that are written and read to measure the disk.
DISK_BYTES = 1 << 27


def measure(plan: Plan, disk: float | None = None, flops: float | None = None) -> Costs:
    """What the parts of a planned conversion cost on this machine.

    FFNs of the same sizes are tried once, cut to about `TRIED` numbers a matrix, and scaled: the work grows
    with the numbers of a matrix, and under a budget with its smaller side as well.

    Args:
        plan: of a dense source or a mixture.
        disk: bytes per second that are read or written; None: measured, from and to the page cache.
        flops: float32 operations per second of the machine that will convert; None: this one's.
    """
    device = pick_device(plan.recipe.device)
    with keeping_freed_memory():  # as the conversion does
        faster = 1.0 if flops is None else flops / _products_per_second(device)
        known: dict[tuple, float] = {}
        seconds = {}
        for ffn in plan.ffns:
            key = tuple((m.role, m.rows, m.cols, m.rank, getattr(m, "ranks", ())) for m in ffn.matrices)
            if key not in known:
                known[key] = _seconds_of(plan, ffn, device)
            seconds[ffn.ffn.key] = known[key] / faster
        return Costs(disk or _disk_speed(), seconds)


def _seconds_of(plan: Plan, ffn: FFNPlan, device: torch.device) -> float:
    """Of the work on one FFN, without reading and writing."""
    if isinstance(ffn.matrices[0], StackPlan):
        return sum(
            _seconds_of_stack(matrix, device) for matrix in ffn.matrices if isinstance(matrix, StackPlan)
        )
    largest = max(matrix.rows * matrix.cols for matrix in ffn.matrices)
    is_cut = largest > TRIED and plan.recipe.factors is None
    cut = sqrt(TRIED / largest) if is_cut else 1.0
    trial, source = _cut_ffn(plan, ffn, cut)
    seconds = _timed(lambda: _run(plan, trial, source, device))
    ratio = _numbers(ffn) / _numbers(trial)
    is_ranked = any(matrix.rank is not None for matrix in ffn.matrices)
    return seconds * ratio * (sqrt(ratio) if is_ranked else 1.0)


def _numbers(ffn: FFNPlan) -> int:
    return sum(matrix.rows * matrix.cols for matrix in ffn.matrices)


def _cut_ffn(plan: Plan, ffn: FFNPlan, cut: float) -> tuple[FFNPlan, _Random]:
    """The FFN with smaller matrices, and a checkpoint that has them."""
    step = lcm(STEP, plan.recipe.own_options.divides_neurons_by)
    shapes = {
        matrix.role: MatrixShape(
            _cut(matrix.rows, cut, step),
            _cut(matrix.cols, cut, step),
            matrix.source.bias is not None,
            None if matrix.rank is None else max(int(matrix.rank * cut), 1),
        )
        for matrix in ffn.matrices
    }
    shape = FFNShape(ffn.shape.name, shapes, ffn.shape.num_source_experts)
    form = experts.load(plan.recipe.kind).describe(shape, plan.recipe.own_options)
    matrices = tuple(
        replace(
            matrix,
            rows=shapes[matrix.role].rows,
            cols=shapes[matrix.role].cols,
            sites=form.sites.get(matrix.role),
            spec=form.parts[matrix.role],
            rank=shapes[matrix.role].rank,
        )
        for matrix in ffn.matrices
    )
    return replace(ffn, shape=shape, matrices=matrices, form=form, tensors={}), _Random.of(matrices)


def _cut(size: int, cut: float, step: int) -> int:
    return size if cut == 1 else min(max(round(size * cut / step), 1) * step, size)


class _Random(Checkpoint):
    """A checkpoint of random matrices in memory."""

    made: dict[str, Tensor]

    @classmethod
    def of(cls, matrices: tuple[MatrixPlan, ...]) -> _Random:
        """One with what the matrices are read from; halves of a fused tensor from one of its size."""
        made: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(0)
        for matrix in matrices:
            source, parts = matrix.source, 1 if matrix.source.part is None else 2
            shape = (matrix.rows, parts * matrix.cols)
            dtype = getattr(torch, matrix.dtype)
            weight = 0.02 * torch.randn(shape if source.transposed else shape[::-1], generator=generator)
            made[source.weight] = weight.to(dtype)
            if source.bias is not None:
                made[source.bias] = torch.zeros(parts * matrix.cols, dtype=dtype)
        infos = {name: TensorInfo(name, dtype_name(t), tuple(t.shape), "") for name, t in made.items()}
        found = cls("a trial", Path(), None, {}, infos)
        object.__setattr__(found, "made", made)
        return found

    def read(self, name: str) -> Tensor:
        return self.made[name]


def _run(plan: Plan, ffn: FFNPlan, source: _Random, device: torch.device) -> None:
    """Make an FFN as a conversion does."""
    recipe, order = plan.recipe, None
    if plan.seeks_order(ffn):
        matrices = {matrix.role: torch.randn(matrix.rows, matrix.cols) for matrix in ffn.matrices}
        order, _ = choose_order(ffn, matrices, recipe)
    targets = FFNTargets(ffn, recipe, source, device, order=order)
    for part, built in experts.load(recipe.kind).build(targets, ffn.form, recipe.own_options):
        if isinstance(built, Fitted):
            (finish_projection if built.neurons is None else finish_slices)(targets, part, built)


def _seconds_of_stack(matrix: StackPlan, device: torch.device) -> float:
    """Of the fit of a layer's experts, and of its measurement; nothing where they are copied."""
    if matrix.form == "whole":
        return 0.0
    number = min(matrix.num_experts, TRIED_EXPERTS)
    cut = min(sqrt(TRIED / (number * matrix.rows * matrix.cols)), 1.0)
    rows, cols = _cut(matrix.rows, cut, STEP), _cut(matrix.cols, cut, STEP)
    most = largest_ranks(matrix.form, number, rows, cols)
    each = matrix.ranks if len(matrix.ranks) == len(most) else (round(mean(matrix.ranks)),)
    ranks = tuple(min(max(int(rank * cut), 1), limit) for rank, limit in zip(each, most, strict=True))
    matrices = torch.randn(number, rows, cols, device=device)

    def run() -> None:
        fit = fit_stack(matrices, matrix.form, ranks)
        assert isinstance(fit.stack, Stack)
        stack_errors(fit.stack, fit.cores)

    ratio = matrix.num_experts * matrix.rows * matrix.cols / matrices.numel()
    return _timed(run) * ratio * min(matrix.rows, matrix.cols) / min(rows, cols)


def _timed(work: Callable[[], object]) -> float:
    """Seconds of the faster of two runs: the first one also loads libraries."""
    found = []
    for _ in range(2):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def _products_per_second(device: torch.device) -> float:
    """float32 operations per second of this machine, in a product as thin as those of cores."""
    thin, wide = torch.randn(64, 64, device=device), torch.randn(64, 1 << 17, device=device)
    return 2 * 64 * 64 * (1 << 17) / _timed(lambda: float((thin @ wide)[0, 0]))


def _disk_speed() -> float:
    """Bytes per second that are written to, and read from, a file in the folder of temporary files."""
    data = bytes(DISK_BYTES)

    def run() -> None:
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.seek(0)
            file.read()

    return 2 * DISK_BYTES / _timed(run)
