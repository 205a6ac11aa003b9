"""What of large matrices the drift of clones is measured on."""

import pytest
import torch

from mpoe_convert.conversion.build import _sample


def chain(rows: int, cols: int) -> list[torch.Tensor]:
    return [torch.empty(1, rows, 1, 2, device="meta"), torch.empty(2, 1, cols, 1, device="meta")]


@pytest.mark.parametrize(
    ("rows", "last", "left"),
    [
        (4096, [4096], (128, 4096)),
        (256, [131_072], (256, 1024)),  # of the longer side
        (256, [131_072, 65_536], (32, 131_072)),  # columns that differ: an eighth of the rows, not fewer
        (64, [64], (8, 64)),
    ],
)
def test_rows_or_columns_that_are_left(rows, last, left):
    chains = [chain(rows, cols) for cols in last]
    first, second = _sample(chains, rows * last[0])(chains[0])
    assert (first.shape[1], second.shape[2]) == left
