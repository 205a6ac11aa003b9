"""Fit a chain with truncated bonds to the outputs of a matrix: alternating least squares over its cores.

::

        in_l    in_k    in_r
         |       |       |
        [L]--a--[C]--b--[R]        L and R: the cores left and right of core k, isometries both
         |       |       |
       out_l   out_k   out_r

TT-SVD is nearest in the Frobenius norm. The chain nearest in the outputs is another one: with S = E[x^T x] of
the matrix's inputs, the expected squared error of x W_hat is tr((W - W_hat)^T S (W - W_hat)). Whitening does
not commute with a chain whose sites mix inputs and outputs (undoing it raises the bonds again), so S stays in
the error. The sweeps go up and down the chain and minimise the error over one core at a time while the others
are fixed, so it never grows. As L and R are isometric, the equations of a core are no worse conditioned than
S, and conjugate gradients solve them without forming their matrix.

Source: ALS for tensor trains: Holtz, Rohwedder, Schneider, SIAM J. Sci. Comput. 34(2), A683 (2012).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..runtime.shapes import functions
from .low_rank import RIDGE
from .mpo import fit
from .sites import Sites

# The largest number of sweeps; earlier, they end when one lowers the error by less than this fraction.
MAX_SWEEPS = 20
_LITTLE = 0.005
# Steps of conjugate gradients per core; the next sweep continues from their result.
_STEPS = 3


def nearest_chain(
    matrix: Tensor, sites: Sites, moment: Tensor, *, svd: str = "auto", seed: int = 0
) -> Tensor:
    """The matrix (in, out) of the chain over these sites that is nearest in the outputs.

    ALS starts from TT-SVD's chain and finds a local minimum.

    Args:
        matrix, sites, svd, seed: as for `mpo.fit`.
        moment: S = E[x^T x] of the inputs, (in, in).

    Raises:
        SitesError, CheckpointError, ValueError: as `mpo.fit`.
    """
    start = fit(matrix, sites, svd=svd, seed=seed).cores
    return functions().contract_chain(refine([core.to(matrix) for core in start], matrix, moment))


def refine(cores: Sequence[Tensor], matrix: Tensor, moment: Tensor) -> list[Tensor]:
    """Cores of the same shapes whose outputs are closer to those of the matrix.

    Args:
        cores: (bond_left, in_dim, out_dim, bond_right) each, with the orthogonality centre on any of them.
        matrix: (in, out), in the dtype of the cores.
        moment: S, (in, in).

    Returns:
        The cores, with the orthogonality centre on the first.
    """
    metric = _scaled(moment.to(matrix))
    target = metric @ matrix
    chain = _isometric_from_the_right(list(cores))
    error = _error(chain, matrix, metric)
    for _ in range(MAX_SWEEPS):
        for k, following in _up_and_down(len(chain)):
            frame = _Frame(chain, k)
            chain[k] = _solve(frame, chain[k], target, metric)
            _pass_on(chain, k, following)
        before, error = error, _error(chain, matrix, metric)
        if error >= (1 - _LITTLE) * before:
            break
    return chain


def _scaled(moment: Tensor) -> Tensor:
    """The moment scaled to a mean eigenvalue of 1, plus a ridge; the identity for a zero moment."""
    identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    level = float(moment.diagonal().mean())
    return moment / level + RIDGE * identity if level > 0 else identity


def _error(chain: list[Tensor], matrix: Tensor, metric: Tensor) -> float:
    difference = matrix - functions().contract_chain(chain)
    return float((difference * (metric @ difference)).sum())


def _up_and_down(count: int) -> Iterator[tuple[int, int]]:
    """(core, the one after it): 0, 1 ... last ... 1, and 0 again at the end."""
    order = [*range(count), *range(count - 2, 0, -1)]
    return zip(order, [*order[1:], 0], strict=True)


class _Frame:
    """The cores left and right of core k, contracted."""

    def __init__(self, chain: list[Tensor], k: int) -> None:
        end = torch.ones(1, 1, 1, 1, dtype=chain[k].dtype, device=chain[k].device)
        self.left = functions().merge_cores([end, *chain[:k]])
        self.right = functions().merge_cores([*chain[k + 1 :], end])
        self.core = chain[k].shape

    def expand(self, core: Tensor) -> Tensor:
        """The matrix (in, out) of the chain with this core at place k."""
        return functions().contract_chain([self.left, core, self.right])

    def project(self, matrix: Tensor) -> Tensor:
        """The adjoint of `expand`: a matrix (in, out) contracted to the core's shape."""
        left, right, core = self.left[0], self.right[..., 0], self.core
        ins, outs = (left.shape[0], core[1], right.shape[1]), (left.shape[1], core[2], right.shape[2])
        return torch.einsum("ioa,ikrojs,brs->akjb", left, matrix.reshape(*ins, *outs), right)


def _solve(frame: _Frame, core: Tensor, target: Tensor, metric: Tensor) -> Tensor:
    """Conjugate gradients towards the core whose projected residual vanishes."""
    residual = frame.project(target - metric @ frame.expand(core))
    direction, size = residual, residual.square().sum()
    for _ in range(_STEPS):
        if not size > 0:
            break
        image = frame.project(metric @ frame.expand(direction))
        step = size / (direction * image).sum()
        core, residual = core + step * direction, residual - step * image
        before, size = size, residual.square().sum()
        direction = residual + size / before * direction
    return core


def _isometric_from_the_right(chain: list[Tensor]) -> list[Tensor]:
    for k in range(len(chain) - 1, 0, -1):
        _pass_on(chain, k, k - 1)
    return chain


def _pass_on(chain: list[Tensor], k: int, neighbour: int) -> None:
    """Make core k an isometry towards its neighbour, which absorbs the remaining factor of the QR."""
    left, ins, outs, right = chain[k].shape
    if neighbour > k:
        isometry, rest = torch.linalg.qr(chain[k].reshape(-1, right))
        chain[k] = isometry.reshape(left, ins, outs, -1)
        chain[neighbour] = torch.einsum("ab,bior->aior", rest, chain[neighbour])
    else:
        isometry, rest = torch.linalg.qr(chain[k].reshape(left, -1).mT)
        chain[k] = isometry.mT.reshape(-1, ins, outs, right)
        chain[neighbour] = torch.einsum("lioa,ba->liob", chain[neighbour], rest)
