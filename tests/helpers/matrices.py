"""Matrices and inputs of unequal scale."""

import torch

TOKENS = 200


def problem(rows, cols, seed=0, directions=None, dtype=torch.float64):
    """A matrix and inputs (TOKENS, rows) of very unequal scale, in a subspace if `directions` is given."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator, dtype=dtype)
    mixing = torch.randn(directions or rows, rows, generator=generator, dtype=dtype)
    inputs = torch.randn(TOKENS, directions or rows, generator=generator, dtype=dtype)
    return weight, (inputs * torch.logspace(0, -2, directions or rows, dtype=dtype)) @ mixing
