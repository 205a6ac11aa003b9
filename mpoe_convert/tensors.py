"""What every room asks of tensors: that they are finite, fit a dtype, and lie on a device that is there."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import CheckpointError, RecipeError


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


def pick_device(name: str) -> torch.device:
    """The torch device of a recipe; "auto" is CUDA where there is one.

    Raises:
        RecipeError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available[device.type]:
        raise RecipeError(f"device {name} is not available here; --device auto picks one that is")
    return device


def check_finite(tensor: Tensor, name: str = "the matrix") -> None:
    """Raises CheckpointError if the tensor holds NaN or Inf."""
    # Both show in the extremes, which take one pass and no temporary.
    if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):
        bad = tensor.numel() - int(tensor.isfinite().sum())
        raise CheckpointError(
            f"{name} holds NaN or Inf in {bad} of {tensor.numel()} places; repair the source first"
        )
