"""Weight files: distribute tensors over shards, write a shard, write the index."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..source.safetensors_file import DTYPE2BYTES
from ..source.state_dict import is_buffer

if TYPE_CHECKING:
    from torch import Tensor


INDEX_FILE = "model.safetensors.index.json"


class TensorSpec(Protocol):
    """Name, shape and dtype (torch's name) of a tensor that is not made yet."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...


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


def save_shard(tensors: dict[str, Tensor], path: Path) -> None:
    """Write one safetensors file.

    Raises:
        CheckpointError: a weight holds NaN or infinities; masks and tables may.
        OSError: it cannot be written, for example on a full disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from ..tensors import check_finite

    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not is_buffer(name):
            check_finite(tensor, name)
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        if "os error 28" in str(error).lower() or "no space" in str(error).lower():
            raise OSError(28, "No space left on device") from error
        raise OSError(5, f"safetensors: {error}") from error


def write_planned(
    folder: Path, shards: Mapping[str, Iterable[str]], tensors: Iterable[PlannedTensor]
) -> Iterator[PlannedTensor]:
    """Make and write tensors, one file in memory at a time; yields each when it has been made.

    Args:
        folder: of the files.
        shards: file name -> names of its tensors; of several files there is an index, too.
        tensors: all of them.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    for file, names in shards.items():
        made = {}
        for name in names:
            made[name] = by_name[name].make()
            found = (tuple(made[name].shape), str(made[name].dtype).removeprefix("torch."))
            assert found == (by_name[name].shape, by_name[name].dtype), (name, found)
            yield by_name[name]
        save_shard(made, folder / file)
        del made
    if len(shards) > 1:
        write_index(folder, shards, sum(map(num_bytes, by_name.values())))


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
