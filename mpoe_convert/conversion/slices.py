"""Projections whose experts have some of an FFN's hidden neurons each: cast, copied with noise, measured."""

from __future__ import annotations

import torch
from torch import Tensor

from ..decomposition.mpo import relative_error
from ..experts.ffn import Fitted
from ..tensors import cast
from .build import FFNTargets, Measured, matrix_report
from .report import MatrixReport


def finish_slices(targets: FFNTargets, role: str, fitted: Fitted) -> tuple[dict[str, Tensor], MatrixReport]:
    """As `build.finish_projection`, for experts with neurons of their own.

    The error is that of the dense matrix put together again, each neuron from the first expert that has it;
    the drift that of the copies, which get noise.
    """
    assert fitted.neurons is not None
    plan, recipe, dense = targets.matrices[role], targets.recipe, targets.dense(role)
    neurons, stored = fitted.neurons.to(dense.device), getattr(torch, plan.dtype)
    [[core]] = fitted.terms  # (E, 1, in, out, 1)
    assert isinstance(core, Tensor), "parts are of one size"
    exact = core[:, 0, :, :, 0]
    is_copy = _copies(neurons)
    own = exact.clone()
    if recipe.noise and is_copy.any():
        scale = recipe.noise * float(exact.square().mean().sqrt())
        noise = torch.randn(own[is_copy].shape, generator=targets.generator(role))
        own[is_copy] += scale * noise.to(own)
    own = cast(plan.name, own, stored)
    tensors = {"terms.0.aux_0": own.cpu()}
    if plan.spec["bias"] is not None:
        bias = cast(f"{plan.name}.bias", targets.bias(role), stored)
        tensors["bias"] = bias[neurons.to(bias.device)] if plan.spec["bias"] == "per-expert" else bias.clone()
    made = _together(own[~is_copy], neurons[~is_copy], role)
    before = _together(exact[~is_copy], neurons[~is_copy], role)
    measured = Measured(
        error=relative_error(dense, made.to(dense)),
        error_before_cast=relative_error(dense, before),
        output_error=None,
        discarded=(),
        drift=relative_error(exact[is_copy], own[is_copy].to(exact)) if is_copy.any() else 0.0,
    )
    return tensors, matrix_report(plan, recipe, measured)


def _copies(neurons: Tensor) -> Tensor:
    """(E,) whether an expert before has the same neurons (E, n); parts have all or none in common."""
    first = neurons[:, 0]
    return torch.stack([(first[:number] == each).any() for number, each in enumerate(first)])


def _together(own: Tensor, neurons: Tensor, role: str) -> Tensor:
    """The dense matrix (in, out) of parts (P, in, n), or (P, n, out) of down, and their neurons (P, n)."""
    order = neurons.flatten().argsort()
    return own.flatten(0, 1)[order] if role == "down" else own.mT.flatten(0, 1)[order].mT
