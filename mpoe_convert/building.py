"""One matrix: read, decompose, clone, cast, measure."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from . import experts
from .alternating import nearest_chain
from .checkpoint import Checkpoint
from .errors import CheckpointError, RecipeError
from .factoring import factor
from .families import Source
from .moments import FFNMoments, metric_for
from .mpo import check_finite, relative_error
from .neurons import reordered
from .planning import MatrixPlan
from .recipe import Recipe
from .report import MatrixReport
from .runtime.modeling_mpoe import contract_chain, matrix_shape, name_cores


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


def pick_device(name: str) -> torch.device:
    """The torch device of a recipe; "auto" is CUDA where there is one.

    Raises:
        RecipeError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available[device.type]:
        raise RecipeError(f"device {name} is not available here; --device auto picks one that is")
    return device


def read_matrix(checkpoint: Checkpoint, source: Source, device: torch.device) -> Tensor:
    """The dense matrix (in, out), in the dtype of the source. Raises CheckpointError on NaN or Inf."""
    tensor = checkpoint.read(source.weight).to(device)
    check_finite(tensor, source.weight)
    if source.part is not None:
        tensor = tensor.chunk(2, dim=1 if source.transposed else 0)[source.part]
    # Contiguous: the strided copies that the decomposition would make of a transposed view are slow.
    return (tensor if source.transposed else tensor.T).contiguous()


def read_wide(checkpoint: Checkpoint, source: Source, device: torch.device) -> Tensor:
    """`read_matrix` in a dtype that can be decomposed: float64 as it is, all others in float32."""
    matrix = read_matrix(checkpoint, source, device)
    return matrix if matrix.dtype == torch.float64 else matrix.float()


def read_bias(checkpoint: Checkpoint, source: Source) -> Tensor:
    """The bias (out,) of a projection that has one. Raises CheckpointError on NaN or Inf."""
    tensor = checkpoint.read(source.bias)
    check_finite(tensor, source.bias)
    return tensor if source.part is None else tensor.chunk(2)[source.part]


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
        factors = factor(matrix, plan.rank, metric_for(recipe.metric, plan, matrix, moments))
    elif plan.is_cut and moments is not None and recipe.metric != "weights":
        moment = moments.of_inputs(plan, recipe.metric)
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
