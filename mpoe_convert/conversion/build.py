"""One matrix: read, decompose, clone, cast, measure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .. import experts
from ..compression import metrics
from ..compression.moments import FFNMoments
from ..decomposition.als import nearest_chain
from ..decomposition.low_rank import factor
from ..decomposition.mpo import fit, relative_error
from ..decomposition.neuron_order import bisection, neuron_features, reordered
from ..planning.plan import FFNPlan, MatrixPlan
from ..planning.recipe import Recipe
from ..runtime.modeling_mpoe import contract_chain, matrix_shape, name_cores
from ..source.checkpoint import Checkpoint
from ..source.matrices import read_bias, read_wide
from ..tensors import cast
from .report import MatrixReport, NeuronOrder


def build_matrix(
    plan: MatrixPlan,
    recipe: Recipe,
    checkpoint: Checkpoint,
    device: torch.device,
    moments: FFNMoments | None = None,
    corrected: tuple[Tensor, ...] = (),
    order: Tensor | None = None,
) -> tuple[dict[str, Tensor], MatrixReport]:
    """One projection's tensors, named below the projection and on the CPU, and their report.

    Args:
        moments: the metric of a plan that compresses or cuts chains, and inputs to measure with.
        corrected: what takes the matrix's place: two factors, or one matrix.
        order: of the hidden neurons, new place -> old one; None: as in the source. The moments are in it.
    """
    stored = getattr(torch, plan.dtype)
    kind = experts.load(recipe.kind)
    matrix = reordered(read_wide(checkpoint, plan.source, device), plan.role, order)
    generator = seeded(recipe.seed, plan.name)
    fitted_to, factors = matrix, None
    if len(corrected) == 1:
        fitted_to = corrected[0].to(matrix)
    elif corrected:
        factors = tuple(part.to(matrix) for part in corrected)
    elif plan.rank is not None:
        factors = factor(matrix, plan.rank, metrics.load(recipe.metric).weigh(plan, matrix, moments))
    elif plan.is_cut and moments is not None and (chosen := metrics.load(recipe.metric)).input_moment:
        moment = chosen.input_moment(moments, plan)
        fitted_to = nearest_chain(matrix, plan.sites, moment, svd=recipe.svd, seed=recipe.seed)
    fitted, discarded = kind.fit(fitted_to, plan.sites, recipe, generator, factors)
    tensors, exact, clone, unrounded = {}, [], [], []
    for number, (term, cores) in enumerate(zip(plan.spec["terms"], fitted, strict=True)):
        whole = [core if core.ndim == 4 else core[0] for core in cores]
        unrounded.append([core.to(device) for core in whole])
        exact.append([])
        clone.append([])
        for name, core, shared in zip(name_cores(term), cores, term["shared"], strict=True):
            core = core.to(device)
            if not shared and core.ndim == 4:
                core = _clones(core, recipe.experts, recipe.noise, generator)
            core = cast(f"{plan.name} (core {name})", core, stored)
            exact[-1].append(core if shared else core[0])
            clone[-1].append(core if shared else core[1])
            matrices = core.reshape(*core.shape[:-4], *matrix_shape(core.shape[-4:]))
            tensors[f"terms.{number}.{name}"] = matrices.cpu()
    made = _matrix_of(exact, matrix.dtype)
    error = before = relative_error(matrix, made)
    if stored != fitted[0][0].dtype:
        before = relative_error(matrix, _matrix_of(unrounded, matrix.dtype))
    drift = _drift(exact, clone, matrix.dtype) if recipe.noise else 0.0
    if plan.spec["bias"] is not None:
        bias = reordered(read_bias(checkpoint, plan.source), plan.role, order)
        bias = cast(plan.source.bias, bias, stored)
        per_expert = plan.spec["bias"] == "per-expert"
        tensors["bias"] = bias.repeat(recipe.experts, 1) if per_expert else bias.clone()
    if fitted_to is not matrix:
        discarded = ()  # it says nothing of the distance to the matrix
    norm = float(matrix.norm()) ** 2 if any(discarded) else 1.0
    output_error = None if moments is None else moments.output_error(plan, matrix, made)
    measured = _Measured(error, before, output_error, tuple(lost / norm for lost in discarded), drift)
    return tensors, _matrix_report(plan, recipe, measured)


@dataclass(frozen=True)
class _Measured:
    error: float
    error_before_cast: float
    output_error: float | None
    discarded: tuple[float, ...]
    drift: float


def _matrix_report(plan: MatrixPlan, recipe: Recipe, measured: _Measured) -> MatrixReport:
    term = plan.own_term
    return MatrixReport(
        name=plan.name,
        kind=recipe.kind,
        shape=(plan.rows, plan.cols),
        in_dims=tuple(term["in_dims"]),
        out_dims=tuple(term["out_dims"]),
        bonds=tuple(term["bonds"]),
        full_bonds=plan.full_bonds,
        rank=plan.rank,
        relative_error=measured.error,
        relative_error_before_cast=measured.error_before_cast,
        output_error=measured.output_error,
        discarded_weight=measured.discarded,
        clone_drift=measured.drift,
        dense_params=plan.dense_params,
        stored_params=plan.stored_params,
        dtype=plan.dtype,
    )


def _drift(exact: list[list[Tensor]], clone: list[list[Tensor]], dtype: torch.dtype) -> float:
    """Relative distance of a clone's matrix from expert 0's, on an eighth of the rows where there are 8.

    The noise is alike everywhere, and the whole matrix would take as long as the decomposition.
    """

    def some_rows(terms: list[list[Tensor]]) -> Tensor:
        pieces = [[cores[0][:, : max(cores[0].shape[1] // 8, 1)], *cores[1:]] for cores in terms]
        return _matrix_of(pieces, dtype)

    return relative_error(some_rows(exact), some_rows(clone))


def _matrix_of(terms: list[list[Tensor]], dtype: torch.dtype) -> Tensor:
    return sum(contract_chain([core.to(dtype) for core in cores]) for cores in terms)


def seeded(seed: int, name: str) -> torch.Generator:
    """A CPU generator of its own for every tensor: independent of order, subset and device."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _clones(core: Tensor, num_experts: int, noise: float, generator: torch.Generator) -> Tensor:
    """(l, i, o, r) -> (E, l, i, o, r): expert 0 exact, the others with noise of the core's own scale."""
    clones = core.repeat(num_experts, 1, 1, 1, 1)
    if noise:
        scale = noise * float(core.square().mean().sqrt())
        for clone in clones[1:]:
            clone += scale * torch.randn(core.shape, generator=generator).to(core)
    return clones


def choose_order(
    plan: FFNPlan, matrices: Mapping[str, Tensor], recipe: Recipe
) -> tuple[Tensor | None, NeuronOrder]:
    """The order by bisection if cutting the bonds then loses less than in the source's order, else None.

    Args:
        matrices: by role, (in, out), in a dtype that can be decomposed.

    Returns:
        The order (inner size,), new place -> old one, and both errors.
    """
    order = bisection(neuron_features(matrices))
    source, bisected = (_lost(plan, matrices, recipe, tried) for tried in (None, order))
    chosen = order if bisected < source else None
    return chosen, NeuronOrder(plan.ffn.path, source, bisected, chosen is not None)


def _lost(plan: FFNPlan, matrices: Mapping[str, Tensor], recipe: Recipe, order: Tensor | None) -> float:
    """Relative error of all matrices together, by TT-SVD."""
    decompose = partial(fit, svd=recipe.svd, seed=recipe.seed)
    lost = sum(
        sum(decompose(reordered(matrices[matrix.role], matrix.role, order), matrix.sites).discarded)
        for matrix in plan.matrices
    )
    norm = sum(float(matrix.norm()) ** 2 for matrix in matrices.values())
    return (lost / norm) ** 0.5 if norm else 0.0
