"""Decompose a weight matrix into a matrix product operator (MPO, also called a TT-matrix).

TensorLy's `TTMatrix` holds the cores, and its TT-SVD does the sweeps over large unfoldings. This module
decides in which direction the sweeps run and hands TensorLy an SVD made for the unfoldings that occur here::

     L1 --> L2 --> [C] <-- R1 <-- R2        arrows: the direction in which the weight is pushed

* Where a block of sites has few rows, its cores are found in the Gram matrix of its unfolding alone.
* Both sweeps end at the central core, which becomes the orthogonality centre: the left cores are
  left-isometric, the right ones right-isometric, so norm(C) = norm(W_hat), and the squared error is
  the sum of the discarded squared singular values over all bonds.
* No step divides by a singular value, so rank-deficient and zero matrices are ordinary input.

Sources: MPOE, arXiv 2203.01104; TT-SVD: Oseledets, SIAM J. Sci. Comput. 33(5), 2295 (2011),
algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from math import inf, prod, sqrt

import tensorly
import torch
from tensorly.decomposition import tensor_train_matrix
from tensorly.tt_matrix import TTMatrix
from torch import Tensor

from ..errors import SitesError
from ..options import assigned, called
from ..tensors import check_finite
from .grams import gram, is_reliable
from .sites import SVDS, Sites

# Up to this many rows an unfolding is replaced by its Gram matrix (see `_sweep`).
# Above, the float64 eigendecomposition, cubic in the rows, costs more than it saves.
_MAX_GRAM = 1024
# The Gram matrix of float32 data is summed in float64 from float32 products: accurate to about 1e-7
# of its norm, which is enough where nothing or much is dropped. Where less than this part of the
# squared norm is dropped, or where squares may leave the range of float32, it is computed again
# from float64 products.
_SMALL_LOSS = 1e-3
# From this many rows on eigenvectors are computed in float32, where nothing or much is dropped.
_LARGE_GRAM = 128
# Differences are taken in pieces of this many entries, which fit into a core's cache.
_CACHED = 1 << 17
_OVERSAMPLING = 16
_POWER_ITERATIONS = 3


@dataclass(frozen=True, eq=False)
class MPO:
    """A chain of cores with the orthogonality centre on the central core.

    Attributes:
        tt: core k has shape (bond_left, in_dim, out_dim, bond_right), contiguous.
        sites: the dimensions, with the bonds that were obtained.
        discarded: per bond the sum of the squared singular values dropped there. Their total is
            the squared Frobenius error.
    """

    tt: TTMatrix
    sites: Sites
    discarded: tuple[float, ...]

    @property
    def cores(self) -> tuple[Tensor, ...]:
        """Core k: (bond_left, in_dim, out_dim, bond_right)."""
        return tuple(self.tt.factors)


def fit(matrix: Tensor, sites: Sites, *, svd: str = "auto", seed: int = 0, gauge: str = "canonical") -> MPO:
    """Decompose a matrix over the given sites, truncating every bond to its dimension in ``sites``.

    ::

        in1   in2   in3
         |     |     |      W[(in1 in2 in3), (out1 out2 out3)]
        [L]---[C]---[R]        = sum over the bonds of L[in1, out1] C[in2, out2] R[in3, out3]
         |     |     |
        out1  out2  out3

    Args:
        matrix: (rows, cols), rows are input features: y = x @ W. float32 and float64 keep their
            dtype, bfloat16 and float16 become float32. From an MPS device the cores come back on the CPU.
        sites: dimensions and bonds; a bond wider than what exists is clipped.
        svd: "exact", "randomized" (for truncated bonds; the others stay exact), or "auto".
        seed: of the randomized method.
        gauge: "canonical", as above, or "identity": the outer cores are identities and the centre is the
            matrix itself. The same matrix, to the bit; for sites whose outer bonds are full.

    Raises:
        SitesError: the matrix does not have the size that the sites describe, or a bond is not full.
        CheckpointError: the matrix holds NaN or Inf.
        ValueError: unknown ``svd``.
    """
    if svd not in SVDS:
        raise ValueError(f"svd is {svd!r}: choose one of {', '.join(SVDS)}")
    matrix = _checked(matrix, sites)
    if matrix.device.type == "mps":
        matrix = matrix.cpu()  # Gram matrices are float64, which MPS does not have
    c = sites.centre
    left, right = _Block.left_of_centre(sites), _Block.right_of_centre(sites)
    # TensorLy adds `backend_context` to its module while it is imported, so pyright cannot see it.
    with (
        torch.no_grad(),
        tensorly.backend_context("pytorch", local_threadsafe=True),  # pyright: ignore[reportAttributeAccessIssue]
    ):
        unfolding = _fold_in_three(matrix, sites)  # (left, centre * right)
        sweep = _identity if gauge == "identity" else partial(_sweep, method=svd, seed=seed)
        left_cores, left_lost, rest = sweep(unfolding, left)
        rest = rest.reshape(-1, right.rows).mT  # (right, left bond * centre)
        right_cores, right_lost, rest = sweep(rest, right)
        bond_left, bond_right = left_cores[-1].shape[-1], right_cores[0].shape[0]
        core = rest.mT.reshape(bond_left, sites.in_dims[c], sites.out_dims[c], bond_right)
        tt = TTMatrix([*left_cores, core.contiguous(), *right_cores])
    bonds = tuple(int(bond) for bond in tt.rank[1:-1])
    return MPO(tt, replace(sites, bonds=bonds), (*left_lost, *right_lost))


def relative_error(matrix: Tensor, approximation: Tensor) -> float:
    """norm(matrix - approximation) / norm(matrix) in the Frobenius norm.

    Both (rows, cols), any float dtypes. A zero matrix gives 0 if met exactly, else infinity.

    Raises:
        ValueError: the shapes differ.
    """
    if matrix.shape != approximation.shape:
        raise ValueError(
            f"cannot compare {tuple(matrix.shape)} with {tuple(approximation.shape)}: "
            "both have to be the same matrix"
        )
    return error_of_pieces(matrix, zip(_rows(matrix), _rows(approximation), strict=True))


def _rows(matrix: Tensor) -> tuple[Tensor, ...]:
    """The matrix in pieces of about `_CACHED` entries."""
    return matrix.split(max(_CACHED // matrix.shape[1], 1))


def error_of_pieces(
    matrix: Tensor, pieces: Iterable[tuple[Tensor, Tensor]], is_sample: bool = False
) -> float:
    """`relative_error` of an approximation that is never there as a whole.

    Args:
        matrix: (rows, cols).
        pieces: of the matrix and of its approximation.
        is_sample: they are not all; the error is estimated as if it were alike everywhere.
    """
    with torch.no_grad():
        # float64 sums are much slower and needed only where squares could over- or underflow.
        dtype = None if _is_ordinary(matrix) else torch.float64
        size = partial(torch.linalg.vector_norm, dtype=dtype)
        norm = _together(map(size, _rows(matrix)))
        errors, seen = [], 0
        for ours, theirs in pieces:
            errors.append(size(ours - theirs))
            seen += ours.numel()
        error = _together(errors)
        if is_sample:
            error *= sqrt(matrix.numel() / seen)
    if norm == 0.0:
        return 0.0 if error == 0.0 else inf
    return error / norm


def _together(norms: Iterable[Tensor]) -> float:
    """The norm of what has these norms in its parts."""
    return float(torch.linalg.vector_norm(torch.stack(list(norms)), dtype=torch.float64))


@dataclass(frozen=True)
class _Block:
    """The sites on one side of the centre, in chain order, and their bonds from the end inwards."""

    in_dims: tuple[int, ...]
    out_dims: tuple[int, ...]
    bonds: tuple[int, ...]
    from_right: bool

    @classmethod
    def left_of_centre(cls, sites: Sites) -> _Block:
        c = sites.centre
        return cls(sites.in_dims[:c], sites.out_dims[:c], sites.bonds[:c], False)

    @classmethod
    def right_of_centre(cls, sites: Sites) -> _Block:
        c = sites.centre
        return cls(sites.in_dims[c + 1 :], sites.out_dims[c + 1 :], sites.bonds[: c - 1 : -1], True)

    @property
    def rows(self) -> int:
        return prod(self.in_dims) * prod(self.out_dims)


def _checked(matrix: Tensor, sites: Sites) -> Tensor:
    """The matrix in a dtype that can be decomposed, of the right size and finite."""
    if matrix.ndim != 2 or tuple(matrix.shape) != (sites.rows, sites.cols):
        raise SitesError(
            f"the matrix is {' x '.join(map(str, matrix.shape))}, the sites {sites.in_dims} x "
            f"{sites.out_dims} describe {sites.rows} x {sites.cols}: build the sites from the "
            "matrix's own size"
        )
    if matrix.dtype not in (torch.float32, torch.float64):
        matrix = matrix.float()
    check_finite(matrix)
    return matrix


def _fold_in_three(matrix: Tensor, sites: Sites) -> Tensor:
    """(rows, cols) -> (left, centre * right), the index of each part as (inputs, outputs).

    One permutation for all sites, with runs as long as the right block's outputs; TensorLy's own,
    site by site, then only meets small tensors. No copy is made if the left block has no outputs
    and the right one no inputs (the one-sided layout).
    """
    c = sites.centre
    parts = [slice(0, c), slice(c, c + 1), slice(c + 1, None)]
    ins = [prod(sites.in_dims[part]) for part in parts]
    outs = [prod(sites.out_dims[part]) for part in parts]
    folded = matrix.reshape(*ins, *outs).permute(0, 3, 1, 4, 2, 5)
    return folded.reshape(ins[0] * outs[0], -1)


def _identity(unfolding: Tensor, block: _Block) -> tuple[list[Tensor], list[float], Tensor]:
    """A block in the identity gauge: like `_sweep`, with cores that are reshaped identities."""
    step = -1 if block.from_right else 1
    cores, width = [], 1
    for in_dim, out_dim, bond in zip(block.in_dims[::step], block.out_dims[::step], block.bonds, strict=True):
        if bond != width * in_dim * out_dim:
            raise SitesError(
                f"the identity gauge needs full bonds, and one is {bond} of {width * in_dim * out_dim}; "
                f"expected a larger {called('bond_dim')} or {assigned('gauge', 'canonical')}"
            )
        core = torch.eye(bond, dtype=unfolding.dtype, device=unfolding.device)
        shape = (bond, in_dim, out_dim, width) if block.from_right else (width, in_dim, out_dim, bond)
        cores.append(core.reshape(shape))
        width = bond
    cores = cores[::step]
    return cores, [0.0] * len(cores), _block_isometry(cores, block) @ unfolding


def _sweep(
    unfolding: Tensor, block: _Block, method: str, seed: int
) -> tuple[list[Tensor], list[float], Tensor]:
    """TT-SVD of one block of sites, from the end of the chain to the centre.

    ::

        rows --[unfolding]-- everything else   ->   [1]--[2]--...--[rest]-- everything else

    The left singular vectors of an unfolding A with at most `_MAX_GRAM` rows, and the weight that each bond
    drops, are those of its Gram matrix A A^T (`_gram_train`). So the large A is read only twice (Gram matrix,
    projection), however many sites there are.

    Args:
        unfolding: (block.rows, anything).

    Returns:
        The cores and what their bonds discarded, in chain order, and the rest (bond, anything).
    """
    rows, columns = unfolding.shape
    if method == "randomized" or rows > min(columns, _MAX_GRAM):
        cores, lost, rest = _tensor_train(unfolding, block, _Split(method, seed))
        return _in_chain_order(cores, lost, block, unfolding.dtype) + (rest,)
    found = None
    for products in dict.fromkeys((unfolding.dtype, torch.float64)):
        made = gram(unfolding, products)
        if products == torch.float32 and not is_reliable(made):
            continue
        norm = made.trace()  # of A, squared
        found = cores, lost = _gram_train(made, block, in_float32=products == torch.float32)
        if sum(lost) == 0 or sum(lost) >= _SMALL_LOSS * norm:
            break
    assert found is not None  # float64 is never skipped
    cores, lost = _in_chain_order(*found, block, unfolding.dtype)
    isometry = _block_isometry(cores, block)
    if unfolding.is_contiguous():
        return cores, lost, isometry @ unfolding
    return cores, lost, (unfolding.mT @ isometry.mT).mT  # keeps the memory order that the core will have


def _gram_train(made: Tensor, block: _Block, in_float32: bool) -> tuple[list[Tensor], list[float]]:
    """TT-SVD of one block out of the Gram matrix G of its unfolding: cores, discarded weights; sweep order.

    ::

        [U]--x--[G]--x--[U]      x: the bond of the sites before, y: the others, over which the trace is taken
              y--|_|--y          U: leading eigenvectors of the trace; the next G is U^T G U

    Args:
        made: G, (block.rows, block.rows), of at least as many columns.
        block: its sites.
        in_float32: large eigendecompositions, see `_eigenvectors`.
    """
    step, sites = -1 if block.from_right else 1, len(block.in_dims)
    order = [place for k in range(sites)[::step] for place in (k, sites + k)]
    dims = (*block.in_dims, *block.out_dims)
    made = made.reshape(*dims, *dims).permute(*order, *(2 * sites + place for place in order))
    cores, lost, width, rest = [], [], 1, block.rows
    for in_dim, out_dim, bond in zip(block.in_dims[::step], block.out_dims[::step], block.bonds, strict=True):
        rows, rest = width * in_dim * out_dim, rest // (in_dim * out_dim)
        made = made.reshape(rows, rest, rows, rest)
        basis, dropped = _leading(made.diagonal(dim1=1, dim2=3).sum(-1), min(bond, rows), in_float32)
        basis = _with_signs(basis)
        cores.append(basis.reshape(width, in_dim, out_dim, -1))
        lost.append(dropped)
        width = basis.shape[1]
        if len(cores) < sites:
            made = (basis.mT @ made.reshape(rows, -1)).reshape(width * rest, rows, rest)
            made = basis.mT @ made
    return cores, lost


def _with_signs(basis: Tensor) -> Tensor:
    """The largest entry of every column positive, as TensorLy's `svd_flip` makes them."""
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return torch.where(largest < 0, -basis, basis)


def _tensor_train(tensor: Tensor, block: _Block, split: _Split) -> tuple[list[Tensor], list[float], Tensor]:
    """TensorLy's TT-SVD of (block.rows, columns): cores, discarded weights, rest; sweep order."""
    in_dims, out_dims, sites = block.in_dims, block.out_dims, len(block.in_dims)
    columns = tensor.shape[1]
    if block.from_right and sites > 1:
        order = [*reversed(range(sites)), *reversed(range(sites, 2 * sites)), 2 * sites]
        tensor = tensor.reshape(*in_dims, *out_dims, columns).permute(order)
        in_dims, out_dims = in_dims[::-1], out_dims[::-1]
    # The columns are one more site without input: TensorLy leaves the rest there.
    tensor = tensor.reshape(*in_dims, 1, *out_dims, columns)
    ranks = [1, *block.bonds, 1]
    # TensorLy takes a function here as well; its annotation names only the strings.
    factors = tensor_train_matrix(tensor, ranks, svd=split).factors  # pyright: ignore[reportArgumentType]
    return factors[:-1], split.discarded, factors[-1].reshape(-1, columns)


def _in_chain_order(
    cores: list[Tensor], lost: list[float], block: _Block, dtype: torch.dtype
) -> tuple[list[Tensor], list[float]]:
    if block.from_right:
        cores = [core.permute(3, 1, 2, 0) for core in reversed(cores)]
        lost = lost[::-1]
    return [core.to(dtype).contiguous() for core in cores], lost


def _block_isometry(cores: list[Tensor], block: _Block) -> Tensor:
    """The block contracted, its open bond first: (bond, block.rows), the rows orthonormal."""
    if block.from_right:  # the open bond joins the first site's input, where it is the slow index
        first = cores[0]
        closed = first.reshape(1, -1, *first.shape[2:])
        return TTMatrix([closed, *cores[1:]]).to_matrix().reshape(first.shape[0], -1)
    last = cores[-1]  # the open bond joins the last site's output, where it is the fast index
    closed = last.reshape(*last.shape[:2], -1, 1)
    return TTMatrix([*cores[:-1], closed]).to_matrix().reshape(-1, last.shape[-1]).mT


class _Split:
    """The SVD that TensorLy calls at every bond; records the weight that was dropped.

    TensorLy keeps U as the core and goes on with S[:, None] * V. So S = 1 and V = U^T A are
    returned: the product is U^T A to the last bit, where (U^T A) / S would blow up on singular
    values near zero.

    "auto" draws at random where min(A.shape) > `_MAX_GRAM` and 8 * rank <= min(A.shape): there the
    eigendecomposition, cubic in the shorter side, takes several times as long. The randomized error is
    slightly larger on a flat spectrum, the worst case, so the smaller unfoldings stay exact.
    """

    def __init__(self, method: str, seed: int) -> None:
        self.method = method
        self.seed = seed
        self.discarded: list[float] = []

    def __call__(self, matrix: Tensor, n_eigenvecs: int, **_: object) -> tuple[Tensor, ...]:
        if self._randomized(min(matrix.shape), n_eigenvecs):
            basis, projected, lost = _randomized_split(matrix, n_eigenvecs, self.seed)
        else:
            basis, lost = _exact_basis(matrix, n_eigenvecs)
            projected = basis.mT @ matrix
        self.discarded.append(lost)
        return basis, torch.ones_like(projected[:, 0]), projected

    def _randomized(self, side: int, rank: int) -> bool:
        if self.method == "auto":
            return side > _MAX_GRAM and 8 * rank <= side
        return self.method == "randomized" and rank < side


def _exact_basis(matrix: Tensor, rank: int) -> tuple[Tensor, float]:
    """Leading left singular vectors (rows, rank); the sum of the other squared singular values."""
    rows, columns = matrix.shape
    if rows > columns:  # the Gram matrix of the short side; Q keeps the long one isometric
        q, r = torch.linalg.qr(matrix)
        basis, lost = _exact_basis(r, rank)
        return q @ basis, lost
    vectors, lost = _leading(gram(matrix, torch.float64), rank)
    return vectors.to(matrix.dtype), lost


def _leading(made: Tensor, rank: int, in_float32: bool = False) -> tuple[Tensor, float]:
    """Leading eigenvectors (rows, rank) of a Gram matrix, contiguous, and the sum of the other eigenvalues.

    Both in float64; of large ones by way of float32 where `in_float32` allows it.
    """
    if in_float32 and len(made) >= _LARGE_GRAM:
        return _eigenvectors(made, rank)
    values, vectors = torch.linalg.eigh(made)  # ascending
    dropped = values[: len(made) - rank].clamp(min=0)
    return vectors.flip(1)[:, :rank].contiguous(), float(dropped.sum())


def _eigenvectors(made: Tensor, rank: int) -> tuple[Tensor, float]:
    """Leading eigenvectors (rows, rank) of a Gram matrix, and the sum of the other eigenvalues; in float64.

    They are computed in float32, which is faster. What counts is done in float64: one step of Newton and
    Schulz makes them orthonormal, and what they leave out is summed, which is stationary at the true
    eigenvectors and errs by the second order.
    """
    scale = made.diagonal().max().clamp(min=torch.finfo(torch.float32).tiny)
    rough = torch.linalg.eigh((made / scale).float()).eigenvectors.flip(1)[:, :rank].contiguous()
    vectors = rough.double()
    excess = vectors.mT @ vectors
    excess.diagonal().sub_(1)
    vectors -= 0.5 * rough @ excess.float()  # small, so that float32 is enough for it
    if rank == len(made):
        return vectors, 0.0
    kept = (vectors * (made @ vectors)).sum()
    return vectors, max(float(made.trace() - kept), 0.0)


def _randomized_split(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, float]:
    """Range finder with power iterations: basis (rows, rank), basis^T A, discarded weight.

    Halko, Martinsson, Tropp, SIAM Review 53(2), 217 (2011), algorithm 4.4, started on the rows.
    """
    width = min(rank + _OVERSAMPLING, *matrix.shape)
    generator = torch.Generator(device=matrix.device).manual_seed(seed)
    options = {"generator": generator, "device": matrix.device, "dtype": matrix.dtype}
    q = torch.randn(matrix.shape[0], width, **options)
    for _ in range(_POWER_ITERATIONS):
        q, _ = torch.linalg.qr(matrix @ (matrix.mT @ q))
    sketch = q.mT @ matrix
    rotation, _ = _exact_basis(sketch, rank)
    projected = rotation.mT @ sketch
    lost = _squared_norm(matrix) - _squared_norm(projected)
    return q @ rotation, projected, max(lost, 0.0)


def _squared_norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2


def _is_ordinary(matrix: Tensor) -> bool:
    """Whether the squares of the entries, and of their rounding errors, are ordinary float32 values."""
    low, high = matrix.aminmax()
    return matrix.dtype == torch.float32 and 1e-12 < max(-float(low), float(high)) < 1e12
