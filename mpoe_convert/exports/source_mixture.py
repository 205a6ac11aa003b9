"""An artifact made of a mixture, back in its source's architecture, under the names of its checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from .targets import Checked, ExportPlan, Part, PlannedTensor
from .targets.dense import read_bias, usage

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from ..artifact.reader import Artifact, Mixture
    from ..source.ffn import Source


def plan_source(source: Artifact) -> ExportPlan:
    """The plan of such an export; it holds whole matrices.

    Raises:
        FamilyError: transformers does not build the source's model any more.
    """
    tensors = tuple(_Tensors(source).planned())
    about = (
        f"The experts' matrices were contracted from their cores: this is a {source.model_type} again, "
        f"of the stock "
        "classes of transformers, with the routers of the model."
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
        self.made: dict[str, Tensor] = {}

    def planned(self) -> Iterator[PlannedTensor]:
        """In the order of the artifact's layers."""
        import torch

        for names in self._layers().values():
            empty = {
                name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in names.items()
            }
            for name, tensor in self._on_disk(empty).items():
                dtype = str(tensor.dtype).removeprefix("torch.")
                yield PlannedTensor(name, tuple(tensor.shape), dtype, partial(self._make, name, names))

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
                    for each, roles in self._stacks(mixture).items()
                }
            layer = re.match(r".*?\.\d+\.", name)
            found.setdefault(layer[0] if layer else name, {}).update(values)
        return found

    def _dtype(self, mixture: Mixture, roles: dict[str, Source]) -> torch.dtype:
        """Of what holds the matrices of these roles."""
        import torch

        return getattr(torch, self.source.dtype(mixture, next(iter(roles))))

    def _stacks(self, mixture: Mixture) -> dict[str, dict[str, Source]]:
        """Name in the stock model -> {role: which part of it}, of a layer's experts."""
        from ..source.mixtures import sources_of

        path = f"{mixture.layer}.experts"
        found: dict[str, dict[str, Source]] = {}
        for role, source in sources_of(self.model.get_submodule(path), f"{path}.").items():
            found.setdefault(source.weight, {})[role] = source
            if source.bias:
                found.setdefault(source.bias, {})[role] = source
        return found

    def _read(self, name: str) -> Tensor:
        """A tensor of the stock model; of experts, contracted from their cores."""
        import torch

        from ..source.mixtures import biases_of, matrices_of

        if name in self.source.checkpoint.tensors:
            return self.source.checkpoint.read(name)
        mixture = next(each for each in self.source.mixtures if name.startswith(f"{each.layer}.experts."))
        roles = self._stacks(mixture)[name]
        tensor = torch.empty(self.model.state_dict()[name].shape, dtype=self._dtype(mixture, roles))
        for role, source in roles.items():
            part = (biases_of if name == source.bias else matrices_of)(tensor, source)
            for expert in range(self.source.num_experts):
                if name == source.bias:
                    part[expert] = read_bias(self.source, mixture, role, {expert: 1.0})
                else:
                    part[expert] = self.source.matrix(mixture, role, {expert: 1.0})
        return tensor
