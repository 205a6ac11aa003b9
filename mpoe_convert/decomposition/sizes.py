"""Chains of different bond dimensions around one centre: the outer cores of a small chain in larger ones.

Experts of different sizes (HMoE, arXiv 2408.10681) share the centre of one small chain. Its bonds are the
greatest common divisors of all experts' bonds: 2 for 4, 6 and 10; 1 where there is no common divisor. The
matrix is decomposed over these bonds (`common_sites`), and every expert gets the small chain's outer cores,
placed block by block in its own larger ones (`widened`), which changes no entry of the matrix. The canonical
gauge is therefore that of the common blocks; where the common bond is 1, the outer cores are diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, prod

import torch
from torch import Tensor

from .sites import Sites


def common_sites(each: Sequence[Sites]) -> Sites:
    """The sites whose outer cores fit into those of all others: every bond is the greatest common divisor.

    Args:
        each: of one matrix, in the layout `blocks` or `one_sided`, whose outer sites are as large as their
            bonds.
    """
    first = each[0]
    bonds = tuple(gcd(*numbers) for numbers in zip(*(sites.bonds for sites in each), strict=True))
    centre = first.centre
    left, right = bonds[:centre], bonds[centre:]
    in_dims = (*left, first.rows // prod(left), *(1 for _ in right))
    out_dims = (*(1 for _ in left), first.cols // prod(right), *right)
    return Sites(in_dims, out_dims, bonds, first.untied)


def widened(core: Tensor, k: int, small: Sites, large: Sites) -> Tensor:
    """The outer core k of a chain over `small` sites as one over `large` sites: the same chain.

    Args:
        core: (P * l, i, o, r) with P as `Sites.copies` counts.
        small: what `common_sites` gives for several, of which `large` is one.
    """
    carries_inputs = k < small.centre
    bond = k if carries_inputs else k - 1
    size, many = small.bonds[bond], large.bonds[bond] // small.bonds[bond]
    if many == 1:
        return core
    blocks = core.reshape(-1, size, size)  # (P, b, b)
    if len(blocks) == 1:
        unit = torch.eye(many, dtype=core.dtype, device=core.device)
        made = (torch.kron(blocks[0], unit) if carries_inputs else torch.kron(unit, blocks[0]))[None]
    else:
        made = _strided(blocks, many) if carries_inputs else _side_by_side(blocks, many)
    bond_left, in_dim, out_dim, bond_right = large.core_shapes[k]
    return made.reshape(len(made) * bond_left, in_dim, out_dim, bond_right)


def _strided(blocks: Tensor, many: int) -> Tensor:
    """(P, b, b) -> (P / m, b m, b m): block p has every P-th feature, from p on."""
    number, size, _ = blocks.shape
    made = blocks.new_zeros(number // many, size, many, size, many)
    for n, part in enumerate(blocks.unflatten(0, (many, -1))):  # (P / m, b, b)
        made[:, :, n, :, n] = part
    return made.flatten(3, 4).flatten(1, 2)


def _side_by_side(blocks: Tensor, many: int) -> Tensor:
    """(P, b, b) -> (P / m, m b, m b): block p has the features from p b on."""
    number, size, _ = blocks.shape
    made = blocks.new_zeros(number // many, many, size, many, size)
    for n in range(many):
        made[:, n, :, n, :] = blocks[n::many]
    return made.flatten(3, 4).flatten(1, 2)
