"""Fit a stack of matrices, one per expert, in the metric of what each expert gets.

::

        in         in          in
         |          |           |        minimise  sum_e tr((W_e - V_e)^T M_e (W_e - V_e))
        [A]        [A_e]       [A]
         |          |           |        M_e = E[g^2 x^T x] over the tokens x that are routed to expert e
        [B_e]      [B]         [C_e]     with combine weight g: the expected squared change of the output
         |          |           |
        out        out         [B]
                                |        V_e = A B_e (input), A_e B (output), A C_e B (both)
                               out

A projection of the outputs, V_e = W_e P, is best with the leading eigenvectors of sum_e W_e^T M_e W_e
whatever the metrics are, so "none" and "output" are solved in closed form. A basis of the inputs is not, as
every expert has a metric of its own: "input", "both" and "base" start where all metrics are their mean, and
alternating least squares solve for one factor at a time. Each step solves normal equations with the metrics
in them (conjugate gradients for the shared basis of the inputs), and the error never grows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from .low_rank import RIDGE, Metric, factor, thin_side
from .stacks import FORMS, Ranks, count_stack, ranks_within

# The largest number of sweeps; earlier, they end when one lowers the error by less than this fraction.
MAX_SWEEPS = 20
_LITTLE = 0.005
# Steps of conjugate gradients per sweep, preconditioned with the mean metric.
_STEPS = 3
# Stacks with up to this many entries are multiplied in float64, larger ones in float32; sums are in float64.
_SMALL = 1 << 24


@dataclass(frozen=True, eq=False)
class StackFit:
    """Cores of a stack, and what they lose.

    Attributes:
        form, ranks: see `stacks`.
        cores: per term the cores as `modeling_mpoe.Chain` stores them: (l * i, o * r) if shared, with a
            leading expert axis if owned; float64 for a float64 stack, else float32.
        weight_errors: (E,) relative squared error of the entries, float64.
        output_errors: (E,) relative squared error of the expected outputs, float64.
        lost, energy: (E,) squared error and squared size of the expected outputs, in the unit of the moments.
    """

    form: str
    ranks: Ranks
    cores: tuple[tuple[Tensor, ...], ...]
    weight_errors: Tensor
    lost: Tensor
    energy: Tensor

    @property
    def output_errors(self) -> Tensor:
        return _ratio(self.lost, self.energy)

    @property
    def error(self) -> float:
        """Relative squared error of the expected outputs of all experts together."""
        return float(_ratio(self.lost.sum(), self.energy.sum()))

    def matrix(self, expert: int) -> Tensor:
        """One expert's matrix (in, out)."""
        return _expand(self.cores, expert)


def fit_stack(
    matrices: Sequence[Tensor] | Tensor,
    form: str,
    ranks: Ranks,
    moments: Sequence[Tensor] | Tensor | None = None,
    weights: Tensor | None = None,
    *,
    max_sweeps: int = MAX_SWEEPS,
) -> StackFit:
    """The cores of a form that lose least of a stack's expected outputs.

    Args:
        matrices: (E, in, out), of any float dtype, or a sequence of E matrices.
        form, ranks: see `stacks.stack_terms`.
        moments: M_e, (E, in, in) or a sequence that gives one at a time; None: identities.
        weights: (E,), multiply the moments. None: ones.
        max_sweeps: of alternating least squares; 0: the closed-form start.

    Raises:
        ValueError: unknown form, or another number of ranks.
    """
    stack = _Stack(matrices, moments, weights)
    count_stack(form, ranks, len(stack), *stack.size)  # checks form and ranks
    return stack.measured(form, ranks, _FITS[form](stack, ranks, max_sweeps))


def choose_form(
    matrices: Sequence[Tensor] | Tensor,
    numbers: int,
    moments: Sequence[Tensor] | Tensor | None = None,
    weights: Tensor | None = None,
    *,
    forms: Sequence[str] = FORMS,
) -> StackFit | None:
    """The form whose expected outputs lose least among those that store at most so many numbers.

    Args:
        matrices, moments, weights: as for `fit_stack`.
        numbers: of all experts together.
        forms: to choose from.

    Returns:
        The fit, or None if no form stores so few numbers.
    """
    best = None
    in_dim, out_dim = matrices[0].shape
    for form in forms:
        spectra = side_spectra(matrices, moments, weights) if form == "both" else None
        ranks = ranks_within(form, len(matrices), in_dim, out_dim, numbers, spectra)
        if ranks is None:
            continue
        found = fit_stack(matrices, form, ranks, moments, weights)
        if best is None or found.error < best.error:
            best = found
    return best


def side_spectra(
    matrices: Sequence[Tensor] | Tensor,
    moments: Sequence[Tensor] | Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What directions of the inputs and of the outputs are worth: (in,) and (out,), descending, float64."""
    stack = _Stack(matrices, moments, weights)
    root = torch.linalg.cholesky(stack.mean_moment())
    inputs = _whitened(root, stack.input_importance(stack.matrix))
    return tuple(torch.linalg.eigvalsh(m).flip(0).clamp(min=0) for m in (inputs, stack.output_importance()))


class _Stack:
    """Matrices and metrics, one expert at a time, in the dtype of products."""

    def __init__(
        self,
        matrices: Sequence[Tensor] | Tensor,
        moments: Sequence[Tensor] | Tensor | None,
        weights: Tensor | None,
    ) -> None:
        self.matrices, self.moments, self.weights = matrices, moments, weights
        self.size: tuple[int, int] = (matrices[0].shape[0], matrices[0].shape[1])
        self.result = torch.float64 if matrices[0].dtype == torch.float64 else torch.float32
        self.dtype = torch.float64 if len(matrices) * matrices[0].numel() <= _SMALL else torch.float32
        levels = (
            [float(self._raw(e).diagonal().mean()) for e in range(len(self))] if moments is not None else []
        )
        # Directions that calibration never saw count a little; so do experts that it never reached.
        self.ridge = RIDGE * (sum(levels) / len(levels)) if any(levels) else RIDGE

    def __len__(self) -> int:
        return len(self.matrices)

    def matrix(self, expert: int) -> Tensor:
        """(in, out)."""
        return self.matrices[expert].to(self.dtype)

    def moment(self, expert: int) -> Tensor:
        """(in, in), with its weight and the ridge."""
        moment = self._raw(expert)
        moment = moment * (1.0 if self.weights is None else float(self.weights[expert]))
        moment.diagonal().add_(self.ridge)
        return moment

    def _raw(self, expert: int) -> Tensor:
        if self.moments is None:
            return torch.eye(self.size[0], dtype=self.dtype, device=self.matrices[expert].device)
        return self.moments[expert].to(self.matrices[expert].device, self.dtype)

    def mean_moment(self) -> Tensor:
        """(in, in) in float64."""
        return _mean(self.moment, len(self))

    def input_importance(self, target: Callable[[int], Tensor]) -> Tensor:
        """The mean of M_e T_e T_e^T M_e, (in, in) in float64; T_e = target(e) is (in, anything)."""

        def one(expert: int) -> Tensor:
            image = self.moment(expert) @ target(expert)
            return image @ image.mT

        return _mean(one, len(self))

    def output_importance(self) -> Tensor:
        """The mean of W_e^T M_e W_e, (out, out) in float64."""
        return _mean(lambda e: self.matrix(e).mT @ (self.moment(e) @ self.matrix(e)), len(self))

    def measured(self, form: str, ranks: Ranks, cores: list[list[Tensor]]) -> StackFit:
        """The fit with its errors, of the cores as they are stored."""
        stored = tuple(tuple(core.to(self.result).contiguous() for core in term) for term in cores)
        rows = []
        for expert in range(len(self)):
            weight = self.matrix(expert)
            moment, difference = self.moment(expert), weight - _expand(stored, expert).to(weight)
            pairs = [(difference, moment @ difference), (weight, moment @ weight)]
            pairs += [(difference, difference), (weight, weight)]
            rows.append([float((left.double() * right).sum()) for left, right in pairs])
        lost, energy, weight_lost, weight_energy = torch.tensor(rows, dtype=torch.float64).unbind(1)
        return StackFit(form, ranks, stored, _ratio(weight_lost, weight_energy), lost, energy)


def _fit_whole(stack: _Stack, ranks: Ranks, max_sweeps: int) -> list[list[Tensor]]:
    return [[torch.stack([stack.matrix(e).to(stack.result) for e in range(len(stack))])]]


def _fit_none(stack: _Stack, ranks: Ranks, max_sweeps: int, base: Tensor | None = None) -> list[list[Tensor]]:
    """Each expert (less a base) alone: `low_rank.factor` in its metric."""
    firsts, seconds = [], []
    for expert in range(len(stack)):
        weight, moment = stack.matrix(expert), stack.moment(expert)
        weight = weight if base is None else weight - base
        is_thin = thin_side(*weight.shape) == "in"
        first, second = factor(weight, ranks[0], Metric(moment if is_thin else weight.mT @ (moment @ weight)))
        firsts.append(first.to(stack.result))
        seconds.append(second.to(stack.result))
    return [[torch.stack(firsts), torch.stack(seconds)]]


def _fit_output(stack: _Stack, ranks: Ranks, max_sweeps: int) -> list[list[Tensor]]:
    basis = _leading(stack.output_importance(), ranks[0]).to(stack.dtype)
    own = [(stack.matrix(e) @ basis).to(stack.result) for e in range(len(stack))]
    return [[torch.stack(own), basis.mT]]


def _fit_input(stack: _Stack, ranks: Ranks, max_sweeps: int) -> list[list[Tensor]]:
    fit = _Bases(stack, ranks[0], None)
    fit.refine(max_sweeps)
    return [[fit.left, torch.stack(fit.own)]]


def _fit_both(stack: _Stack, ranks: Ranks, max_sweeps: int) -> list[list[Tensor]]:
    right = _leading(stack.output_importance(), ranks[1]).to(stack.dtype).mT
    fit = _Bases(stack, ranks[0], right)
    fit.refine(max_sweeps)
    assert fit.right is not None  # given above
    return [[fit.left, torch.stack(fit.own), fit.right]]


def _fit_base(stack: _Stack, ranks: Ranks, max_sweeps: int) -> list[list[Tensor]]:
    """In turn: the base is the least-squares mean of what the differences leave; each difference alone."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(stack.mean_moment()))

    def mean_of(left_over: Callable[[int], Tensor]) -> Tensor:
        return (inverse @ _mean(lambda e: stack.moment(e) @ left_over(e), len(stack))).to(stack.dtype)

    base = mean_of(stack.matrix)
    own = _fit_none(stack, ranks, 0, base)
    error = _difference(stack, base, own)
    for _ in range(max_sweeps):
        kept = base, own
        base = mean_of(lambda e, own=own: stack.matrix(e) - _expand(own, e).to(stack.dtype))
        own = _fit_none(stack, ranks, 0, base)
        before, error = error, _difference(stack, base, own)
        if error >= before:
            base, own = kept
        if error >= (1 - _LITTLE) * before:
            break
    return [[base], *own]


def _difference(stack: _Stack, base: Tensor, own: list[list[Tensor]]) -> float:
    total = 0.0
    for expert in range(len(stack)):
        rest = stack.matrix(expert) - base - _expand(own, expert).to(base)
        total += float((rest.double() * (stack.moment(expert) @ rest)).sum())
    return total


_FITS: dict[str, Callable[[_Stack, Ranks, int], list[list[Tensor]]]] = {
    "none": _fit_none,
    "input": _fit_input,
    "output": _fit_output,
    "both": _fit_both,
    "base": _fit_base,
    "whole": _fit_whole,
}


class _Bases:
    """V_e = A C_e B: A shared, C_e owned, B shared with orthonormal rows, or left out (the identity).

    Attributes:
        left: A, (in, r1).
        own: E times C_e, (r1, r2); the best ones for A and B.
        right: B, (r2, out), or None.
        error: the objective, in float64.
    """

    def __init__(self, stack: _Stack, rank: int, right: Tensor | None) -> None:
        self.stack, self.right = stack, right
        mean = stack.mean_moment()
        root = torch.linalg.cholesky(mean)
        inner = _leading(_whitened(root, stack.input_importance(self.target)), rank)
        self.left = torch.linalg.solve_triangular(root.mT, inner, upper=True).to(stack.dtype)
        self.inverse_mean = torch.cholesky_inverse(root).to(stack.dtype)
        self.energy = sum(_energy(stack.matrix(e), stack.moment(e)) for e in range(len(stack)))
        self.own: list[Tensor] = []
        self.error = 0.0
        self._solve_own()

    def target(self, expert: int) -> Tensor:
        """What A C_e is to be: (in, r2)."""
        matrix = self.stack.matrix(expert)
        return matrix if self.right is None else matrix @ self.right.mT

    def refine(self, max_sweeps: int) -> None:
        for _ in range(max_sweeps):
            before = self.error
            self._solve_left()
            if self.right is not None:
                self._solve_own()
                self._solve_right()
            self._solve_own()
            if self.error >= (1 - _LITTLE) * before:
                break

    def _solve_own(self) -> None:
        """C_e = (A^T M_e A)^-1 A^T M_e T_e."""
        found, captured = [], 0.0
        for expert in range(len(self.stack)):
            image = self.stack.moment(expert) @ self.left
            aim = (image.mT @ self.target(expert)).double()
            own = _solve(self.left.mT @ image, aim)
            captured += float((own * aim).sum())
            found.append(own.to(self.stack.dtype))
        self.own, self.error = found, max(self.energy - captured, 0.0)

    def _solve_right(self) -> None:
        """B = (sum F_e^T M_e F_e)^-1 sum F_e^T M_e W_e with F_e = A C_e; then its rows made orthonormal."""
        rank = self.own[0].shape[1]
        normal = self.left.new_zeros(rank, rank, dtype=torch.float64)
        aim = self.left.new_zeros(rank, self.stack.size[1], dtype=torch.float64)
        for expert, own in enumerate(self.own):
            before = self.left @ own
            image = self.stack.moment(expert) @ before
            normal += before.mT @ image
            aim += image.mT @ self.stack.matrix(expert)
        self.right = torch.linalg.qr(_solve(normal, aim).mT)[0].mT.to(self.stack.dtype)

    def _solve_left(self) -> None:
        """Conjugate gradients towards sum_e M_e A C_e C_e^T = sum_e M_e T_e C_e^T."""
        grams = [own @ own.mT for own in self.own]
        mean = _mean(grams.__getitem__, len(grams))
        level = float(mean.diagonal().mean())
        mean.diagonal().add_(RIDGE * level if level > 0 else 1.0)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(mean)).to(self.stack.dtype)
        residual = self._sum(self._slope)
        better = self.inverse_mean @ residual @ inverse
        direction, size = better, _dot(residual, better)
        for _ in range(_STEPS):
            if not size > 0:
                break
            image = self._sum(lambda e, d=direction: self.stack.moment(e) @ d @ grams[e])
            curvature = _dot(direction, image)
            if not curvature > 0:
                break
            step = size / curvature
            self.left, residual = self.left + step * direction, residual - step * image
            better = self.inverse_mean @ residual @ inverse
            before, size = size, _dot(residual, better)
            direction = better + size / before * direction

    def _slope(self, expert: int) -> Tensor:
        """M_e (T_e - A C_e) C_e^T, (in, r1): half the error's descent."""
        rest = self.target(expert) - self.left @ self.own[expert]
        return self.stack.moment(expert) @ rest @ self.own[expert].mT

    def _sum(self, one: Callable[[int], Tensor]) -> Tensor:
        return (_mean(one, len(self.stack)) * len(self.stack)).to(self.stack.dtype)


def _expand(cores: Sequence[Sequence[Tensor]], expert: int) -> Tensor:
    """One expert's matrix (in, out) of stored cores, every one a matrix or a stack of them."""
    terms = [[core if core.ndim == 2 else core[expert] for core in term] for term in cores]
    return sum((reduce(torch.matmul, term) for term in terms[1:]), start=reduce(torch.matmul, terms[0]))


def _mean(one: Callable[[int], Tensor], count: int) -> Tensor:
    """The mean of `one(0)` ... in float64."""
    total = one(0).to(torch.float64, copy=True)
    for k in range(1, count):
        total += one(k)
    return total / count


def _whitened(root: Tensor, importance: Tensor) -> Tensor:
    """R^-1 K R^-T."""
    half = torch.linalg.solve_triangular(root, importance, upper=False)
    return torch.linalg.solve_triangular(root, half.mT, upper=False)


def _leading(importance: Tensor, rank: int) -> Tensor:
    """Leading eigenvectors (n, rank) of a symmetric matrix (n, n)."""
    return torch.linalg.eigh(importance).eigenvectors.flip(1)[:, :rank].contiguous()


def _solve(normal: Tensor, aim: Tensor) -> Tensor:
    """Solve symmetric equations in float64; directions that nothing reaches stay about zero."""
    normal = normal.double()
    level = float(normal.diagonal().mean())
    normal.diagonal().add_(1e-12 * level if level > 0 else 1.0)
    root, failed = torch.linalg.cholesky_ex(normal)
    if not failed:
        return torch.cholesky_solve(aim, root)
    values, vectors = torch.linalg.eigh(normal)
    return vectors @ ((vectors.mT @ aim) / values.clamp(min=RIDGE * level)[:, None])


def _energy(matrix: Tensor, moment: Tensor) -> float:
    return float((matrix.double() * (moment @ matrix)).sum())


def _dot(left: Tensor, right: Tensor) -> float:
    return float((left.double() * right).sum())


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """0 where nothing is there to be lost."""
    return torch.where(whole > 0, part.clamp(min=0) / whole.clamp(min=torch.finfo(whole.dtype).tiny), 0.0)
