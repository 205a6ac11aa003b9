"""For kinds whose experts are chains: every matrix of an FFN by itself, with the same functions.

Such a kind has two functions about one matrix W (in, out):

* `terms(rows, cols, options, swapped, rank)`: the terms that it becomes, as `modeling_mpoe.Chain` reads them,
  and the first one's `Sites` (None if it has none). `swapped` says that the matrix leads back, from the inner
  to the hidden size. With a rank the big core, W itself or the middle of its chain, becomes two thin ones.
* `fit(target, sites, options, generator)`: its `Fitted` cores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import MpoeError, reworded
from .ffn import FFNShape, Fitted, Form, Parts, Target, Targets

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from ..decomposition.sites import Sites

Terms = Callable[[int, int, Any, bool, int | None], tuple[list[dict], "Sites | None"]]
Fit = Callable[[Target, Any, Any, "Generator"], Fitted]


def describe_matrices(ffn: FFNShape, options: Any, terms: Terms) -> Form:
    """The form of an FFN whose matrices become chains, each by itself.

    Raises:
        MpoeError: as `terms`; the message names the matrix and its size.
    """
    parts, sites = {}, {}
    for role, matrix in ffn.matrices.items():
        try:
            found, split = terms(matrix.rows, matrix.cols, options, role == "down", matrix.rank)
        except MpoeError as error:
            named = f"{ffn.name}.{role} ({matrix.rows} x {matrix.cols})"
            raise reworded(error, f"{named}: {error}") from None
        parts[role] = {"terms": found, "bias": options.bias if matrix.has_bias else None}
        if split is not None:
            sites[role] = split
    return Form(parts, sites)


def build_matrices(ffn: Targets, form: Form, options: Any, fit: Fit) -> Parts:
    """The projections of `describe_matrices`, one matrix in memory at a time."""
    for role in ffn.shape.matrices:
        yield role, fit(ffn.target(role), form.sites.get(role), options, ffn.generator(role))


def whole_term(rows: int, cols: int, rank: int | None, *, shared: bool) -> dict:
    """The term of a matrix as it is, or as two thin ones."""
    term = {"in_dims": [rows], "out_dims": [cols], "bonds": [], "shared": [shared]}
    return term if rank is None else factored(term, 0, rank)


def expert_sizes(options: Any) -> tuple[int, ...]:
    """The bond dimension of every expert, for kinds with one bond dimension."""
    return options.sizes or (options.bond_dim,) * options.stored_experts


def by_expert(term: dict, each: Sequence[dict]) -> dict:
    """The term of experts that differ in size: their largest one's, with the lists in which they differ.

    each: the term that every expert would have.
    """
    keys = ("in_dims", "out_dims", "bonds")
    lists = {key: [own[key] for own in each] for key in keys if any(own[key] != term[key] for own in each)}
    return term | {"by_expert": lists} if lists else term


def perturbed(core: Tensor, noise: float, generator: Generator) -> Tensor:
    """A core with noise relative to the root mean square of its numbers."""
    import torch

    if not noise:
        return core
    scale = noise * float(core.square().mean().sqrt())
    return core + scale * torch.randn(core.shape, generator=generator).to(core)


def factored(term: dict, k: int, rank: int) -> dict:
    """A term whose core k is two, with the inputs in the first, the outputs in the second, and that bond."""
    ins, outs, bonds, shared = (list(term[key]) for key in ("in_dims", "out_dims", "bonds", "shared"))
    ins[k : k + 1], outs[k : k + 1] = [ins[k], 1], [1, outs[k]]
    bonds.insert(k, rank)
    shared.insert(k, shared[k])
    made = {"in_dims": ins, "out_dims": outs, "bonds": bonds, "shared": shared}
    if "untied" not in term:
        return made
    untied = list(term["untied"])
    untied.insert(k, untied[k])
    return made | {"untied": untied}


def whole_cores(target: Target) -> list[Tensor]:
    """The cores of `whole_term`."""
    if target.factors is None:
        return [target.matrix[None, :, :, None]]
    first, second = target.factors
    return [first[None, :, None, :], second[:, None, :, None]]
