"""What every room asks of tensors: that they are finite and fit a dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import CheckpointError


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A finite tensor in another dtype. Raises CheckpointError if a number is too large for it."""
    if dtype != tensor.dtype and tensor.numel():
        largest = max(abs(float(bound)) for bound in tensor.aminmax())
        if largest > torch.finfo(dtype).max:
            short = str(dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{name} holds numbers up to {largest:.3g}, too large for {short}; use another --dtype"
            )
    return tensor.to(dtype)


def check_finite(tensor: Tensor, name: str = "the matrix") -> None:
    """Raises CheckpointError if the tensor holds NaN or Inf."""
    # Both show in the extremes, which take one pass and no temporary.
    if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):
        bad = tensor.numel() - int(tensor.isfinite().sum())
        raise CheckpointError(
            f"{name} holds NaN or Inf in {bad} of {tensor.numel()} places; repair the source first"
        )
