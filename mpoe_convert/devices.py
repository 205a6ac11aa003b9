"""The device that a command computes on; "auto" means the same for all commands."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .errors import RequestError
from .options import assigned, called

if TYPE_CHECKING:
    import torch


DEVICES = "auto, cpu, cuda, cuda:N or mps"


def is_device(name: str) -> bool:
    """Whether a text can be a device's name; this machine may still lack it. Does not import torch."""
    return re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name) is not None


def check_device(name: str) -> None:
    """Raise RequestError unless `pick_device` finds it. Does not import torch for those that always exist."""
    if name not in ("auto", "cpu"):
        pick_device(name)


def pick_device(name: str) -> torch.device:
    """The torch device of that name; "auto" is CUDA where there is one, else the CPU.

    MPS has to be named: it lacks the float64 of the decomposition and of calibration.

    Raises:
        RequestError: there is no device of that name, or this machine does not have it.
    """
    import torch

    if not is_device(name):
        raise RequestError(f"{called('device')} is {name!r}; expected {DEVICES}")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available[device.type]:
        there = assigned("device", "auto")
        raise RequestError(f"{assigned('device', name)} is not available here; {there} picks one that is")
    return device
