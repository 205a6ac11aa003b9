"""Weight files: distribute tensors over shards, write a shard, write the index."""

from __future__ import annotations

import json
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..allocator import keeping_freed_memory
from ..source.safetensors_file import CODE2DTYPE, DTYPE2BYTES
from ..source.state_dict import is_buffer

if TYPE_CHECKING:
    from io import FileIO

    from torch import Tensor


INDEX_FILE = "model.safetensors.index.json"
# So many bytes of tensors may wait to be written while another one is made: those of an FFN or two.
IN_FLIGHT = 1 << 27
# The order of dtypes in a file, so that every tensor is aligned.
LARGEST_FIRST = (
    *("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
)


class TensorSpec(Protocol):
    """Name, shape and dtype (torch's name) of a tensor that is not made yet."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...


@dataclass(frozen=True)
class Spec:
    """A `TensorSpec` of its own."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that will be written; `make` reads its sources and computes it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    make: Callable[[], Tensor] = field(repr=False)


def split_into_shards(tensors: Iterable[TensorSpec], shard_bytes: int) -> dict[str, tuple[str, ...]]:
    """File name -> tensor names, as huggingface_hub would shard these tensors.

    Args:
        tensors: in the order in which they are written.
        shard_bytes: largest size of a file; one larger tensor is alone in its file.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        {tensor.name: tensor for tensor in tensors},
        get_storage_size=num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    return {file: tuple(names) for file, names in split.filename_to_tensors.items()}


def num_bytes(tensor: TensorSpec) -> int:
    """Size of the tensor's data in bytes."""
    return prod(tensor.shape) * DTYPE2BYTES[tensor.dtype]


def save_shard(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write one safetensors file, as `stream_shard` does, of tensors that are all there."""
    specs = [Spec(name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()]
    stream_shard(specs, tensors.items(), path)


def stream_shard(specs: Iterable[TensorSpec], tensors: Iterable[tuple[str, Tensor]], path: Path) -> None:
    """Write one safetensors file, each tensor while the next ones are made.

    The file is that of `safetensors.torch.save_file`, to the byte.

    Args:
        specs: what the file will hold.
        tensors: (name, tensor) in any order, contiguous and on the CPU; at most `IN_FLIGHT` bytes of those
            that are made wait to be written while another one is asked for.
        path: of the file; removed again if it cannot be finished.

    Raises:
        CheckpointError: a weight holds NaN or infinities; masks and tables may.
        OSError: it cannot be written, for example on a full disk.
    """
    from concurrent.futures import Future, ThreadPoolExecutor

    header, places = _layout(specs)
    waiting: deque[tuple[Future[None], int]] = deque()
    try:
        with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as pool:
            _write_all(file, header)
            for name, tensor in tensors:
                _check_weight(name, tensor)
                _check_place(name, tensor, places)
                begin, _ = places.pop(name)
                waiting.append((pool.submit(_write_at, file, tensor, begin), tensor.nbytes))
                del tensor
                while sum(size for _, size in waiting) > IN_FLIGHT:
                    waiting.popleft()[0].result()
            for future, _ in waiting:
                future.result()
        assert not places, f"tensors that were never made: {sorted(places)}"
    except BaseException:  # an interrupt too leaves no half of a file
        path.unlink(missing_ok=True)
        raise


def _check_weight(name: str, tensor: Tensor) -> None:
    """Raises CheckpointError if a weight holds NaN or infinities."""
    from ..tensors import check_finite

    if tensor.is_floating_point() and not is_buffer(name):
        check_finite(tensor, name)


def _check_place(name: str, tensor: Tensor, places: Mapping[str, tuple[int, int]]) -> None:
    begin, end = places[name]
    assert tensor.nbytes == end - begin and tensor.is_contiguous() and tensor.device.type == "cpu", name


def _layout(specs: Iterable[TensorSpec]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """What stands before the data, and where in the file every tensor begins and ends.

    The format: 8 bytes little-endian header length, that many bytes of JSON, padded to a multiple of 8, and
    the data, which the offsets tile. As safetensors orders them: by dtype, then by name.
    """
    codes = {dtype: code for code, (dtype, _) in CODE2DTYPE.items()}
    order = {code: number for number, code in enumerate(LARGEST_FIRST)}
    ordered = sorted(specs, key=lambda spec: (order[codes[spec.dtype]], spec.name.encode()))
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    reached = 0
    for spec in ordered:
        offsets = [reached, reached := reached + num_bytes(spec)]
        entries[spec.name] = {
            "dtype": codes[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": offsets,
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    offsets = ((name, entry["data_offsets"]) for name, entry in entries.items() if name != "__metadata__")
    return header, {name: (len(header) + begin, len(header) + end) for name, (begin, end) in offsets}


def _write_at(file: FileIO, tensor: Tensor, begin: int) -> None:
    """Write a tensor's bytes from a place in the file on. Raises OSError."""
    import torch

    if not tensor.numel():
        return
    data: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    file.seek(begin)
    _write_all(file, data)


def _write_all(file: FileIO, data: Any) -> None:
    """Write all bytes; the operating system may take some of them at a time."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def write_planned(
    folder: Path,
    shards: Mapping[str, Iterable[str]],
    tensors: Iterable[PlannedTensor],
    made: Callable[[PlannedTensor], object],
) -> None:
    """Make and write tensors, each while the next ones are made.

    Args:
        folder: of the files.
        shards: file name -> names of its tensors; of several files there is an index, too.
        tensors: all of them.
        made: called with each when it has been made.
    """
    by_name = {tensor.name: tensor for tensor in tensors}

    def making(specs: Iterable[PlannedTensor]) -> Iterator[tuple[str, Tensor]]:
        for spec in specs:
            yield spec.name, _make(spec)
            made(spec)

    with keeping_freed_memory():
        for file, names in shards.items():
            specs = [by_name[name] for name in names]
            stream_shard(specs, making(specs), folder / file)
    if len(shards) > 1:
        write_index(folder, shards, sum(map(num_bytes, by_name.values())))


def _make(spec: PlannedTensor) -> Tensor:
    tensor = spec.make()
    found = (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    assert found == (spec.shape, spec.dtype), (spec.name, found)
    return tensor


def write_index(folder: Path, shards: Mapping[str, Iterable[str]], total_bytes: int) -> None:
    """Write the index that names the file of every tensor; needed where there are several files.

    Args:
        folder: the artifact's.
        shards: file name -> names of its tensors.
        total_bytes: of all tensors.
    """
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
    (folder / INDEX_FILE).write_text(text, encoding="utf-8")
