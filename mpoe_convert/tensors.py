"""Checks of tensors: they are finite and fit a dtype."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import CheckpointError
from .options import called


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A finite tensor in another dtype.

    Args:
        name: of the tensor, for the message.
        tensor: of any shape.
        dtype: a floating-point one.

    Raises:
        CheckpointError: a value is too large for the dtype.
    """
    if dtype != tensor.dtype and tensor.numel():
        largest = max(abs(float(bound)) for bound in tensor.aminmax())
        if largest > torch.finfo(dtype).max:
            short = str(dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{name} holds values up to {largest:.3g}, too large for {short}; use another "
                f"{called('dtype')}"
            )
    return tensor.to(dtype)


def check_finite(tensor: Tensor, name: str = "the matrix") -> None:
    """Raises CheckpointError if the tensor holds NaN or Inf."""
    if tensor.itemsize == 1 and tensor.is_floating_point():
        tensor = tensor.float()  # torch has no extremes of float8
    # NaN and Inf both show in the extremes, which take one pass and no temporary.
    if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):
        bad = tensor.numel() - int(tensor.isfinite().sum())
        raise CheckpointError(
            f"{name} holds NaN or Inf in {bad} of {tensor.numel()} places; repair the source first"
        )


def broken_weights(model: nn.Module) -> list[str]:
    """Names of the parameters that hold NaN or infinities."""
    return [name for name, parameter in model.named_parameters() if _num_broken(parameter)]


def _num_broken(parameter: torch.Tensor) -> int:
    """How many values are NaN or infinite; of a shard those of all processes."""
    from torch.distributed.tensor import DTensor

    found = (~torch.isfinite(parameter)).sum()
    return int(found.full_tensor() if isinstance(found, DTensor) else found)
