"""One matrix: read, decompose, clone, cast, measure."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from . import experts
from .checkpoint import Checkpoint
from .errors import CheckpointError
from .families import Source
from .modeling_mpoe import contract_chain, matrix_shape, name_cores
from .mpo import check_finite, relative_error
from .planning import MatrixPlan
from .recipe import Recipe
from .report import MatrixReport


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A finite tensor in another dtype. Raises CheckpointError if a number is too large for it."""
    if dtype != tensor.dtype and tensor.numel():
        largest = max(abs(float(bound)) for bound in tensor.aminmax())
        if largest > torch.finfo(dtype).max:
            short = str(dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{name} holds numbers up to {largest:.3g}, too large for {short}; use another --dtype"
            )
    return tensor.to(dtype)


def read_matrix(checkpoint: Checkpoint, source: Source, device: torch.device) -> Tensor:
    """The dense matrix (in, out), in the dtype of the source. Raises CheckpointError on NaN or Inf."""
    tensor = checkpoint.read(source.weight).to(device)
    check_finite(tensor, source.weight)
    if source.part is not None:
        tensor = tensor.chunk(2, dim=1 if source.transposed else 0)[source.part]
    # Contiguous: the strided copies that the decomposition would make of a transposed view are slow.
    return (tensor if source.transposed else tensor.T).contiguous()


def _read_bias(checkpoint: Checkpoint, source: Source) -> Tensor:
    tensor = checkpoint.read(source.bias)
    check_finite(tensor, source.bias)
    return tensor if source.part is None else tensor.chunk(2)[source.part]


def build_matrix(
    plan: MatrixPlan, recipe: Recipe, checkpoint: Checkpoint, device: torch.device
) -> tuple[dict[str, Tensor], MatrixReport]:
    """One projection's tensors, named below the projection and on the CPU, and their report."""
    stored = getattr(torch, plan.dtype)
    kind = experts.load(recipe.kind)
    matrix = read_matrix(checkpoint, plan.source, device)
    matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
    generator = seeded(recipe.seed, plan.name)
    fitted, discarded = kind.fit(matrix, plan.sites, recipe, generator)
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
    error = before = relative_error(matrix, _matrix_of(exact, matrix.dtype))
    if stored != fitted[0][0].dtype:
        before = relative_error(matrix, _matrix_of(unrounded, matrix.dtype))
    drift = _drift(exact, clone, matrix.dtype) if recipe.noise else 0.0
    if plan.spec["bias"] is not None:
        bias = cast(plan.source.bias, _read_bias(checkpoint, plan.source), stored)
        per_expert = plan.spec["bias"] == "per-expert"
        tensors["bias"] = bias.repeat(recipe.experts, 1) if per_expert else bias.clone()
    norm = float(matrix.norm()) ** 2 if any(discarded) else 1.0
    measured = _Measured(error, before, tuple(lost / norm for lost in discarded), drift)
    return tensors, _matrix_report(plan, recipe, measured)


@dataclass(frozen=True)
class _Measured:
    error: float
    error_before_cast: float
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
        full_bonds=plan.sites.full_bonds if plan.sites else (),
        relative_error=measured.error,
        relative_error_before_cast=measured.error_before_cast,
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
