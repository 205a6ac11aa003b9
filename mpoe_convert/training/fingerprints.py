"""Hashes of what a run reads, by which it is known again: a model's weights and the examples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pyarrow
import torch

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def hash_of_model(model: nn.Module) -> str:
    """SHA-256 of the names, dtypes, shapes and checksums of a model's tensors.

    A checksum is the sum of a tensor's bits as integers: exact in any order, and as fast as memory is read.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {_checksum(tensor)}\n".encode())
    return digest.hexdigest()


def _checksum(tensor: Tensor) -> int:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return int(tensor.detach().contiguous().view(WORDS[tensor.element_size()]).sum(dtype=torch.int64))


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
    if pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type):
        yield from (chunk.value_lengths() for chunk in column.chunks)
        yield from (chunk.flatten() for chunk in column.chunks)
    else:
        yield from column.chunks
