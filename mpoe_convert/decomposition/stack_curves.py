"""What every form of a stack loses at every rank, from one look at each expert.

The closed-form starts of `stack_fit` are nested: those of rank r are the first r directions of one basis.
With all directions of the inputs A and of the outputs B, and Q_e from the QR decomposition of R_e^T A (M_e =
R_e R_e^T), the first r columns of Q_e span what the first r columns of R_e^T A do, so that one matrix

    C_e = Q_e^T R_e^T W_e B,      (in, out)

has the losses of "input", "output" and "both" at all ranks as sums of the squares of its entries. Those of
"none" and "base" are tails of the singular values of R_e^T W_e and R_e^T (W_e - W_0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .stack_bases import PROBED, best_base, spread
from .stack_metric import Stack, descending, dot, leading
from .stacks import UNEVEN


@dataclass(frozen=True, eq=False)
class StackCurves:
    """Squared errors of the expected outputs of all experts, in the unit of the moments.

    Attributes:
        energy: squared size of the expected outputs.
        lost: by form, with the first r directions kept: (n + 1,) for one rank, (in + 1, out + 1) for "both".
            Experts together, float64, on the CPU.
        squares: by form of `UNEVEN`, (E, n) squared singular values of every expert's matrix, or difference,
            descending. Of larger stacks those of experts that were not looked at are of the mean shape, and
            of the size that their metric says.
    """

    energy: float
    lost: dict[str, Tensor]
    squares: dict[str, Tensor]


def stack_curves(stack: Stack, forms: Sequence[str]) -> StackCurves:
    """The losses of the closed-form starts of some forms, "whole" left out.

    Of larger stacks some of the experts stand for all.
    """
    experts = _looked_at(stack)
    root, sides, base = stack.root(stack.mean_moment), None, None
    if {"input", "output", "both", "base"} & {*forms}:
        images, outputs = stack.image_means()
        sides = _directions(stack, root, outputs) if {"input", "output", "both"} & {*forms} else None
        if "base" in forms:
            base = best_base(images, root).to(stack.dtype)
    energy, both, own = 0.0, 0.0, {form: [] for form in UNEVEN if form in forms}
    for expert in experts:
        half, matrix = _half(stack, expert), stack.matrix(expert)
        image = half @ matrix
        energy += dot(image, image)
        if "none" in own:
            own["none"].append(_spectrum(image))
        if base is not None:
            own["base"].append(_spectrum(half @ (matrix - base)))
        if sides is not None:
            rotated = torch.ormqr(*torch.geqrf(half @ sides[0]), image, transpose=True)  # Q_e^T R_e^T W_e
            both += (rotated @ sides[1]).double().square()
    scale, lost = len(stack) / len(experts), {}
    squares = {form: torch.stack(spectra) for form, spectra in own.items()}
    for form in forms:
        if form in squares:
            lost[form] = _tail(squares[form].sum(0))
        elif isinstance(both, Tensor) and form != "whole":
            lost[form] = _tails(both) if form == "both" else _tail(both.sum(1 if form == "input" else 0))
    lost = {form: (scale * each).cpu() for form, each in lost.items()}
    return StackCurves(scale * energy, lost, {form: _of_all(stack, each) for form, each in squares.items()})


def _of_all(stack: Stack, squares: Tensor) -> Tensor:
    """(E, n) on the CPU: of those that were looked at, and a guess for the others."""
    if stack.is_small:
        return squares.cpu()
    experts = _looked_at(stack)
    levels, known = torch.tensor(stack.levels, dtype=torch.float64) + stack.ridge, squares.cpu()
    found = levels[:, None] * (known / levels[experts, None]).mean(0)
    found[experts] = known
    # Together as large as `StackCurves.lost` has them, which other forms are compared with.
    return found * (known.sum() * len(stack) / len(experts) / found.sum().clamp(min=1e-300))


def _looked_at(stack: Stack) -> list[int]:
    return list(range(len(stack))) if stack.is_small else spread(len(stack), PROBED)


def _half(stack: Stack, expert: int) -> Tensor:
    """R_e^T in the dtype of products."""
    return stack.root(stack.moment(expert)).mT.to(stack.dtype)


def _directions(stack: Stack, root: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """A (in, in) and B (out, out), the most important directions first; `importance`: that of the outputs."""
    inputs = leading(stack.input_importance(root, stack.matrix), len(root))
    outputs = leading(importance, stack.size[1])
    inputs = torch.linalg.solve_triangular(root.mT, inputs, upper=True)
    return inputs.to(stack.dtype), outputs.to(stack.dtype)


def _spectrum(image: Tensor) -> Tensor:
    """Squared singular values, descending."""
    gram = image @ image.mT if image.shape[0] <= image.shape[1] else image.mT @ image
    return descending(gram.double())


def _tail(squares: Tensor) -> Tensor:
    """(n + 1,): what is left of (n,) without the first r."""
    return torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])


def _tails(squares: Tensor) -> Tensor:
    """(n + 1, m + 1): what is left of (n, m) without the first r rows of the first s columns."""
    kept = torch.nn.functional.pad(squares.cumsum(0).cumsum(1), (1, 0, 1, 0))
    return (kept[-1, -1] - kept).clamp(min=0)
