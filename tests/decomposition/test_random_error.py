"""The error that shapes foretell, against that of random matrices as they are decomposed."""

import math

import pytest
import torch

from mpoe_convert.decomposition.mpo import fit
from mpoe_convert.decomposition.random_error import random_error
from mpoe_convert.decomposition.sites import balanced, one_sided


@pytest.mark.parametrize(
    ("rows", "cols", "bonds", "num_sites"),
    [
        (128, 512, 64, 5),
        (128, 512, 8, 5),
        (512, 128, 32, 5),
        (64, 256, 16, 5),
        (192, 768, (12, 30, 64, 10), 5),
        (32, 128, 10, 3),
        (128, 512, 64, 7),
        (16, 64, 6, 3),
    ],
)
def test_a_random_matrix_loses_what_is_foretold(rows, cols, bonds, num_sites):
    sites = balanced(rows, cols, bonds, num_sites)
    matrix = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))
    actual = math.sqrt(sum(fit(matrix, sites, svd="exact").discarded)) / matrix.norm().item()
    assert actual > 0.2 and abs(random_error(sites) - actual) < 0.02


def test_full_bonds_lose_nothing():
    assert random_error(one_sided(128, 512, 16, 3)) == 0.0
    assert random_error(balanced(128, 512, 4096, 5)) == 0.0
