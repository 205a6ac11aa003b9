"""A checkpoint under the model's names of tensors, each made as transformers makes it on loading.

Checkpoints of mixtures hold a matrix per expert (`block_sparse_moe.experts.3.w1.weight`) where the model has
one tensor for all experts of a layer; others hold them fused in another way. transformers' table of
conversions says how each is made, and its own code makes it: one tensor of the model at a time.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from functools import reduce
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, few, one_line
from .checkpoint import Checkpoint
from .safetensors_file import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Group:
    """What one tensor of the model, or several, are made of.

    Attributes:
        target: the tensor's name in the model; of several the first.
        names: (name on disk, pattern of the conversion that it matched), in transformers' order of loading.
        conversion: transformers' own; None: the tensor on disk is that of the model.
    """

    target: str
    names: tuple[tuple[str, str], ...]
    conversion: Any = field(default=None, repr=False)

    def made_of(self, tensors: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
        """{name in the model: tensor}, of the tensors on disk."""
        if self.conversion is None:
            return {self.target: tensors[self.names[0][0]]}
        conversion = deepcopy(self.conversion)
        for name, pattern in self.names:
            conversion.add_tensor(self.target, name, pattern, tensors[name])
        return conversion.convert(self.target, model=model, config=model.config)


@dataclass(frozen=True, eq=False)
class InMemory(Checkpoint):
    """A checkpoint whose `tensors` have the names and shapes of the model's; `read` makes them.

    Attributes:
        disk: the checkpoint as it is stored.
        model: the stock model, on the meta device.
        groups: name in the model -> what it is made of.
        stacks: name of one tensor for all experts of a list -> names in the model of theirs.
    """

    disk: Checkpoint = field(kw_only=True)
    model: PreTrainedModel = field(kw_only=True, repr=False)
    groups: dict[str, Group] = field(kw_only=True, repr=False)
    stacks: dict[str, tuple[str, ...]] = field(default_factory=dict, kw_only=True, repr=False)
    _made: dict[str, Tensor] = field(default_factory=dict, kw_only=True, repr=False)

    @property
    def uncut(self) -> InMemory:
        """The checkpoint with all its experts."""
        return self

    @property
    def stored_files(self) -> list[str]:
        """Also those that hold only a part of a tensor."""
        return self.disk.stored_files

    def read(self, name: str) -> Tensor:
        """See `Checkpoint.read`. What else a conversion makes is kept until it is asked for.

        Raises:
            CheckpointError: also if a tensor that it is made of holds NaN or Inf.
        """
        import torch

        from ..tensors import check_finite

        if name in self.stacks:
            tensors = {each: self.read(each) for each in self.stacks[name]}
            for each, tensor in tensors.items():
                check_finite(tensor, self.name_on_disk(each))
            return torch.stack([*tensors.values()])
        if name not in self.groups:
            return self.disk.read(name)  # which raises
        if name in self._made:
            return self._made.pop(name)
        group, tensors = self.groups[name], {}
        for stored, _ in group.names:
            tensors[stored] = self.disk.read(stored)
            if group.conversion is None or not tensors[stored].is_floating_point():
                continue
            if tensors[stored].ndim == 3 and ".experts." in name:
                for expert, own in enumerate(tensors[stored]):
                    check_finite(own, f"{stored} (expert {expert})")
            else:
                check_finite(tensors[stored], stored)
        self._made.clear()
        self._made.update(group.made_of(tensors, self.model))
        return self._made.pop(name)

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor that `read` gives."""
        if name not in self.stacks:
            return self.tensors[name]
        own = self.tensors[self.stacks[name][0]]
        return replace(own, name=name, shape=(len(self.stacks[name]), *own.shape))

    def name_on_disk(self, name: str) -> str:
        """The tensor on disk that one of the model is, or its own name if it is made of several."""
        if name in self.stacks:
            return name
        stored = self.groups[name].names
        return stored[0][0] if len(stored) == 1 else name


def in_memory(checkpoint: Checkpoint) -> InMemory:
    """The checkpoint under the model's names, from its headers.

    Raises:
        CheckpointError: a conversion lacks a tensor (an expert's, for one), or its tensors do not fit
            together.
        FamilyError: as `Architecture.build`.
    """
    model = checkpoint.architecture.build(checkpoint.architecture.model_class)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    groups, unread = _groups(checkpoint, model, shapes)
    tensors: dict[str, TensorInfo] = {}
    made_by: dict[str, Group] = {}
    for group in groups:
        first, dtype = checkpoint.tensors[group.names[0][0]], _widest(checkpoint, group)
        for name, shape in _shapes_of(checkpoint, group, model, shapes).items():
            tensors[name] = TensorInfo(name, dtype, shape, first.file)
            made_by[name] = group
    renamed = {group.names[0][0]: group.target for group in groups if group.conversion is None}
    shared = {
        renamed[name]: renamed[first]
        for name, first in checkpoint.shared_storage.items()
        if name in renamed and first in renamed
    }
    notes = checkpoint.notes
    if unread:
        notes = (*notes, f"{type(model).__name__} has no place for {few(unread)}: left out.")
    as_stored = {each.name: getattr(checkpoint, each.name) for each in fields(Checkpoint)}
    changes = {"tensors": tensors, "shared_storage": shared, "notes": notes, "stored_names": {}}
    return InMemory(**as_stored | changes, disk=checkpoint, model=model, groups=made_by)


def _groups(
    checkpoint: Checkpoint, model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[list[Group], list[str]]:
    """What the model's tensors are made of, and the names of tensors on disk that it does not have."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    of_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, Group] = {}
    unread = []
    for name in sorted(checkpoint.tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in shapes and name in shapes:
            target, pattern = name, None
        if target not in shapes:
            unread.append(name)
        elif pattern is None:
            found[target] = Group(target, ((name, ""),))
        else:
            before = found.get(target) or Group(target, (), of_pattern[pattern])
            found[target] = replace(before, names=(*before.names, (name, pattern)))
    return list(found.values()), unread


def _shapes_of(
    checkpoint: Checkpoint, group: Group, model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """{name in the model: shape} of what a group makes.

    Raises:
        CheckpointError: a tensor is missing, or they do not fit together.
    """
    import torch

    if group.conversion is None:
        return {group.target: checkpoint.tensors[group.names[0][0]].shape}
    _check_experts(checkpoint, group, shapes[group.target])
    tensors = {
        name: torch.empty(
            checkpoint.tensors[name].shape,
            dtype=getattr(torch, checkpoint.tensors[name].dtype),
            device="meta",
        )
        for name, _ in group.names
    }
    try:
        made = group.made_of(tensors, model)
    except Exception as error:  # transformers' operations may raise anything
        raise CheckpointError(
            f"'{checkpoint.source}': transformers cannot make {group.target} of "
            f"{few([name for name, _ in group.names])} ({one_line(error)}); fetch the checkpoint again"
        ) from error
    return {name: tuple(tensor.shape) for name, tensor in made.items()}


def _widest(checkpoint: Checkpoint, group: Group) -> str:
    """The dtype that holds the numbers of all tensors of a group."""
    found = {checkpoint.tensors[name].dtype for name, _ in group.names}
    if len(found) == 1:
        return found.pop()
    import torch

    widest = reduce(torch.promote_types, (getattr(torch, each) for each in found))
    return str(widest).removeprefix("torch.")


def _check_experts(checkpoint: Checkpoint, group: Group, shape: tuple[int, ...]) -> None:
    """Check that there is a tensor of one shape for every expert of every projection.

    Raises:
        CheckpointError: names the first that is missing, or that has another shape.
    """
    if not any(type(each).__name__ == "MergeModulelist" for each in group.conversion.operations):
        return
    by_pattern: dict[str, list[str]] = {pattern: [] for pattern in group.conversion.source_patterns}
    for name, pattern in group.names:
        by_pattern[pattern].append(name)
    present = {pattern: names for pattern, names in by_pattern.items() if names}
    fullest = max(present.values(), key=len)
    if len(fullest) == 1:  # one tensor for all experts
        return
    for pattern, names in by_pattern.items():
        if not names:
            raise CheckpointError(
                f"'{checkpoint.source}': tensors such as {pattern.rstrip('$')} are missing, while "
                f"{fullest[0]} is there; fetch the checkpoint again"
            )
        for expert, name in _experts_of(names, shape[0]):
            if name not in names:
                raise CheckpointError(
                    f"'{checkpoint.source}' lacks {name}, the matrix of expert {expert} of {shape[0]}; fetch "
                    "the checkpoint again"
                )
        usual = Counter(checkpoint.tensors[name].shape for name in names).most_common(1)[0][0]
        for name in names:
            if (found := checkpoint.tensors[name].shape) != usual:
                raise CheckpointError(
                    f"'{checkpoint.source}': {name} has the shape {list(found)}, those of the other experts "
                    f"{list(usual)}; expected experts of one shape"
                )


def _experts_of(names: Iterable[str], count: int) -> Iterator[tuple[int, str]]:
    """(number, name) of every expert that there should be, after the names of those that are there."""
    parts = [re.split(r"(\d+)", name) for name in names]
    varying = [at for at in range(1, len(parts[0]), 2) if len({each[at] for each in parts}) > 1]
    if len(varying) == 1:
        first, at = parts[0], varying[0]
        for expert in range(max(count, 1 + max(int(each[at]) for each in parts))):
            yield expert, "".join([*first[:at], str(expert), *first[at + 1 :]])
