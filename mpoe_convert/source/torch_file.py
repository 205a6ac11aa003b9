"""Tensors of a legacy `pytorch_model.bin`, memory-mapped, and never an arbitrary pickle."""

from __future__ import annotations

import pickle
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from .safetensors_file import DTYPE2BYTES, TensorInfo, lfs_pointer, unknown_dtype

if TYPE_CHECKING:
    import torch


REMAP_BYTES = 64 * 2**20  # a mapped .bin is mapped anew after this many bytes became resident


class BinReader:
    """The state dict of the `.bin` file read last: mapped, or in memory where it cannot be.

    Pages that a map has touched stay resident as long as the map lives, so it is dropped and made
    again after every REMAP_BYTES. A file from before zip archives cannot be mapped and stays in memory
    whole.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._state: dict[str, torch.Tensor] = {}
        self._touched = 0

    def headers(self, path: Path, file: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        """(name -> header, name -> the earlier name whose storage it repeats) of a file.

        Args:
            path: the file.
            file: its name as `TensorInfo.file` records it.

        Raises:
            CheckpointError: the file is damaged, or holds anything but plain tensors.
        """
        self._load(path)
        infos, first, ties = {}, {}, {}
        for name, tensor in self._state.items():
            infos[name] = TensorInfo(name, dtype_name(tensor), tuple(tensor.shape), file)
            if tensor.numel() == 0:
                continue  # empty storages share the null pointer without being tied
            place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if first.setdefault(place, name) != name:
                ties[name] = first[place]
        if _is_zip(path):
            self._forget()
        return infos, ties

    def read(self, path: Path, name: str) -> torch.Tensor:
        """A contiguous copy of one tensor. Raises CheckpointError if the file lost it or cannot be read."""
        import torch

        try:
            if path != self._path or (self._touched > REMAP_BYTES and _is_zip(path)):
                self._forget()
                self._load(path)
        except OSError as exc:
            raise CheckpointError(
                f"'{path}': tensor {name!r} cannot be read any more ({exc}): check the file and run again"
            ) from exc
        if name not in self._state:
            raise CheckpointError(f"'{path}' has lost tensor {name!r} since it was opened: run again")
        tensor = self._state[name]
        self._touched += tensor.nbytes
        return tensor.clone(memory_format=torch.contiguous_format)

    def _load(self, path: Path) -> None:
        self._state = _load_bin(path)
        self._path = path
        self._touched = 0

    def _forget(self) -> None:
        self._state, self._path = {}, None


def _is_zip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def _load_bin(path: Path) -> dict[str, torch.Tensor]:
    """Load a state dict and nothing else: always `weights_only`, mapped where the format can be."""
    import torch

    with path.open("rb") as stream:
        if stream.read(8) == b"version ":
            raise CheckpointError(lfs_pointer(path))
    try:
        with warnings.catch_warnings():
            # An unusual pickle protocol either loads or fails below.
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as exc:
        # torch's own text recommends weights_only=False: pass on the cause, never that advice.
        asked = re.search(r"GLOBAL ([\w.]+)", str(exc))
        cause = re.search(r"WeightsUnpickler error: ([^\n]{1,200})", str(exc))
        what = f"it asks for {asked[1]}" if asked else cause[1] if cause else "an unknown pickle"
        raise CheckpointError(
            f"'{path}' holds more than tensors ({what}) and only tensors are loaded: convert it to "
            "safetensors with a transformers version you trust"
        ) from exc
    except Exception as exc:  # a damaged pickle may fail in any way at all
        first = (str(exc).strip().splitlines() or ["no details"])[0][:200]
        raise CheckpointError(
            f"'{path}' cannot be read as a PyTorch checkpoint ({type(exc).__name__}: {first}): the "
            "file is damaged or incomplete, fetch it again"
        ) from exc
    _check_state(path, state)
    return {name: tensor.detach() for name, tensor in state.items()}


def _check_state(path: Path, state: object) -> None:
    import torch

    if not isinstance(state, dict):
        raise CheckpointError(
            f"'{path}' holds a {type(state).__name__}, expected a flat dict of tensors: save "
            "model.state_dict() alone"
        )
    for name, value in state.items():
        if isinstance(value, dict):
            raise CheckpointError(
                f"'{path}' holds a dict under {name!r}, expected a flat dict of tensors: it looks "
                "like a training checkpoint, save the inner state dict alone"
            )
        plain = isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_quantized
        if not isinstance(name, str) or not plain or value.device.type != "cpu":
            raise CheckpointError(
                f"'{path}' holds a {type(value).__name__} under {name!r}, expected plain tensors "
                "with string names: save model.state_dict() alone"
            )
        if dtype_name(value) not in DTYPE2BYTES:
            raise CheckpointError(unknown_dtype(path, name, dtype_name(value)))


def dtype_name(tensor: torch.Tensor) -> str:
    """Torch's name of the dtype: "bfloat16"."""
    return str(tensor.dtype).removeprefix("torch.")
