"""An artifact made of a mixture, back in its source's architecture, under the names of its checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from ..source.torch_file import dtype_name
from .targets import Checked, ExportPlan, Part, PlannedTensor
from .targets.dense import read_bias, usage

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from ..artifact.reader import Artifact, Mixture
    from ..source.ffn import Source
    from ..source.mixtures import MixtureFamily


def plan_source(source: Artifact) -> ExportPlan:
    """The plan of such an export; it holds whole matrices.

    Raises:
        FamilyError: transformers does not build the source's model any more.
    """
    tensors = tuple(_Tensors(source).planned())
    is_custom = source.architecture.is_custom
    classes = "the code that lies beside it" if is_custom else "the stock classes of transformers"
    about = (
        f"The experts' matrices were contracted from their cores: this is a {source.model_type} again, of "
        f"{classes}, with the routers of the model."
    )
    return ExportPlan(
        parts=(Part("", {"config.json": source.config}, tensors),),
        model_type=source.model_type,
        title=f"as a {source.model_type}",
        about=about,
        usage=usage(source),
        checked=Checked(),
    )


class _Tensors:
    """The tensors of the source's checkpoint, made of the artifact's: one layer in memory at a time."""

    def __init__(self, source: Artifact) -> None:
        self.source = source
        self.model: PreTrainedModel = source.architecture.build(source.architecture.model_class)
        self.family = self._family()
        self.made: dict[str, Tensor] = {}

    def _family(self) -> MixtureFamily:
        """Of the artifact; how its experts were held, where they were named by hand."""
        from ..source.mixtures import MixtureFamily, family_by_hand

        family = self.source.family
        assert isinstance(family, MixtureFamily), "of a mixture"
        if family.by_hand is None:
            return family
        return family_by_hand(self.model.base_model, self.source.model_type, family.by_hand)[0]

    def planned(self) -> Iterator[PlannedTensor]:
        """In the order of the artifact's layers."""
        import torch

        for names in self._layers().values():
            empty = {
                name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in names.items()
            }
            for name, tensor in self._on_disk(empty).items():
                make = partial(self._make, name, names)
                yield PlannedTensor(name, tuple(tensor.shape), dtype_name(tensor), make)

    def _make(self, name: str, names: Mapping[str, tuple]) -> Tensor:
        if name not in self.made:
            self.made = self._on_disk({each: self._read(each) for each in names})
        return self.made.pop(name).contiguous()

    def _on_disk(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `save_pretrained` of the stock model writes them."""
        from transformers.core_model_loading import revert_weight_conversion

        return revert_weight_conversion(self.model, tensors)

    def _layers(self) -> dict[str, dict[str, tuple]]:
        """Layer -> {name in the stock model: (shape, dtype)}; what is in no layer is one by itself."""
        import torch

        found: dict[str, dict[str, tuple]] = {}
        state = self.model.state_dict()
        for name, info in self.source.checkpoint.tensors.items():
            mixture = self.source.owner(name)
            if mixture is None:
                values = {name: (info.shape, getattr(torch, info.dtype))}
            else:
                values = {
                    each: (tuple(state[each].shape), self._dtype(mixture, roles))
                    for each, (_, roles) in self._held(mixture).items()
                }
            layer = re.match(r".*?\.\d+\.", name)
            found.setdefault(layer[0] if layer else name, {}).update(values)
        return found

    def _dtype(self, mixture: Mixture, roles: Mapping[str, Source]) -> torch.dtype:
        """Of what holds the matrices of these roles."""
        import torch

        return getattr(torch, self.source.dtype(mixture, next(iter(roles))))

    def _held(self, mixture: Mixture) -> dict[str, tuple[Sequence[int], dict[str, Source]]]:
        """Name in the stock model -> the experts that are in it, {role: which part of it}."""
        from ..source.expert_layout import Layout
        from ..source.mixtures import sources_of

        path, layout, experts = self._path(mixture), self.family.layout, range(self.source.num_experts)
        if layout is None:
            layout = Layout(sources_of(self.model.get_submodule(path), ""), None)
        places: dict[str, Sequence[int]] = {path: experts}
        if layout.listed:
            places = {f"{path}.{expert}": [expert] for expert in experts}
        found: dict[str, tuple[Sequence[int], dict[str, Source]]] = {}
        for place, held in places.items():
            for role, source in layout.sources(f"{place}.").items():
                for name in filter(None, (source.weight, source.bias)):
                    found.setdefault(name, (held, {}))[1][role] = source
        return found

    def _path(self, mixture: Mixture) -> str:
        """Of the experts in the stock model."""
        return f"{mixture.layer}.{self.family.experts}"

    def _read(self, name: str) -> Tensor:
        """A tensor of the stock model; of experts, contracted from their cores."""
        import torch

        from ..source.expert_layout import biases_of, matrices_of

        if name in self.source.checkpoint.tensors:
            return self.source.checkpoint.read(name)
        mixture = next(each for each in self.source.mixtures if name.startswith(f"{self._path(each)}."))
        experts, roles = self._held(mixture)[name]
        tensor = torch.empty(self.model.state_dict()[name].shape, dtype=self._dtype(mixture, roles))
        is_listed = self.family.layout is not None and self.family.layout.listed
        stack = tensor.unsqueeze(0) if is_listed else tensor
        for role, source in roles.items():
            part = (biases_of if name == source.bias else matrices_of)(stack, source)
            for place, expert in enumerate(experts):
                if name == source.bias:
                    part[place] = read_bias(self.source, mixture, role, {expert: 1.0})
                else:
                    part[place] = self.source.matrix(mixture, role, {expert: 1.0})
        return tensor
