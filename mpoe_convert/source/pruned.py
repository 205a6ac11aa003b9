"""A mixture with fewer experts per layer: its checkpoint as if the others had never been there.

The stock model is built once more with the smaller number. What then has another shape is what counts
experts: their own stacks, the routers' rows, biases and corrections. Nothing is known of any family here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from ..errors import FamilyError
from .in_memory import InMemory
from .mixtures import NUMBERS, Located, experts_modules, size_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Cut:
    """What is left of a tensor that counts experts: these entries of one dimension, in this order."""

    dim: int
    entries: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Pruned(InMemory):
    """A mixture whose `config`, `model` and `tensors` have fewer experts.

    Attributes:
        source_mixture: with all experts.
        cuts: by the names of the tensors that are cut.
    """

    source_mixture: InMemory = field(kw_only=True, repr=False)
    cuts: Mapping[str, Cut] = field(kw_only=True, repr=False)

    @property
    def uncut(self) -> InMemory:
        return self.source_mixture

    def read(self, name: str) -> Tensor:
        """See `Checkpoint.read`."""
        import torch

        tensor, cut = self.source_mixture.read(name), self.cuts.get(name)
        return tensor if cut is None else tensor.index_select(cut.dim, torch.tensor(cut.entries))


def with_experts(checkpoint: InMemory, located: Located, kept: Mapping[str, Sequence[int]]) -> Pruned:
    """The checkpoint with some of its experts alone, from its headers.

    Args:
        located: its experts.
        kept: by the paths of all layers with experts, the numbers of those that stay, as many in each.

    Raises:
        FamilyError: transformers' code for this model does not say what the smaller number changes.
    """
    count = len(next(iter(kept.values())))
    _refuse_tables(checkpoint, located)
    config = _config_with(checkpoint, located.num_experts, count)
    changes: dict[str, Any] = {each.name: getattr(checkpoint, each.name) for each in fields(InMemory)}
    made = Pruned(**changes | {"config": config, "source_mixture": checkpoint, "cuts": {}})
    model = made.architecture.build(checkpoint.architecture.model_class)
    _check_counted(model, count)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    cuts = {
        name: _cut(checkpoint, name, shapes.get(name), located.num_experts, kept)
        for name, info in checkpoint.tensors.items()
        if shapes.get(name) != info.shape
    }
    tensors = {
        name: replace(info, shape=shapes[name]) if name in cuts else info
        for name, info in checkpoint.tensors.items()
    }
    return replace(made, model=model, tensors=tensors, cuts=cuts)


def _refuse_tables(checkpoint: InMemory, located: Located) -> None:
    """Raises FamilyError for blocks that name experts by their numbers."""
    for ffn in located.ffns:
        start = ffn.key.rpartition(".")[0] + "."
        for name, info in checkpoint.tensors.items():
            if name.startswith(start) and info.dtype.startswith(("int", "uint")) and info.shape:
                raise FamilyError(
                    f"{name} assigns experts to tokens by number, and which others would stand in for those "
                    "that go is not known: this model keeps all its experts"
                )


def _config_with(checkpoint: InMemory, before: int, count: int) -> dict:
    """config.json with another number of experts, wherever it names the number."""
    config = deepcopy(checkpoint.config)
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    named = [(part, key) for part in parts for key in NUMBERS if _counts(part.get(key), before)]
    for part, key in named:
        part[key] = [count] * len(part[key]) if isinstance(part[key], list) else count
    if not named:  # it is the default of the class
        stock = checkpoint.architecture.make_config()
        config |= {key: count for key in NUMBERS if getattr(stock, key, None) == before}
    return config


def _counts(value: object, number: int) -> bool:
    """Whether a config value is this number, or a list of it."""
    return value == number or (isinstance(value, list) and {*map(str, value)} == {str(number)})


def _check_counted(model: PreTrainedModel, count: int) -> None:
    found = {size_of(module)[0] for _, module in experts_modules(model.base_model)}
    if found != {count}:
        raise FamilyError(
            f"config.json was given {count} experts under every name that is known ({', '.join(NUMBERS)}), "
            f"and {type(model).__name__} has {sorted(found)}: this model keeps all its experts"
        )


def _cut(
    checkpoint: InMemory,
    name: str,
    small: tuple[int, ...] | None,
    before: int,
    kept: Mapping[str, Sequence[int]],
) -> Cut:
    """What is left of a tensor; what stands behind its experts (shared ones that are routed too) stays."""
    shape = checkpoint.tensors[name].shape
    layers = [path for path in kept if f".{path}." in f".{name}"]
    dims = [] if small is None or len(small) != len(shape) else _differing(shape, small)
    if len(dims) == 1 and layers:
        assert small is not None
        entries, dim = kept[max(layers, key=len)], dims[0]
        if shape[dim] - small[dim] == before - len(entries) and shape[dim] >= before:
            return Cut(dim, (*entries, *range(before, shape[dim])))
    raise FamilyError(
        f"{name} has the shape {list(shape)}, and with fewer experts "
        f"{'it is not there' if small is None else list(small)}; what stays of it is not known: this model "
        "keeps all its experts"
    )


def _differing(one: Iterable[int], other: Iterable[int]) -> list[int]:
    return [dim for dim, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
