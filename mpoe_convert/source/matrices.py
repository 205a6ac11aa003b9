"""The dense matrices and biases of an FFN, read from a checkpoint in the orientation (in, out)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import CheckpointError
from .checkpoint import Checkpoint
from .ffn import Source
from .safetensors_file import TensorInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FLOAT_DTYPES = ("float64", "float32", "bfloat16", "float16")


def read_matrix(checkpoint: Checkpoint, source: Source, device: torch.device) -> Tensor:
    """One matrix (in, out), in the dtype of the source. Raises CheckpointError on NaN or Inf."""
    from ..tensors import check_finite

    tensor = checkpoint.read_for(source.weight, source.part).to(device)
    check_finite(tensor, source.weight)
    if source.part is not None:
        tensor = tensor.chunk(2, dim=1 if source.transposed else 0)[source.part]
    # Contiguous, because the decomposition would make slow strided copies of a transposed view.
    return (tensor if source.transposed else tensor.T).contiguous()


def read_wide(checkpoint: Checkpoint, source: Source, device: torch.device) -> Tensor:
    """`read_matrix` in a dtype that can be decomposed: float64 stays, all others become float32."""
    import torch

    matrix = read_matrix(checkpoint, source, device)
    return matrix if matrix.dtype == torch.float64 else matrix.float()


def read_bias(checkpoint: Checkpoint, source: Source) -> Tensor:
    """The bias (out,) of a projection that has one. Raises CheckpointError on NaN or Inf."""
    from ..tensors import check_finite

    assert source.bias is not None
    tensor = checkpoint.read_for(source.bias, source.part)
    check_finite(tensor, source.bias)
    return tensor if source.part is None else tensor.chunk(2)[source.part]


def matrix_size(info: TensorInfo, source: Source) -> tuple[int, int]:
    """(input, output) features of the matrix in a weight tensor.

    Raises:
        CheckpointError: the tensor is no floating-point matrix, or a fused one has an odd number of rows.
    """
    if len(info.shape) != 2 or min(info.shape) < 1:
        raise CheckpointError(f"{info.name} has shape {list(info.shape)}; expected a matrix")
    if info.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"{info.name} is {info.dtype}; expected one of {', '.join(FLOAT_DTYPES)}: dequantise first"
        )
    out_features, in_features = info.shape[::-1] if source.transposed else info.shape
    if source.part is not None:
        if out_features % 2:
            raise CheckpointError(f"{info.name} should hold gate and up, but has {out_features} rows")
        out_features //= 2
    return in_features, out_features
