"""Rounds the large cores of an FFN, and measures what that changes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..artifact.rounding import round_core
from ..planning.plan import FFNPlan, MatrixPlan
from ..planning.rounding import large_cores
from ..runtime.shapes import functions


def round_ffn(
    plan: FFNPlan, tensors: dict[str, Tensor], bits: int
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """(the tensors as stored, {matrix with a large core: relative error that rounding adds}).

    The error is of all experts' matrices together: Frobenius norm of the change over that of the matrices.
    """
    stored, exact = dict(tensors), dict(tensors)
    errors = {}
    for matrix in plan.matrices:
        large = large_cores(matrix)
        for name, layers in large.items():
            made, exact[name] = round_core(layers, stored.pop(name), bits)
            stored |= made
        if large:
            errors[matrix.name] = _error(matrix, tensors, exact)
    return stored, errors


def _error(matrix: MatrixPlan, before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    lost = energy = 0.0
    for expert in range(matrix.num_experts):
        whole = _contract(matrix, before, expert)
        lost += float((_contract(matrix, after, expert) - whole).square().sum())
        energy += float(whole.square().sum())
    return (lost / energy) ** 0.5 if energy else 0.0


def _contract(matrix: MatrixPlan, tensors: dict[str, Tensor], expert: int) -> Tensor:
    """One expert's matrix (in, out), in float32 at least."""
    total: Tensor | None = None
    for number, term in enumerate(matrix.spec["terms"]):
        with torch.device("meta"):
            chain = functions().Chain(term, matrix.num_experts)
        cores = [tensors[f"{matrix.name}.terms.{number}.{name}"] for name in chain.core_names]
        is_double = any(core.dtype == torch.float64 for core in cores)
        part = chain.matrix(cores, expert, torch.float64 if is_double else torch.float32)
        total = part if total is None else total + part
    assert total is not None, "a projection has at least one term"
    return total
