"""A stack of matrices, one per expert, with the metric that each one's errors are measured in."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property, reduce

import torch
from torch import Tensor

from .low_rank import RIDGE, root
from .symmetric import add_gram, add_product, blocks, packed_length, unpacked

# Stacks with up to this many entries are multiplied in float64, larger ones in float32; sums are in float64.
SMALL = 1 << 24

# Experts of a larger stack whose moments are tried.
LOOKED_AT = 4

Cores = Sequence[Sequence[Tensor]]


class Moments(Sequence[Tensor]):
    """Moments (in, in), made one at a time, of which some things are known without making them."""

    @abstractmethod
    def mean(self) -> Tensor:
        """Their mean, (in, in), in float64."""

    @abstractmethod
    def levels(self) -> list[float]:
        """The mean of the diagonal of each."""


class Stack:
    """Matrices W_e and metrics M_e, made one at a time in the dtype of products.

    Args:
        matrices: (E, in, out), of any float dtype, or a sequence of E matrices.
        moments: M_e, (E, in, in) or a sequence that gives one at a time, such as `Moments`; None: identities.
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
        level = sum(self.levels) / len(self)
        self.ridge = RIDGE * (level if level > 0 else 1.0)
        self._energies: dict[int, float] = {}
        self._latest: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.matrices)

    def matrix(self, expert: int) -> Tensor:
        """W_e, (in, out)."""
        return self.matrices[expert].to(self.dtype)

    def moment(self, expert: int) -> Tensor:
        """M_e, (in, in), positive definite: with its weight and a ridge; the latest one is kept."""
        if self._latest is None or self._latest[0] != expert:
            found = self._moment(expert)
            if self._is_rounded:
                half = self.root(found)
                found = (half @ half.mT).to(self.dtype)
            self._latest = (expert, found)
        return self._latest[1]

    def _moment(self, expert: int) -> Tensor:
        weight = 1.0 if self.weights is None else float(self.weights[expert])
        device = self.matrices[expert].device
        if self.moments is None:
            return torch.eye(self.size[0], dtype=self.dtype, device=device) * (weight + self.ridge)
        moment = self.moments[expert].to(device, self.dtype, copy=True)
        if self.weights is not None:
            moment *= weight
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
            self._energies[expert] = quadratic(self.moment(expert), self.matrix(expert))
        return self._energies[expert]

    def gram(self, expert: int) -> Tensor:
        """W_e^T M_e W_e, (out, out), in float64."""
        return symmetric_product(*self._image(expert))

    def _image(self, expert: int) -> tuple[Tensor, Tensor]:
        """W_e and M_e W_e."""
        matrix = self.matrix(expert)
        image = self.moment(expert) @ matrix
        self._energies.setdefault(expert, dot(matrix, image))
        return matrix, image

    @cached_property
    def levels(self) -> list[float]:
        """The mean of the diagonal of every M_e, without the ridge; where rounding made it negative, 0."""
        return [max(level, 0.0) for level in self._levels()]

    def _levels(self) -> list[float]:
        if isinstance(self.moments, Moments) and self.weights is None:
            return self.moments.levels()
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

    @cached_property
    def mean_moment(self) -> Tensor:
        """(in, in) in float64."""
        if not isinstance(self.moments, Moments) or self.weights is not None or self._is_rounded:
            return self.mean(self.moment)
        mean = self.moments.mean().to(self.matrices[0].device)
        mean.diagonal().add_(self.ridge)
        return mean

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
        average = sum(self.levels) / len(self) + self.ridge
        total = root.new_zeros(packed_length(self.size[0]))
        for expert, level in enumerate(self.levels):
            add_gram(total, target(expert).mT * math.sqrt((level + self.ridge) / average))
        return root.mT @ unpacked(total / len(self)) @ root

    def output_importance(self) -> Tensor:
        """The mean of W_e^T M_e W_e, (out, out) in float64: what directions of the outputs are worth."""
        return self.image_means()[1]

    def image_means(self) -> tuple[Tensor, Tensor]:
        """The means of M_e W_e, (in, out), and of W_e^T M_e W_e, (out, out), in float64."""
        rows, cols = self.size
        images = torch.zeros(rows, cols, dtype=torch.float64, device=self.matrices[0].device)
        grams = images.new_zeros(packed_length(cols))
        for expert in range(len(self)):
            matrix, image = self._image(expert)
            images += image
            add_product(grams, matrix, image)
        return images / len(self), unpacked(grams / len(self))


def side_spectra(stack: Stack) -> tuple[Tensor, Tensor]:
    """What directions of the inputs and of the outputs are worth: (in,) and (out,), descending, float64.

    Keeping the first r of one side loses about the sum of the others, per expert.
    """
    root = stack.root(stack.mean_moment)
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


def symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """x^T y, which has to be symmetric, (n, n) in float64, for x and y (anything, n)."""
    packed = torch.zeros(packed_length(left.shape[-1]), dtype=torch.float64, device=left.device)
    add_product(packed, left, right)
    return unpacked(packed)


def quadratic(moment: Tensor, matrix: Tensor) -> float:
    """tr(x^T M x) for a symmetric M (n, n) and x (n, anything), with little more than half the products."""
    total = 0.0
    for start, end in blocks(len(moment)):
        image = moment[start:end, start:end] @ matrix[start:end]
        if start:
            image += 2 * (moment[start:end, :start] @ matrix[:start])
        total += dot(matrix[start:end], image)
    return total


def dot(left: Tensor, right: Tensor) -> float:
    """The sum of the products of the entries, in float64."""
    return float(torch.dot(left.double().flatten(), right.double().flatten()))


def expand(cores: Cores, expert: int, dtype: torch.dtype | None = None) -> Tensor:
    """One expert's matrix (in, out) of stored cores, each a matrix or, if owned, a stack of them.

    dtype: of the products; None: that of the cores.
    """
    terms = [[(core if core.ndim == 2 else core[expert]).to(dtype) for core in term] for term in cores]
    return sum((reduce(torch.matmul, term) for term in terms[1:]), start=reduce(torch.matmul, terms[0]))
