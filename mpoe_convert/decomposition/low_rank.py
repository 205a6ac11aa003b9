"""Factor a weight matrix into two thin ones so that its outputs, not its entries, change least.

Every matrix W (in, out) has a thin side of n = min(in, out) features z: its inputs, or its outputs x W. A
product of rank r is the matrix with a projection P = D U of that side before or after it::

    inputs thin:  W_hat = P W = D (U W)          outputs thin:  W_hat = W P = (W D) U

With S = E[z^T z] and G = E[g^T g], where g = dL/dz, the expected squared effect of leaving out (I - P) is
tr((I - P)^T S (I - P) G), with features and gradients taken as independent (as in K-FAC). For S = R R^T its
minimum is P = R^-T V V^T R^T, where V holds the leading eigenvectors of R^T G R; the loss is the sum of the
other eigenvalues.

* G = W W^T (inputs) or I (outputs) weighs all outputs equally. The minimum is that of norm(X W - X W_hat),
  the whitened SVD of SVD-LLM (arXiv 2403.07378). It needs n x n moments alone and, for thin outputs, no
  whitening has to be undone.
* If in addition S = I (inputs) or W^T W (outputs), it is the plain SVD.
* G from the gradients of the model's loss weighs output directions by their effect on the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Added to a moment, relative to its mean eigenvalue: keeps directions invertible that calibration never saw.
RIDGE = 1e-6
# Matrices with up to this many entries are multiplied in float64.
_SMALL = 1 << 22


@dataclass(frozen=True, eq=False)
class Metric:
    """How errors are weighed on the thin side of one matrix; the default is the Frobenius norm.

    Attributes:
        moment: S, (n, n), of the features. None: S = I for inputs, W^T W for outputs.
        answer: G, (n, n), of the gradients. None: G = W W^T for inputs, I for outputs.
    """

    moment: Tensor | None = None
    answer: Tensor | None = None


def thin_side(rows: int, cols: int) -> str:
    """ "in" or "out": the side with fewer features."""
    return "in" if rows <= cols else "out"


def spectrum(matrix: Tensor, metric: Metric) -> Tensor:
    """Eigenvalues (n,), descending, in float64: keeping the first r costs the sum of the others.

    Args:
        matrix: (in, out).
        metric: how errors are weighed.
    """
    _, importance = _importance(matrix, metric, exact=True)
    return torch.linalg.eigvalsh(importance).flip(0).clamp(min=0)


def factor(matrix: Tensor, rank: int, metric: Metric, *, exact: bool = True) -> tuple[Tensor, Tensor]:
    """(in, rank) and (rank, out) whose product is nearest to the matrix in the metric, in the matrix's dtype.

    Every column of the first has the same norm as its row of the second.

    Args:
        matrix: (in, out).
        rank: at most min(in, out).
        metric: how errors are weighed.
        exact: False: products and the eigenvectors of a float32 matrix are computed in float32. Of the loss,
            which is stationary at the leading eigenvectors, that is an error of second order.
    """
    root, importance = _importance(matrix, metric, exact)
    dtype = importance.dtype if exact else matrix.dtype
    vectors = torch.linalg.eigh(importance.to(dtype)).eigenvectors.flip(1)[:, :rank]
    first, second = vectors, vectors.mT
    if root is not None:
        first = torch.linalg.solve(root.mT, vectors.to(root))
        second = vectors.mT @ root.mT.to(dtype)
    wide = matrix.to(dtype)
    if thin_side(*matrix.shape) == "in":
        second = second @ wide
    else:
        first = wide @ first.to(dtype)
    first, second = _share_evenly(first, second)
    return first.to(matrix.dtype).contiguous(), second.to(matrix.dtype).contiguous()


def _importance(matrix: Tensor, metric: Metric, exact: bool) -> tuple[Tensor | None, Tensor]:
    """(R or None for an orthogonal projection, R^T G R), (n, n) both, in float64."""
    is_small = exact and matrix.numel() <= _SMALL
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
    """R with R R^T = the moment plus a ridge; the identity for a zero moment."""
    level = float(moment.diagonal().mean()) * RIDGE
    identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return root(moment + level * identity, level) if level > 0 else identity


def root(moment: Tensor, least: float) -> Tensor:
    """L, lower triangular, with L L^T = a positive definite moment (n, n).

    Sums in float32 of inputs that span few dimensions, and are large there, have eigenvalues that rounding
    made negative. Then those below `least` count as `least`, which is above zero.
    """
    found, failed = torch.linalg.cholesky_ex(moment)
    if not failed:
        return found
    values, vectors = torch.linalg.eigh(moment)
    half = vectors * values.clamp(min=least).sqrt()
    return torch.linalg.qr(half.mT).R.mT.contiguous()


def _share_evenly(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The same product, with every column of the first as long as its row of the second."""
    ratio = (second.norm(dim=1) / first.norm(dim=0).clamp(min=torch.finfo(first.dtype).tiny)).sqrt()
    ratio = torch.where(ratio > 0, ratio, 1.0)
    return first * ratio, second / ratio[:, None]
