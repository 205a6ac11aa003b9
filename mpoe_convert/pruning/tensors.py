"""The tensors of an artifact with fewer experts: those that stay are kept to the bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..artifact.block import mixture_shapes
from ..artifact.reader import Artifact
from ..artifact.weight_files import PlannedTensor
from ..source.pruned import Cut
from ..source.safetensors_file import TensorInfo
from .forms import vector_sizes

# What a router of ours may have beside the tensors of every router: one number per expert.
_BALANCE_BIAS = "balance_bias"


def planned(
    source: Artifact,
    kept: Mapping[str, Sequence[int]],
    cuts: Mapping[str, Cut],
    block: Mapping[str, Any],
) -> Iterator[PlannedTensor]:
    """All tensors of the smaller artifact, in the order of the artifact's.

    Args:
        kept: by the paths of layers, the routed experts that stay.
        cuts: by the names of tensors outside of the mixtures, what is left of them.
        block: `config.mpoe` of the smaller artifact.
    """
    own = {tensor.name: tensor for tensor in _own(source, kept, block)}
    for name, info in source.checkpoint.tensors.items():
        if name in own:
            yield own[name]
        elif name in cuts:
            yield _cut(source, info, cuts[name])
        else:
            yield PlannedTensor(name, info.shape, info.dtype, partial(source.checkpoint.read, name))


def _cut(source: Artifact, info: TensorInfo, cut: Cut) -> PlannedTensor:
    def make() -> Tensor:
        return source.checkpoint.read(info.name).index_select(cut.dim, torch.tensor(cut.entries))

    shape = (*info.shape[: cut.dim], len(cut.entries), *info.shape[cut.dim + 1 :])
    return PlannedTensor(info.name, shape, info.dtype, make)


def _own(
    source: Artifact, kept: Mapping[str, Sequence[int]], block: Mapping[str, Any]
) -> Iterator[PlannedTensor]:
    """What is left of the mixtures' tensors. Experts that every token passes, behind the others, stay."""
    where = source.checkpoint.source
    for mixture in source.mixtures:
        before = mixture_shapes(mixture.form, source.checkpoint.config["mpoe"], where)
        after = mixture_shapes(block["forms"][block["ffns"][mixture.path]], dict(block), where)
        sizes = vector_sizes(mixture.form, source.num_experts + source.shared_experts)
        stay = (*kept[mixture.path], *source.shared_range)
        for tail in (*after, _BALANCE_BIAS):
            info = source.checkpoint.tensors.get(f"{mixture.key}.{tail}")
            if info is None or (tail in after and before[tail] == after[tail]):
                continue
            if tail in sizes:
                yield _cut_vector(source, info, sizes[tail], stay, after[tail])
            else:  # of what routers hold, the shared experts have nothing
                yield _cut(source, info, Cut(0, tuple(expert for expert in stay if expert < info.shape[0])))


def _cut_vector(
    source: Artifact, info: TensorInfo, sizes: list[int], kept: Sequence[int], shape: tuple[int, ...]
) -> PlannedTensor:
    """What is left of a vector with so many numbers of every expert; a stack if those that stay are alike.

    Args:
        sizes, kept: of the mixture's experts and of those that stay, with the shared ones.
        shape: of what is left.
    """

    def make() -> Tensor:
        parts = source.checkpoint.read(info.name).split(sizes)
        return torch.cat([parts[expert] for expert in kept]).view(shape)

    return PlannedTensor(info.name, shape, info.dtype, make)
