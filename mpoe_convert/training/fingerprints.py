"""Hashes of what a run reads, by which it is known again: a model's weights and the examples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset
    from torch import Tensor, nn

_PIECE = 2**16  # integers that are summed at once, so that they stay in a processor's cache
_BETWEEN = 6364136223846793005  # any odd number with bits everywhere


def hash_of_model(model: nn.Module) -> str:
    """SHA-256 of the names, dtypes, shapes and checksums of a model's tensors.

    A checksum depends on the order of the values and is exact in any order of summation.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {_checksum(tensor)}\n".encode())
    return digest.hexdigest()


def _checksum(tensor: Tensor) -> int:
    """A sum of a tensor's bytes, taken as integers of 64 bits, modulo 2**64, each times a number of its own.

    The numbers are odd, so that no bit is lost: 1, 3, 5, ... inside a piece, powers of one between pieces.
    """
    found = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if found.storage_offset() % 8:  # no place for such integers
        found = found.clone()
    end = len(found) // 8 * 8
    odd = torch.arange(1, 2 * _PIECE, 2, device=found.device)
    total = 0
    for piece in (*found[:end].view(torch.int64).split(_PIECE), found[end:]):
        total = (total * _BETWEEN + int((piece * odd[: len(piece)]).sum())) % 2**64
    return total


def hash_of_examples(examples: Dataset) -> str:
    """SHA-256 of all tokens, labels and tasks, in order; independent of how the rows are cached."""
    rows = examples.flatten_indices() if examples._indices is not None else examples
    digest = hashlib.sha256()
    for name in sorted(rows.column_names):
        digest.update(f"{name}\n".encode())
        for numbers in _numbers(rows.data.column(name)):
            digest.update(numbers.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def _numbers(column: pyarrow.ChunkedArray) -> Iterator[pyarrow.Array]:
    """The numbers of a column in order; of lists their lengths before."""
    import pyarrow

    if pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type):
        yield from (chunk.value_lengths() for chunk in column.chunks)
        yield from (chunk.flatten() for chunk in column.chunks)
    else:
        yield from column.chunks
