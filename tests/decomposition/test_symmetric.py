"""Symmetric matrices in rows of blocks, against the full matrices."""

import pytest
import torch

from mpoe_convert.decomposition.stack_metric import quadratic, symmetric_product
from mpoe_convert.decomposition.symmetric import (
    BLOCK,
    add_gram,
    diagonal,
    packed_length,
    packed_size,
    unpacked,
)


@pytest.mark.parametrize("size", [1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
def test_sums_are_those_of_the_full_matrices(size):
    generator = torch.Generator().manual_seed(0)
    packed = torch.zeros(packed_length(size), dtype=torch.float64)
    expected = torch.zeros(size, size, dtype=torch.float64)
    for count in (1, 3, 40):
        rows = torch.randn(count, size, generator=generator, dtype=torch.float64)
        add_gram(packed, rows)
        expected += rows.mT @ rows
    torch.testing.assert_close(unpacked(packed), expected)
    torch.testing.assert_close(diagonal(packed), expected.diagonal())
    assert packed_size(len(packed)) == size


@pytest.mark.parametrize("size", [1, BLOCK, 2 * BLOCK + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_half_the_products_give_what_all_do(size, dtype):
    generator = torch.Generator().manual_seed(0)
    half, matrix = (torch.randn(size, cols, generator=generator, dtype=dtype) for cols in (size, 9))
    moment = half @ half.mT / size
    image = moment.double() @ matrix.double()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert quadratic(moment, matrix) == pytest.approx(float((matrix * image).sum()), rel=tolerance)
    left = torch.randn(30, size, generator=generator, dtype=dtype)
    metric = torch.randn(30, 30, generator=generator, dtype=dtype)
    found = symmetric_product(left, (metric + metric.mT) @ left)
    expected = left.double().mT @ (metric + metric.mT).double() @ left.double()
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_large_matrices_take_little_more_than_half():
    assert packed_length(2048) == 2048 * (2048 + BLOCK) // 2


def test_a_length_that_no_matrix_has():
    with pytest.raises(ValueError, match="^2 numbers are no symmetric matrix"):
        packed_size(2)


def test_a_length_belongs_to_one_size():
    lengths = [packed_length(size) for size in range(1, 4 * BLOCK)]
    assert sorted({*lengths}) == lengths
