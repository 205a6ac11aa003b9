"""Shared factors of a stack, found by descent with the owned factors eliminated.

For any value of the shared factor the best owned ones have a closed form, so the error is a function of the
shared factor alone (variable projection). Nonlinear conjugate gradients descend on it, preconditioned with
the mean metric. With the owned factors fixed the error is quadratic: any step between none and twice the way
to its minimum lowers it, and solving for the owned factors again lowers it further, so it never grows.

Source: variable projection: Golub, Pereyra, Inverse Problems 19(2), R1 (2003).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .low_rank import RIDGE, Metric, factor, thin_side
from .stack_metric import Stack, dot, leading, quadratic, solve, symmetric_product
from .stacks import Ranks

# Experts of a stack that is estimated by some of them.
PROBED = 16
# Descent ends when a sweep lowers the error by less than this fraction.
_LITTLE = 0.005
# The way to the minimum over the shared factor, times this: with the owned ones following, it lies farther.
_OVER = 1.8


class Shared(ABC):
    """A shared factor, and the owned ones that are best beside it.

    Attributes:
        shared: the shared factor.
        error: the mean over experts of tr((W_e - V_e)^T M_e (W_e - V_e)).
        experts: those whose owned factors are made: all, or some to estimate the error by.
    """

    shared: Tensor
    error: float

    def __init__(self, stack: Stack, experts: list[int]) -> None:
        self.stack, self.experts = stack, experts

    @abstractmethod
    def slope(self) -> Tensor:
        """Minus half the gradient of the error by the shared factor."""

    @abstractmethod
    def precondition(self, slope: Tensor) -> Tensor:
        """The step that would reach the minimum if all metrics were their mean."""

    @abstractmethod
    def curvature(self, direction: Tensor) -> float:
        """Half the second derivative of the error in this direction, the owned factors fixed."""

    @abstractmethod
    def move(self, step: Tensor) -> None:
        """Add to the shared factor; then solve for all else."""

    def descend(self, max_sweeps: int) -> None:
        """Lower the error. All experts have to be there."""
        direction, before_slope, before_size = None, None, 0.0
        for _ in range(max_sweeps):
            before, slope = self.error, self.slope()
            better = self.precondition(slope)
            size = dot(slope, better)
            if direction is None or before_slope is None:
                direction = better
            else:  # Polak and Ribiere's rule, which restarts by itself
                turn = max((size - dot(before_slope, better)) / before_size, 0.0)
                direction = better + turn * direction
            descent = dot(direction, slope)
            if descent <= 0:
                direction, descent = better, size
            curvature = self.curvature(direction)
            if not (descent > 0 and curvature > 0):
                break
            self.move(direction * (_OVER * descent / curvature))
            before_slope, before_size = slope, size
            if self.error >= (1 - _LITTLE) * before:
                break


def spread(count: int, most: int) -> list[int]:
    """At most so many experts of `count`, evenly spread."""
    return [k * count // min(most, count) for k in range(min(most, count))]


class Bases(Shared):
    """V_e = A C_e B: A shared and found by descent, C_e owned, B shared with orthonormal rows, or left out.

    Attributes:
        shared: A, (in, r1).
        own: C_e, (r1, r2).
        right: B, (r2, out), or None for the identity.
    """

    def __init__(self, stack: Stack, rank: int, right: Tensor | None, experts: list[int]) -> None:
        super().__init__(stack, experts)
        self.right = right
        root = stack.root(stack.mean_moment)
        inner = leading(stack.input_importance(root, self.target), rank)
        self.shared = torch.linalg.solve_triangular(root.mT, inner, upper=True).to(stack.dtype)
        self.inverse = torch.cholesky_inverse(root).to(stack.dtype)
        self.own: list[Tensor] = []
        self._solve_own()

    def target(self, expert: int) -> Tensor:
        """T_e, what A C_e is to be: (in, r2)."""
        matrix = self.stack.matrix(expert)
        return matrix if self.right is None else matrix @ self.right.mT

    def slope(self) -> Tensor:
        def one(expert: int) -> Tensor:
            rest = self.target(expert) - self.shared @ self.own[expert]
            return self.stack.moment(expert) @ rest @ self.own[expert].mT

        return self.stack.mean(one).to(self.stack.dtype)

    def precondition(self, slope: Tensor) -> Tensor:
        gram = self.stack.mean(lambda e: self.own[e] @ self.own[e].mT)
        level = float(gram.diagonal().mean())
        gram.diagonal().add_(RIDGE * level if level > 0 else 1.0)
        return self.inverse @ solve(gram, slope.mT).mT.to(slope)

    def curvature(self, direction: Tensor) -> float:
        def one(expert: int) -> Tensor:
            return torch.tensor(quadratic(self.stack.moment(expert), direction @ self.own[expert]))

        return float(self.stack.mean(one))

    def move(self, step: Tensor) -> None:
        self.shared = self.shared + step
        if self.right is not None:
            self._solve_own()
            self._solve_right()
        self._solve_own()

    def _solve_own(self) -> None:
        """C_e = (A^T M_e A)^-1 A^T M_e T_e."""
        self.own, lost = [], 0.0
        for expert in self.experts:
            image = self.stack.moment(expert) @ self.shared
            aim = image.mT @ self.target(expert)
            own = solve(symmetric_product(self.shared, image), aim)
            lost += self.stack.energy(expert) - dot(own, aim)
            self.own.append(own.to(self.stack.dtype))
        self.error = max(lost / len(self.experts), 0.0)

    def _solve_right(self) -> None:
        """B = (sum F_e^T M_e F_e)^-1 sum F_e^T M_e W_e with F_e = A C_e; then its rows made orthonormal."""
        before = [self.shared @ own for own in self.own]
        normal = self.stack.mean(lambda e: before[e].mT @ (self.stack.moment(e) @ before[e]))
        aim = self.stack.mean(lambda e: (self.stack.moment(e) @ before[e]).mT @ self.stack.matrix(e))
        self.right = torch.linalg.qr(solve(normal, aim).mT)[0].mT.to(self.stack.dtype)


class Base(Shared):
    """V_e = W_0 + A_e B_e: W_0 shared, each difference alone the best of its rank.

    Attributes:
        shared: W_0, (in, out).
        own: (A_e, B_e), (in, r_e) and (r_e, out).
    """

    def __init__(self, stack: Stack, ranks: Ranks, experts: list[int]) -> None:
        super().__init__(stack, experts)
        self.ranks, self.mean_moment = ranks, stack.mean_moment
        root = stack.root(self.mean_moment)
        self.inverse = torch.cholesky_inverse(root)
        self.own: list[tuple[Tensor, Tensor]] = []
        images = stack.mean(lambda e: stack.moment(e) @ stack.matrix(e))
        self.shared, self.experts = best_base(images, root).to(stack.dtype), spread(len(stack), PROBED)
        mean_error = self._solve_own()
        mean, self.shared = self.shared, torch.zeros_like(self.shared)
        if self._solve_own() >= mean_error:  # experts have more in common than each has alone
            self.shared = mean
        self.experts = experts
        self._solve_own()

    def slope(self) -> Tensor:
        return self._slope

    def precondition(self, slope: Tensor) -> Tensor:
        return (self.inverse @ slope.double()).to(slope)

    def curvature(self, direction: Tensor) -> float:
        return quadratic(self.mean_moment, direction.double())

    def move(self, step: Tensor) -> None:
        self.shared = self.shared + step
        self._solve_own()

    def _solve_own(self) -> float:
        """Every difference, the slope, and the error, which is returned."""
        self.own, lost = [], 0.0
        slope = torch.zeros_like(self.shared, dtype=torch.float64)
        for expert in self.experts:
            weight, moment = self.stack.matrix(expert) - self.shared, self.stack.moment(expert)
            own = alone(weight, moment, self.ranks[expert])
            rest = weight - own[0] @ own[1]
            image = moment @ rest
            lost += dot(rest, image)
            slope += image
            self.own.append(own)
        self.error = lost / len(self.experts)
        self._slope = (slope / len(self.experts)).to(self.stack.dtype)
        return self.error


def best_base(images: Tensor, root: Tensor) -> Tensor:
    """The W_0 (in, out) that is best without differences.

    Args:
        images: the mean of M_e W_e, (in, out), in float64.
        root: R, lower triangular, with R R^T the mean of M_e.
    """
    return torch.cholesky_solve(images, root)


def alone(weight: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(in, rank) and (rank, out): the best product for the outputs of inputs with this moment."""
    if thin_side(*weight.shape) == "out":
        moment = weight.mT @ (moment @ weight)
    return best_product(weight, moment, rank)


def best_product(weight: Tensor, thin: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same, of the moment on the thin side of the matrix: of the inputs, or else of the outputs."""
    return factor(weight, rank, Metric(thin), exact=weight.dtype == torch.float64)
