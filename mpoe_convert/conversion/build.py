"""One FFN: its matrices as a kind fits them, and what becomes of the cores: cloned, cast, measured."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from ..compression import metrics
from ..compression.moments import FFNMoments
from ..decomposition.als import nearest_chain
from ..decomposition.low_rank import factor
from ..decomposition.mpo import error_of_pieces, fit, relative_error
from ..decomposition.neuron_order import bisection, neuron_features, reordered
from ..experts.ffn import Activations, FFNShape, Fitted, Target
from ..experts.matrixwise import perturbed
from ..planning.plan import FFNPlan, MatrixPlan
from ..planning.recipe import Recipe
from ..runtime.shapes import functions
from ..source.checkpoint import Checkpoint
from ..source.matrices import read_bias, read_wide
from ..tensors import cast
from .report import MatrixReport, NeuronOrder

# A matrix is compared with its chain in pieces of about this many numbers.
_PIECE = 1 << 20
# A clone's distance from the first expert is measured on so many numbers, and in so many rows or columns.
_SAMPLED, _FEWEST = 1 << 18, 128


class FFNTargets:
    """The matrices of one dense FFN, read and prepared when the kind asks (`experts.ffn.Targets`).

    Args:
        moments: what matrices are fitted and measured with, for neurons in the order `order`.
        corrected: (name of a matrix) -> what takes its place: two factors, one matrix, or nothing.
        order: of the hidden neurons, new place -> old one; None: as in the source.
        asked: called with the plan of a matrix before it is read.
        activations: of the dense FFN, for kinds that look at them.
    """

    def __init__(
        self,
        plan: FFNPlan,
        recipe: Recipe,
        checkpoint: Checkpoint,
        device: torch.device,
        moments: FFNMoments | None = None,
        corrected: Callable[[str], tuple[Tensor, ...]] = lambda name: (),
        order: Tensor | None = None,
        asked: Callable[[MatrixPlan], None] = lambda matrix: None,
        activations: Activations | None = None,
    ) -> None:
        self.activations = activations
        self.plan, self.recipe, self.checkpoint, self.device = plan, recipe, checkpoint, device
        self.moments, self.corrected, self.order, self.asked = moments, corrected, order, asked
        self.matrices = {matrix.role: matrix for matrix in plan.matrices}
        # Role, dense matrix, and whether it is the target itself.
        self.last: tuple[str, Tensor, bool] | None = None

    @property
    def shape(self) -> FFNShape:
        return self.plan.shape

    def generator(self, part: str) -> torch.Generator:
        return seeded(self.recipe.seed, f"{self.plan.ffn.key}.{part}")

    def target(self, role: str, expert: int = 0) -> Target:
        """Raises CheckpointError: the source's matrix holds NaN or Inf."""
        assert expert == 0, "a dense FFN has one expert"
        plan = self.matrices[role]
        self.asked(plan)
        dense = self.dense(role)
        target = self._target(plan, dense)
        self.last = role, dense, target.matrix is dense
        return target

    def dense(self, role: str) -> Tensor:
        """(in, out) of the source, neurons in order."""
        if self.last is not None and self.last[0] == role:
            return self.last[1]
        return reordered(
            read_wide(self.checkpoint, self.matrices[role].source, self.device), role, self.order
        )

    def bias(self, role: str) -> Tensor:
        """(out,) of the source, neurons in order."""
        return reordered(read_bias(self.checkpoint, self.matrices[role].source), role, self.order)

    def fits_the_source(self, role: str) -> bool:
        """Whether the last target was the source's matrix itself, so that what was truncated is its error."""
        return self.last is not None and self.last[0] == role and self.last[2]

    def _target(self, plan: MatrixPlan, dense: Tensor) -> Target:
        corrected = tuple(part.to(dense) for part in self.corrected(plan.name))
        if len(corrected) == 1:
            return Target(corrected[0])
        if corrected:
            return Target(dense, (corrected[0], corrected[1]))
        if self.recipe.metric is None:
            return Target(dense)
        metric = metrics.load(self.recipe.metric)
        if plan.rank is not None:
            return Target(dense, factor(dense, plan.rank, metric.weigh(plan, dense, self.moments)))
        if plan.sites is None or not plan.is_truncated or self.moments is None or metric.input_moment is None:
            return Target(dense)
        moment = metric.input_moment(self.moments, plan)
        options = self.recipe.own_options
        return Target(nearest_chain(dense, plan.sites, moment, svd=options.svd, seed=options.seed))


def finish_projection(
    targets: FFNTargets, role: str, fitted: Fitted
) -> tuple[dict[str, Tensor], MatrixReport]:
    """A projection's tensors, named below the projection and on the CPU, and their report."""
    plan, recipe = targets.matrices[role], targets.recipe
    tensors: dict[str, Tensor] = {}
    cores = _finish_cores(targets, role, fitted, tensors)
    if plan.spec["bias"] is not None:
        bias = cast(f"{plan.name}.bias", targets.bias(role), getattr(torch, plan.dtype))
        is_own = plan.spec["bias"] == "per-expert"
        tensors["bias"] = bias.repeat(recipe.own_options.stored_experts, 1) if is_own else bias.clone()
    return tensors, matrix_report(plan, recipe, _measure(targets, role, fitted.discarded, cores))


class _Terms(NamedTuple):
    """The cores of every term of a projection, each (l, i, o, r).

    Attributes:
        exact, clone: of experts 0 and 1, in the dtype in which they are stored.
        unrounded: of expert 0, in that in which they were fitted.
    """

    exact: list[list[Tensor]]
    clone: list[list[Tensor]]
    unrounded: list[list[Tensor]]


def _finish_cores(targets: FFNTargets, role: str, fitted: Fitted, tensors: dict[str, Tensor]) -> _Terms:
    """Clone and round the cores of a projection, and add them to the tensors that are stored."""
    plan, recipe, device = targets.matrices[role], targets.recipe, targets.device
    stored, generator = getattr(torch, plan.dtype), targets.generator(role)
    found = _Terms([], [], [])
    for number, (term, cores) in enumerate(zip(plan.spec["terms"], fitted.terms, strict=True)):
        unrounded = [(core[0] if isinstance(core, list) else core).to(device) for core in cores]
        found.unrounded.append(_of_expert(unrounded, term, 0))
        pairs = []
        for name, core, shared in zip(functions().name_cores(term), cores, term["shared"], strict=True):
            whole = f"{plan.name} (core {name})"
            if isinstance(core, list):
                core = [cast(whole, own.to(device), stored) for own in core]
            elif shared:
                core = cast(whole, core.to(device), stored)
            else:
                core = clones(core.to(device), recipe.own_options.stored_experts, recipe.noise, generator)
                core = cast(whole, core, stored)
            pairs.append((core, core) if isinstance(core, Tensor) and shared else (core[0], core[1]))
            tensors[f"terms.{number}.{name}"] = _as_stored(core).cpu()
        found.exact.append(_of_expert([first for first, _ in pairs], term, 0))
        found.clone.append(_of_expert([second for _, second in pairs], term, 1))
    return found


def _measure(targets: FFNTargets, role: str, discarded: Sequence[float], cores: _Terms) -> Measured:
    """How far a projection's stored cores are from the source, from what was fitted, and from each other.

    Args:
        discarded: of the fit, see `Fitted`.
    """
    plan, dense = targets.matrices[role], targets.dense(role)
    copies, of_clone = (_copies(plan, expert) for expert in (0, 1))
    error = before = _error(dense, cores.exact, copies)
    if cores.exact[0][0].dtype != cores.unrounded[0][0].dtype:
        is_exact = plan.is_exact and targets.fits_the_source(role)  # to rounding, which a part shows
        before = _error(dense, cores.unrounded, copies, every=8 if is_exact else 1)
    drift = 0.0
    if targets.recipe.noise:
        drift = _drift(dense, (cores.exact, copies), (cores.clone, of_clone))
    output_error = None
    if targets.moments is not None:
        made = _matrix_of(cores.exact, copies, dense.dtype)
        output_error = targets.moments.output_error(plan, dense, made)
    if not targets.fits_the_source(role):  # what was discarded is no distance to the source
        discarded = ()
    norm = float(dense.norm()) ** 2 if any(discarded) else 1.0
    return Measured(error, before, output_error, tuple(lost / norm for lost in discarded), drift)


@dataclass(frozen=True)
class Measured:
    """What `MatrixReport` says of a matrix beside its sizes."""

    error: float
    error_before_cast: float
    output_error: float | None
    discarded: tuple[float, ...]
    drift: float


def matrix_report(plan: MatrixPlan, recipe: Recipe, measured: Measured) -> MatrixReport:
    """The report of a matrix."""
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


def _error(dense: Tensor, terms: list[list[Tensor]], copies: list[list[int]], every: int = 1) -> float:
    """Relative distance of the sum of the terms from a matrix, by pieces that a processor's cache holds.

    Args:
        every: take the first of so many pieces, and estimate the others' errors from theirs; all if these
            are zero.
    """
    cut = _cuts(dense, terms)
    some = cut[::every]
    if every > 1 and not any(dense[part].any() for part, _ in some):
        some = cut
    pieces = ((dense[part], _matrix_of(own, copies, dense.dtype)) for part, own in some)
    return error_of_pieces(dense, pieces, is_sample=len(some) < len(cut))


def _cuts(dense: Tensor, terms: list[list[Tensor]]) -> list[tuple[tuple[slice, slice], list[list[Tensor]]]]:
    """Pieces of a matrix, each with what the terms are there.

    Rows are cut where a chain's first core has them, columns where its last core has them all.
    """
    whole, number = slice(None), max(dense.numel() // _PIECE, 1)
    rows = {cores[0].shape[1] for cores in terms}
    columns = {cores[-1].shape[2] for cores in terms}
    if len(rows) == 1 and min(rows) >= number:
        each = dense.shape[0] // min(rows)  # rows of the matrix per row of the first core
        return [
            (
                (slice(first * each, last * each), whole),
                [[cores[0][:, first:last], *cores[1:]] for cores in terms],
            )
            for first, last in _ranges(min(rows), number)
        ]
    if columns == {dense.shape[1]}:
        return [
            ((whole, slice(first, last)), [[*cores[:-1], cores[-1][:, :, first:last]] for cores in terms])
            for first, last in _ranges(dense.shape[1], number)
        ]
    return [((whole, whole), terms)]


def _ranges(size: int, number: int) -> list[tuple[int, int]]:
    """About so many ranges that make up a size."""
    step = -(-size // number)
    return [(first, min(first + step, size)) for first in range(0, size, step)]


def _as_stored(core: Tensor | list[Tensor]) -> Tensor:
    """A core, (..., l, i, o, r), or the experts' in a list, as a chain holds it."""
    if isinstance(core, list):
        matrices = [_as_stored(own) for own in core]
        differ = len({matrix.shape for matrix in matrices}) > 1
        return torch.cat([matrix.flatten() for matrix in matrices]) if differ else torch.stack(matrices)
    l, i, o, r = core.shape[-4:]  # noqa: E741  (bond names)
    return core.reshape(*core.shape[:-4], *functions().matrix_shape((l, i, o, r)))


def _of_expert(cores: list[Tensor], term: dict, expert: int) -> list[Tensor]:
    """The cores of one expert, what all share in the shape that it has there."""
    shapes = functions().chain_shapes(functions().term_of(term, expert))
    return [core.reshape(shape) for core, shape in zip(cores, shapes, strict=True)]


def _copies(plan: MatrixPlan, expert: int) -> list[list[int]]:
    """Per term, see `count_copies`, as an expert has it."""
    terms = (functions().term_of(term, expert) for term in plan.spec["terms"])
    return [functions().count_copies(term) for term in terms]


def _drift(
    dense: Tensor,
    exact: tuple[list[list[Tensor]], list[list[int]]],
    clone: tuple[list[list[Tensor]], list[list[int]]],
) -> float:
    """Relative distance of a clone's matrix from expert 0's, on a sample of the rows or columns, if it can.

    The noise is alike everywhere, and the whole matrix would take as long as the decomposition.

    Args:
        dense: the source's matrix, of their size and with the dtype to compute in.
        exact, clone: terms and, per term, what `count_copies` gives.
    """
    kept = _sample([*exact[0], *clone[0]], dense.numel())

    def some(terms: list[list[Tensor]], copies: list[list[int]]) -> Tensor:
        return _matrix_of([kept(cores) for cores in terms], copies, dense.dtype)

    sample = some(*exact)
    if not sample.any():  # rows of zeros, by chance or by padding
        return relative_error(_matrix_of(*exact, dense.dtype), _matrix_of(*clone, dense.dtype))
    return relative_error(sample, some(*clone))


def _sample(terms: list[list[Tensor]], numbers: int) -> Callable[[list[Tensor]], list[Tensor]]:
    """What leaves of a chain some rows of its matrix, or columns, if its last core has more of them.

    An eighth of them; of large matrices fewer, `_SAMPLED` numbers, but then at least `_FEWEST` rows or
    columns. Of all these chains the same: where their first cores differ in their rows, a row stands for as
    many neighbours as the greatest common divisor leaves together.

    Args:
        numbers: in the matrix.
    """
    rows, columns = (gcd(*sizes) for sizes in zip(*map(_ends, terms), strict=True))
    by_columns = rows < columns and len({_ends(cores)[1] for cores in terms}) == 1
    step = max(8, min((columns if by_columns else rows) // _FEWEST, numbers // _SAMPLED))
    if by_columns:
        return lambda cores: [*cores[:-1], cores[-1][:, :, ::step]]
    return lambda cores: [cores[0].unflatten(1, (rows, -1))[:, ::step].flatten(1, 2), *cores[1:]]


def _ends(cores: list[Tensor]) -> tuple[int, int]:
    """Rows of the first core and columns of the last one."""
    return cores[0].shape[1], cores[-1].shape[2]


@torch.no_grad()
def _matrix_of(terms: list[list[Tensor]], copies: list[list[int]], dtype: torch.dtype) -> Tensor:
    """The sum of the terms; `copies`: per term, see `count_copies`."""
    contract: Callable[[list[Tensor], list[int]], Tensor] = functions().contract_chain
    pairs = zip(terms, copies, strict=True)
    first, *others = (contract([core.to(dtype) for core in cores], numbers) for cores, numbers in pairs)
    return sum(others, first)


def seeded(seed: int, name: str) -> torch.Generator:
    """A CPU generator of its own for every tensor: independent of order, subset and device."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def clones(core: Tensor, num_experts: int, noise: float, generator: torch.Generator) -> Tensor:
    """(l, i, o, r) -> (E, l, i, o, r): expert 0 exact, the others with noise of the core's own scale."""
    clones = core.repeat(num_experts, 1, 1, 1, 1)
    for clone in clones[1:] if noise else ():
        clone.copy_(perturbed(core, noise, generator))
    return clones


def choose_order(
    plan: FFNPlan, matrices: Mapping[str, Tensor], recipe: Recipe
) -> tuple[Tensor | None, NeuronOrder]:
    """The order by bisection if truncation then loses less than in the source's order, else None.

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
        sum(decompose(reordered(matrices[role], role, order), sites).discarded)
        for role, sites in plan.form.sites.items()
    )
    norm = sum(float(matrix.norm()) ** 2 for matrix in matrices.values())
    return (lost / norm) ** 0.5 if norm else 0.0
