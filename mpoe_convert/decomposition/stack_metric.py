"""A stack of matrices, one per expert, with the metric that each one's errors are measured in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, reduce

import torch
from torch import Tensor

from .low_rank import RIDGE, root

# Stacks with up to this many entries are multiplied in float64, larger ones in float32; sums are in float64.
SMALL = 1 << 24

# Experts of a larger stack whose moments are tried.
LOOKED_AT = 4

Cores = Sequence[Sequence[Tensor]]


class Stack:
    """Matrices W_e and metrics M_e, made one at a time in the dtype of products.

    Args:
        matrices: (E, in, out), of any float dtype, or a sequence of E matrices.
        moments: M_e, (E, in, in) or a sequence that gives one at a time; None: identities.
        weights: (E,), multiply the moments. None: ones.

    Attributes:
        size: (in, out).
        dtype: of products.
        result: of cores.
    """

    def __init__(
        self,
        matrices: Sequence[Tensor] | Tensor,
        moments: Sequence[Tensor] | Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        self.matrices, self.moments, self.weights = matrices, moments, weights
        self.size: tuple[int, int] = (matrices[0].shape[0], matrices[0].shape[1])
        self.is_small = len(matrices) * matrices[0].numel() <= SMALL
        self.dtype = torch.float64 if self.is_small else torch.float32
        self.result = torch.float64 if matrices[0].dtype == torch.float64 else torch.float32
        # Directions that calibration never saw count a little, and so do experts that it never reached.
        level = sum(self.levels()) / len(self)
        self.ridge = RIDGE * (level if level > 0 else 1.0)
        self._energies: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self.matrices)

    def matrix(self, expert: int) -> Tensor:
        """W_e, (in, out)."""
        return self.matrices[expert].to(self.dtype)

    def moment(self, expert: int) -> Tensor:
        """M_e, (in, in), positive definite: with its weight and a ridge."""
        found = self._moment(expert)
        if not self._is_rounded:
            return found
        half = self.root(found)
        return (half @ half.mT).to(self.dtype)

    def _moment(self, expert: int) -> Tensor:
        weight = 1.0 if self.weights is None else float(self.weights[expert])
        device = self.matrices[expert].device
        if self.moments is None:
            return torch.eye(self.size[0], dtype=self.dtype, device=device) * (weight + self.ridge)
        moment = self.moments[expert].to(device, self.dtype) * weight
        moment.diagonal().add_(self.ridge)
        return moment

    @cached_property
    def _is_rounded(self) -> bool:
        """Whether rounding made moments indefinite; of larger stacks some experts are looked at."""
        if self.moments is None:
            return False
        some = range(0, len(self), 1 if self.is_small else max(len(self) // LOOKED_AT, 1))
        return any(bool(torch.linalg.cholesky_ex(self._moment(e).double()).info) for e in some)

    def energy(self, expert: int) -> float:
        """tr(W_e^T M_e W_e): the expected squared size of an expert's outputs."""
        if expert not in self._energies:
            matrix = self.matrix(expert)
            self._energies[expert] = dot(matrix, self.moment(expert) @ matrix)
        return self._energies[expert]

    def gram(self, expert: int) -> Tensor:
        """W_e^T M_e W_e, (out, out)."""
        matrix = self.matrix(expert)
        found = matrix.mT @ (self.moment(expert) @ matrix)
        self._energies.setdefault(expert, float(found.diagonal().double().sum()))
        return found

    def levels(self) -> list[float]:
        """The mean of the diagonal of every M_e, without the ridge."""
        weights = [1.0] * len(self) if self.weights is None else self.weights.tolist()
        if self.moments is None:
            return weights
        return [w * float(self.moments[e].diagonal().double().mean()) for e, w in enumerate(weights)]

    def mean(self, one: Callable[[int], Tensor]) -> Tensor:
        """The mean of `one(e)` over the experts, in float64."""
        total = one(0).to(torch.float64, copy=True)
        for expert in range(1, len(self)):
            total += one(expert)
        return total / len(self)

    def mean_moment(self) -> Tensor:
        """(in, in) in float64."""
        return self.mean(self.moment)

    def root(self, moment: Tensor) -> Tensor:
        """R, lower triangular, with R R^T = the moment of an expert, or the mean one; in float64."""
        return root(moment.double(), self.ridge)

    def input_importance(self, root: Tensor, target: Callable[[int], Tensor]) -> Tensor:
        """R^T (the mean of T_e T_e^T, each weighed by the size of M_e) R, (in, in) in float64.

        What directions of the inputs are worth if the metrics are alike up to their size.

        Args:
            root: R, with R R^T the mean of M_e.
            target: T_e, (in, anything).
        """
        levels = [level + self.ridge for level in self.levels()]
        average = sum(levels) / len(levels)

        def one(expert: int) -> Tensor:
            aim = target(expert)
            return aim @ aim.mT * (levels[expert] / average)

        return root.mT @ self.mean(one) @ root

    def output_importance(self) -> Tensor:
        """The mean of W_e^T M_e W_e, (out, out) in float64: what directions of the outputs are worth."""
        return self.mean(self.gram)


def side_spectra(stack: Stack) -> tuple[Tensor, Tensor]:
    """What directions of the inputs and of the outputs are worth: (in,) and (out,), descending, float64.

    Keeping the first r of one side loses about the sum of the others, per expert.
    """
    root = stack.root(stack.mean_moment())
    inputs, outputs = stack.input_importance(root, stack.matrix), stack.output_importance()
    return descending(inputs), descending(outputs)


def descending(importance: Tensor) -> Tensor:
    """Eigenvalues (n,) of a positive semidefinite matrix."""
    return torch.linalg.eigvalsh(importance).flip(0).clamp(min=0)


def leading(importance: Tensor, rank: int) -> Tensor:
    """Leading eigenvectors (n, rank) of a symmetric matrix (n, n)."""
    return torch.linalg.eigh(importance).eigenvectors.flip(1)[:, :rank].contiguous()


def solve(normal: Tensor, aim: Tensor) -> Tensor:
    """Solve symmetric equations in float64; directions that nothing reaches stay about zero."""
    normal = normal.to(torch.float64, copy=True)
    level = float(normal.diagonal().mean())
    normal.diagonal().add_(1e-12 * level if level > 0 else 1.0)
    return torch.cholesky_solve(aim.double(), root(normal, RIDGE * level if level > 0 else 1.0))


def expand(cores: Cores, expert: int, dtype: torch.dtype | None = None) -> Tensor:
    """One expert's matrix (in, out) of stored cores, each a matrix or, if owned, a stack of them.

    dtype: of the products; None: that of the cores.
    """
    terms = [[(core if core.ndim == 2 else core[expert]).to(dtype) for core in term] for term in cores]
    return sum((reduce(torch.matmul, term) for term in terms[1:]), start=reduce(torch.matmul, terms[0]))


def dot(left: Tensor, right: Tensor) -> float:
    """The sum of the products of the entries, in float64."""
    return float((left.double() * right).sum())
