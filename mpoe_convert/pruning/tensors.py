"""The tensors of an artifact with fewer experts: those that stay are kept to the bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ..artifact.reader import Artifact, Mixture
from ..artifact.weight_files import PlannedTensor
from ..runtime.shapes import modeling
from ..source.pruned import Cut

# What a router of ours may have beside the tensors of every router: one number per expert.
_BALANCE_BIAS = "balance_bias"


def planned(
    source: Artifact, kept: Mapping[str, Sequence[int]], cuts: Mapping[str, Cut]
) -> Iterator[PlannedTensor]:
    """All tensors of the smaller artifact, in the order of the artifact's.

    Args:
        kept: by the paths of layers, the experts that stay.
        cuts: by the names of tensors outside of the mixtures, what is left of them.
    """
    cuts = {**cuts, **dict(_own_cuts(source, kept))}
    for name, info in source.checkpoint.tensors.items():
        if (cut := cuts.get(name)) is None:
            yield PlannedTensor(name, info.shape, info.dtype, partial(source.checkpoint.read, name))
        else:
            shape = (*info.shape[: cut.dim], len(cut.entries), *info.shape[cut.dim + 1 :])
            yield PlannedTensor(name, shape, info.dtype, partial(_cut, source, name, cut))


def _cut(source: Artifact, name: str, cut: Cut) -> Tensor:
    return source.checkpoint.read(name).index_select(cut.dim, torch.tensor(cut.entries))


def _own_cuts(source: Artifact, kept: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, Cut]]:
    """What is left of the mixtures' tensors. Experts that every token passes, behind the others, stay."""
    for mixture in source.mixtures:
        for name in _counting(source, mixture):
            info = source.checkpoint.tensors.get(f"{mixture.key}.{name}")
            if info is not None:
                always = range(source.num_experts, info.shape[0])
                yield info.name, Cut(0, (*kept[mixture.path], *always))


def _counting(source: Artifact, mixture: Mixture) -> set[str]:
    """The names in a mixture of the tensors whose first axis counts experts."""
    here, more = (_shapes(source, mixture, source.num_experts + extra) for extra in (0, source.parts))
    return {name for name in here if here[name] != more[name]} | {_BALANCE_BIAS}


def _shapes(source: Artifact, mixture: Mixture, num_experts: int) -> dict[str, tuple[int, ...]]:
    """Name in a mixture -> shape, with so many experts."""
    runtime = modeling()
    if source.keeps_routers:
        module = runtime.Experts(mixture.form, num_experts, source.top_k)
    else:
        block = source.checkpoint.config["mpoe"] | {"num_experts": num_experts}
        module = runtime.FeedForward.from_block(mixture.form, block)
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
