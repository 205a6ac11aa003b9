"""The device that a command computes on; "auto" means the same for all commands."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .errors import RequestError

if TYPE_CHECKING:
    import torch


def check_device_name(name: str) -> None:
    """Check the spelling of a device; does not import torch. Raises RequestError if it names no device."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise RequestError(f"device is {name!r}; expected auto, cpu, cuda, cuda:N or mps")


def pick_device(name: str) -> torch.device:
    """The torch device of that name; "auto" is CUDA where there is one, else the CPU.

    MPS has to be named: it lacks the float64 of the decomposition and of calibration.

    Raises:
        RequestError: there is no device of that name, or this machine does not have it.
    """
    import torch

    check_device_name(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available[device.type]:
        raise RequestError(f"device {name} is not available here; --device auto picks one that is")
    return device
