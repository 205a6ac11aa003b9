"""Safetensors files: read and check the header, read one tensor."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError

if TYPE_CHECKING:
    import torch


# safetensors code -> (torch dtype name, bytes per element)
CODE2DTYPE = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
    "C64": ("complex64", 8),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
}
DTYPE2BYTES = dict(CODE2DTYPE.values())
MAX_HEADER_BYTES = 100_000_000  # the limit that the safetensors format sets


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its file's header describes it.

    Attributes:
        name: in the checkpoint.
        dtype: torch's name: "bfloat16".
        shape: of the tensor.
        file: path relative to the checkpoint's folder.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's data in bytes, contiguous."""
        return prod(self.shape) * DTYPE2BYTES[self.dtype]


def tensor_info(where: object, name: str, code: object, shape: tuple[int, ...], file: str) -> TensorInfo:
    """The TensorInfo of a safetensors entry.

    Args:
        where: the file or the model, for the message.
        name: of the tensor.
        code: its dtype in safetensors' spelling: "BF16".
        shape: of the tensor.
        file: path relative to the checkpoint's folder.

    Raises:
        CheckpointError: torch has no dtype for the code.
    """
    if not isinstance(code, str) or code not in CODE2DTYPE:
        raise CheckpointError(unknown_dtype(where, name, code))
    return TensorInfo(name, CODE2DTYPE[code][0], shape, file)


def unknown_dtype(where: object, name: str, code: object) -> str:
    """The message for a tensor whose dtype cannot be converted."""
    return (
        f"{where}: tensor {name!r} has the dtype {code!r}, expected one that torch can compute "
        "with: dequantise first, or convert the original checkpoint"
    )


def read_header(path: Path, file: str) -> dict[str, TensorInfo]:
    """Parse and check one safetensors header; the library's errors do not say which entry is wrong.

    The format: 8 bytes little-endian header length, that many bytes of JSON {name: {dtype, shape,
    data_offsets}}, then the data, which the offsets must tile without gap or overlap.

    Raises CheckpointError, naming the file and the tensor.
    """
    again = "the file is damaged or incomplete, fetch it again"
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            raise CheckpointError(lfs_pointer(path))
        if len(start) < 8:
            raise CheckpointError(f"'{path}' has {size} bytes, expected at least 8: {again}")
        (length,) = struct.unpack("<Q", start)
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"'{path}' announces a header of {length} bytes, expected at most "
                f"{min(size - 8, MAX_HEADER_BYTES)} in a file of {size} bytes: {again}"
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError(f"a {type(header).__name__}, not an object")
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"'{path}' has a header that is not valid ({exc}): {again}") from exc
    header.pop("__metadata__", None)
    spans = []
    infos = {}
    for name, entry in header.items():
        infos[name], span = _entry(path, file, name, entry)
        spans.append((*span, name))
    _check_tiling(path, spans, size - 8 - length, again)
    _check_with_library(path, infos, again)
    return infos


def _unique(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} occurs twice")
    return found


def _entry(path: Path, file: str, name: str, entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
    try:
        name.encode()
        code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if not all(type(count) is int and 0 <= count < 2**63 for count in (*shape, begin, end)):
            raise ValueError("a size or an offset is not a natural number")
    except (KeyError, TypeError, ValueError) as exc:
        raise CheckpointError(
            f"'{path}': the header's entry for tensor {name!r} is not valid ({type(exc).__name__}: "
            f"{exc}), expected dtype, shape and data_offsets: fetch the file again"
        ) from exc
    info = tensor_info(path, name, code, shape, file)
    if end - begin != info.num_bytes:
        raise CheckpointError(
            f"'{path}': tensor {name!r} spans {end - begin} bytes, expected {info.num_bytes} for "
            f"{info.dtype} {list(shape)}: fetch the file again"
        )
    return info, (begin, end)


def _check_tiling(path: Path, spans: list[tuple[int, int, str]], data_bytes: int, again: str) -> None:
    reached = 0
    for begin, end, name in sorted(spans):
        if begin != reached:
            what = "overlaps the tensor before it" if begin < reached else "leaves a gap before it"
            raise CheckpointError(
                f"'{path}': tensor {name!r} starts at data byte {begin}, expected {reached} (it "
                f"{what}): {again}"
            )
        reached = end
    if reached != data_bytes:
        raise CheckpointError(
            f"'{path}' holds {data_bytes} bytes of tensor data, expected {reached} by its header "
            f"({'truncated' if data_bytes < reached else 'trailing bytes'}): {again}"
        )


def _check_with_library(path: Path, infos: dict[str, TensorInfo], again: str) -> None:
    """Let safetensors refuse now what it would refuse at the first tensor, hours later."""
    from safetensors import SafetensorError, safe_open

    try:
        # "numpy", because names can be listed without importing torch
        with safe_open(path, framework="numpy", backend="pread") as file:
            names = set(file.keys())
    except SafetensorError as exc:
        raise CheckpointError(f"'{path}' is refused by safetensors ({exc}): {again}") from exc
    if names != set(infos):
        raise CheckpointError(f"'{path}' changed while it was being read: run again")


def lfs_pointer(path: Path) -> str:
    """The message for a file that Git LFS has not downloaded."""
    return (
        f"'{path}' is a Git LFS pointer, expected the file itself: run `git lfs pull` in the folder, "
        "or pass the Hub id"
    )


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """Read one tensor into memory. Raises CheckpointError if the file cannot be read or lost the tensor."""
    from safetensors import SafetensorError, safe_open

    # Open per tensor with pread. The pages of one memory map kept open would stay resident for its
    # lifetime, so that streaming a file would fill memory with it. A map per tensor would do as well, but
    # a file that shrinks meanwhile gives an error with pread and SIGBUS with a map.
    try:
        with safe_open(path, framework="pt", device="cpu", backend="pread") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError) as exc:
        raise CheckpointError(
            f"'{path}': tensor {name!r} cannot be read any more ({exc}): check the file and run again"
        ) from exc
