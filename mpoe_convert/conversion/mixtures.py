"""The experts of a mixture: read, fitted, cast, measured, reported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..decomposition.stack_fit import alikeness, fit_stack, stack_errors
from ..decomposition.stack_metric import Stack
from ..decomposition.stacks import UNEVEN, packed_cores
from ..options import called
from ..planning.fewer_experts import FewerExperts
from ..planning.mixtures import MixturePlan, StackPlan
from ..runtime.shapes import functions
from ..source.checkpoint import Checkpoint
from ..source.mixtures import read_biases, read_stack
from ..tables import Cell, Table, listed_ranks
from ..tensors import cast
from .report import BROKEN_NATS, MatrixReport, Report

if TYPE_CHECKING:
    from ..compression.expert_moments import ExpertMoments


@dataclass(frozen=True)
class StackReport(MatrixReport):
    """One projection of all experts of a layer.

    Attributes:
        form, ranks: see `decomposition.stacks`.
        experts: how many.
        relative_error: of all experts together, as stored; `expert_errors` of each.
        output_error: relative difference of the experts' expected outputs, in the metric of what each gets.
        alike: how much of the experts' outputs their mean explains, see `alikeness`.
    """

    form: str = "whole"
    ranks: tuple[int, ...] = ()
    experts: int = 1
    expert_errors: tuple[float, ...] = ()
    alike: float = 0.0

    def row(self) -> dict[str, Cell]:
        return {
            "experts' matrix": self.name,
            "size": f"{self.experts} x {self.shape[0]} x {self.shape[1]}",
            "shared": self.form,
            "ranks": listed_ranks(self.ranks, self.form in UNEVEN),
            "alike": f"{self.alike:.2f}",
            "relative error": f"{self.relative_error:.2e}",
            "worst expert": f"{max(self.expert_errors):.2e}",
            "of outputs": None if self.output_error is None else f"{self.output_error:.2e}",
            "source": self.dense_params,
            "stored": self.stored_params,
            "kept": f"{self.stored_params / self.dense_params:.0%}",
        }


def build_stack(
    plan: StackPlan, checkpoint: Checkpoint, device: torch.device, moments: ExpertMoments | None
) -> tuple[dict[str, Tensor], StackReport]:
    """A projection's tensors, named below the projection and on the CPU, and their report.

    Raises:
        CheckpointError: an expert's matrix holds NaN or Inf, or is too large for the stored dtype.
    """
    matrices = read_stack(checkpoint, plan.source).to(device)
    metric = None if moments is None else moments.metric("inner" if plan.role == "down" else "inputs")
    stored = getattr(torch, plan.dtype)
    terms = plan.spec["terms"]
    if plan.form == "whole":
        cores, stack = ((matrices,),), Stack(matrices, metric)
    else:
        fit = fit_stack(matrices, plan.form, plan.ranks, metric)
        cores, stack = fit.cores, fit.stack
    tensors: dict[str, Tensor] = {}
    kept: list[list[Tensor]] = []
    for number, (term, made) in enumerate(zip(terms, cores, strict=True)):
        names = functions().name_cores(term)
        kept.append([cast(f"{plan.name} (core {n})", c, stored) for n, c in zip(names, made, strict=True)])
        packed = packed_cores(kept[-1], plan.ranks) if "by_expert" in term else kept[-1]
        for name, core in zip(names, packed, strict=True):
            tensors[f"terms.{number}.{name}"] = core.contiguous().cpu()
    report = _measure(plan, stack, kept)
    if plan.source.bias is not None:
        tensors["bias"] = cast(f"{plan.name}.bias", read_biases(checkpoint, plan.source), stored).contiguous()
    return tensors, report


def _measure(plan: StackPlan, stack: Stack, cores: Sequence[Sequence[Tensor]]) -> StackReport:
    """The errors of a stack, from its cores in the dtype in which they are stored."""
    found = stack_errors(stack, cores)
    error = found.weight_error**0.5
    return StackReport(
        name=plan.name,
        kind="experts",
        shape=(plan.rows, plan.cols),
        in_dims=(plan.rows,),
        out_dims=(plan.cols,),
        bonds=(max(plan.ranks),) if plan.form in UNEVEN else plan.ranks,
        full_bonds=(),
        rank=None,
        relative_error=error,
        relative_error_before_cast=error,
        output_error=None if stack.moments is None else found.error**0.5,
        discarded_weight=(),
        clone_drift=0.0,
        dense_params=plan.dense_params,
        stored_params=plan.stored_params,
        dtype=plan.dtype,
        form=plan.form,
        ranks=plan.ranks,
        experts=len(stack),
        expert_errors=tuple(found.weight_errors.sqrt().tolist()),
        alike=alikeness(stack) if plan.alike is None else plan.alike,
    )


@dataclass(frozen=True, repr=False)
class MixtureReport(Report):
    """The conversion of a mixture."""

    @property
    def stacks(self) -> tuple[StackReport, ...]:
        return tuple(matrix for matrix in self.matrices if isinstance(matrix, StackReport))

    @property
    def fewer(self) -> FewerExperts | None:
        """Which experts of the source stay; None: all."""
        assert isinstance(self.plan, MixturePlan)
        return self.plan.fewer

    def shown(self, limit: int | None = None, *, per_matrix: bool = False) -> Iterator[Table | str]:
        """See `Shown`."""
        first, *rest = super().shown(limit, per_matrix=per_matrix)
        yield first
        if self.fewer is not None:
            yield self.fewer.table().head(limit)
        yield from rest

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {"fewer_experts": self.fewer.to_json() if self.fewer else None}

    def _error_warnings(self) -> list[str]:
        if self.plan.is_exact:
            return []
        if self.fewer is not None and self.divergence and self.divergence.distance > BROKEN_NATS:
            return [
                "the model is far from its source on held-out calibration text. Raise "
                f"{called('experts')}, or heal it with finetune, {called('teacher')}."
            ]
        if self.divergence:
            return []
        return [
            "experts were cut without calibration. Expect worse outputs; "
            f"{called('calibrate')} keeps what matters on your text."
        ]

    def matrices_table(self) -> Table:
        rows = tuple(matrix.row() for matrix in self.stacks)
        return Table("Experts", rows, left=("experts' matrix", "size", "shared", "ranks"))

    def layers_table(self) -> Table:
        groups = groupby(self.stacks, key=lambda matrix: matrix.name.rpartition(".")[0])
        return Table(
            "Layers", tuple(_layer(name, list(stacks)) for name, stacks in groups), left=("layer", "shared")
        )


def _layer(name: str, stacks: Sequence[StackReport]) -> dict[str, Cell]:
    """A layer as a table shows it: its worst matrix counts."""
    of_outputs = [each.output_error for each in stacks if each.output_error is not None]
    return {
        "layer": name,
        "shared": ", ".join(dict.fromkeys(each.form for each in stacks)),
        "alike": f"{min(each.alike for each in stacks):.2f}",
        "largest error": f"{max(each.relative_error for each in stacks):.2e}",
        "of outputs": f"{max(of_outputs):.2e}" if of_outputs else None,
        "source": (source := sum(each.dense_params for each in stacks)),
        "stored": (stored := sum(each.stored_params for each in stacks)),
        "kept": f"{stored / source:.0%}",
    }
