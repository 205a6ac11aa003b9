"""Factor a weight matrix into two thin ones so that what it computes, not what it holds, changes least.

Every matrix W (in, out) has a thin side of n = min(in, out) features z: its inputs, or its outputs x W. A
product of rank r is the matrix with a projection P = D U of that side before or after it::

    inputs thin:  W_hat = P W = D (U W)          outputs thin:  W_hat = W P = (W D) U

With S = E[z^T z] and G = E[g^T g], where g is what the loss answers to a change of z, the expected squared
effect of leaving out (I - P) is tr((I - P)^T S (I - P) G) (features and answers taken as independent, as in
K-FAC). For S = R R^T its minimum is P = R^-T V V^T R^T with V the leading eigenvectors of R^T G R, and
what is lost is the sum of the other eigenvalues.

* G = W W^T (inputs) and I (outputs) weigh all outputs alike: the minimum is that of norm(X W - X W_hat), the
  whitened SVD of SVD-LLM (arXiv 2403.07378), from n x n moments alone and, for thin outputs, without undoing
  a whitening.
* S = I and W^T W in addition: plain SVD.
* G from the gradients of the model's loss: the output directions that matter to it weigh more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Added to a moment, relative to its mean eigenvalue: directions that calibration never saw stay harmless.
RIDGE = 1e-6
# Up to so many numbers products are taken in float64.
_SMALL = 1 << 22


@dataclass(frozen=True, eq=False)
class Metric:
    """How errors are weighed on the thin side of one matrix; the default is the Frobenius norm.

    Attributes:
        moment: S, (n, n). None: of inputs that are all alike.
        answer: G, (n, n). None: all outputs matter alike.
    """

    moment: Tensor | None = None
    answer: Tensor | None = None


def thin_side(rows: int, cols: int) -> str:
    """ "in" or "out"."""
    return "in" if rows <= cols else "out"


def spectrum(matrix: Tensor, metric: Metric) -> Tensor:
    """What each of the n ranks is worth, descending: leaving all from r on out costs the sum of the rest."""
    _, importance = _importance(matrix, metric)
    return torch.linalg.eigvalsh(importance).flip(0).clamp(min=0)


def factor(matrix: Tensor, rank: int, metric: Metric) -> tuple[Tensor, Tensor]:
    """(in, rank) and (rank, out) whose product is nearest to the matrix, in its dtype.

    Every column of the first is as long as its row of the second.
    """
    root, importance = _importance(matrix, metric)
    vectors = torch.linalg.eigh(importance).eigenvectors.flip(1)[:, :rank]
    first, second = vectors, vectors.mT
    if root is not None:
        first = torch.linalg.solve(root.mT, vectors)
        second = vectors.mT @ root.mT
    wide = matrix.to(importance.dtype)
    if thin_side(*matrix.shape) == "in":
        second = second @ wide
    else:
        first = wide @ first
    first, second = _share_evenly(first, second)
    return first.to(matrix.dtype).contiguous(), second.to(matrix.dtype).contiguous()


def _importance(matrix: Tensor, metric: Metric) -> tuple[Tensor | None, Tensor]:
    """(R or None for an orthogonal projection, R^T G R), (n, n) both, in float64."""
    is_small = matrix.numel() <= _SMALL
    wide = matrix.double() if is_small else matrix
    inputs = thin_side(*matrix.shape) == "in"
    moment, answer = metric.moment, metric.answer
    if inputs and answer is None:
        answer = wide @ wide.mT
    if not inputs and moment is None:
        moment = wide.mT @ wide
    if moment is None or answer is None:
        only = answer if moment is None else moment
        assert only is not None  # one of the two was given or computed above
        return None, only.to(wide.device, torch.float64)
    moment, answer = (part.to(wide.device, torch.float64) for part in (moment, answer))
    root = _root(moment)
    return root, root.mT @ answer @ root


def _root(moment: Tensor) -> Tensor:
    """R with R R^T = the moment and a ridge on it; the identity for a zero one."""
    level = float(moment.diagonal().mean()) * RIDGE
    if level <= 0:
        return torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    ridge = level * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    root, failed = torch.linalg.cholesky_ex(moment + ridge)
    if not failed:
        return root
    # Rounding left eigenvalues below -level: inputs of lower rank than features, some of them very large.
    values, vectors = torch.linalg.eigh(moment)
    return vectors * values.clamp(min=level).sqrt()


def _share_evenly(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The same product, every column of the first as long as its row of the second."""
    ratio = (second.norm(dim=1) / first.norm(dim=0).clamp(min=torch.finfo(first.dtype).tiny)).sqrt()
    ratio = torch.where(ratio > 0, ratio, 1.0)
    return first * ratio, second / ratio[:, None]
