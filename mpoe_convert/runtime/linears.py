"""Linear layers: large cores as the modules that libraries round.

bitsandbytes, torchao, HQQ and compressed-tensors round the weights of `nn.Linear`, each behind a forward of
its own. In a model that is loaded with a `quantization_config`, every large core (`is_large`) is such a
layer, whose weight (o * r, l * i) is the transposed core; of a core that experts own there is one per
expert, of the expert's size. Files keep names and shapes of cores: `LoadLinears` splits and transposes a
core while it is loaded.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .header import ConversionOps, WeightConverter

# A core where libraries are to round it: a layer, or one for each expert.
Layers = nn.Linear | nn.ModuleList
# Below so many rows or columns a core is small: scales of groups would weigh as much as what is saved.
_MIN_SIDE = 32
# A core with a smaller share of its projection's matrix is small beside the others, and cheap to keep exact.
_MIN_SHARE = 1 / 64


def is_large(rows: int, cols: int, matrix_size: int) -> bool:
    """Whether a core, as the matrix (rows, cols) of one expert, is worth rounding.

    Args:
        matrix_size: number of entries of the projection's matrix.
    """
    return min(rows, cols) >= _MIN_SIDE and rows * cols >= _MIN_SHARE * matrix_size


def as_linears(shapes: Mapping[str, tuple[int, int]], like: Tensor) -> Layers:
    """Layers for a core, or a list for one that experts own; with random weights.

    Args:
        shapes: see `Chain.layer_shapes`.
        like: with their dtype and device.
    """
    made = [
        nn.Linear(rows, cols, bias=False, device=like.device, dtype=like.dtype)
        for rows, cols in shapes.values()
    ]
    return made[0] if "" in shapes else nn.ModuleList(made)


def split_experts(core: Tensor, shapes: Sequence[tuple[int, int]]) -> Sequence[Tensor]:
    """The experts' matrices, of these shapes, in a stack, or in a vector that has one after the other."""
    if core.ndim == 3:
        return core.unbind()
    parts = core.split([rows * cols for rows, cols in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def matrix_of(layer: nn.Module, like: Tensor) -> Tensor:
    """The matrix (in, out) that a layer multiplies by, whatever holds it; dtype and device of `like`."""
    size: Any = layer.in_features
    return layer(torch.eye(size, dtype=like.dtype, device=like.device))


def dtype_of(core: Tensor | Layers) -> torch.dtype | None:
    """What a core computes in; None: its layers take rows of any dtype."""
    tensors = [core] if isinstance(core, Tensor) else [*core.parameters(), *core.buffers()]
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)


def itemsize_of(core: Tensor | Layers) -> int:
    """Bytes per number of a matrix that is built from a core; 2 where its layers take rows of any dtype."""
    if isinstance(core, nn.Module):
        dtype = dtype_of(core)
        return 2 if dtype is None else dtype.itemsize
    return core.itemsize


def bytes_of(core: Tensor | Layers) -> int:
    """Bytes that a core is held in, as it is now."""
    if isinstance(core, nn.Module):
        return sum(tensor.numel() * tensor.itemsize for tensor in (*core.parameters(), *core.buffers()))
    return core.numel() * core.itemsize


def is_recorded() -> bool:
    """Whether a graph is made for other tokens too: by torch.compile, torch.export or torch.jit.trace."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]  (documented, yet not exported)


def run_by_expert(layers: Layers, x: Tensor, experts: Tensor | int) -> Tensor:
    """x (N, p, in), each row by the layer of its expert (N,), or all by that of one -> (N, p, out).

    In a graph, whose shapes cannot follow the choices, every layer runs on all rows.
    """
    assert isinstance(layers, nn.ModuleList)
    if isinstance(experts, int):
        return layers[experts](x)
    if is_recorded():
        y = layers[0](x)
        for expert in range(1, len(layers)):
            y = torch.where((experts == expert)[:, None, None], layers[expert](x), y)
        return y
    hit = experts.unique().tolist() or [0]  # one synchronisation
    places = [(experts == expert).nonzero().squeeze(-1) for expert in hit]
    made = [layers[expert](x[place]) for expert, place in zip(hit, places, strict=True)]
    return torch.cat(made)[torch.cat(places).argsort()]


class _SplitCore(ConversionOps):
    """A core, or those of all experts, into the weights of its layers, by their names."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """`full_layer_name`: of the first weight."""
        ((core,),), first = input_dict.values(), kwargs["full_layer_name"]
        if core.ndim == 2:
            return {first: core.mT.contiguous()}
        name = first.removesuffix(".0.weight")
        layers = kwargs["model"].get_submodule(name)
        own = split_experts(core, [(layer.in_features, layer.out_features) for layer in layers])
        return {f"{name}.{expert}.weight": matrix.mT.contiguous() for expert, matrix in enumerate(own)}

    @property
    def reverse_op(self) -> ConversionOps:
        """Layers are saved as what they are."""
        return self


class LoadLinears(WeightConverter):
    """Loads cores into linear layers, which a quantiser rounds one by one."""

    __slots__ = ()

    @classmethod
    def of_model(cls, model: nn.Module) -> list[WeightConverter]:
        """For the cores of a model that are linear layers, wherever they are in it: below any prefix."""
        names: dict[str, list[str]] = {".weight": [], ".0.weight": []}
        for name, module in model.named_modules():
            parent, _, core = name.rpartition(".")
            if core in getattr(model.get_submodule(parent), "core_names", ()):
                names[".0.weight" if isinstance(module, nn.ModuleList) else ".weight"].append(re.escape(name))
        return [
            cls(rf"(?<![^.])({'|'.join(found)})$", rf"\1{tail}", [_SplitCore()])
            for tail, found in names.items()
            if found
        ]

    def convert(self, layer_name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """{name: weight} of the layers of one core; `layer_name` is that of the first."""
        operation, self.quantization_operation = self.quantization_operation, None
        made = super().convert(layer_name, *args, **kwargs)
        if operation is None:
            return made
        loading = kwargs.pop("loading_info", None)
        rounded: dict[str, Any] = {}
        for name, weight in made.items():
            rounded |= operation.convert(
                {name: [weight]},
                source_patterns=[name],
                target_patterns=[name],
                full_layer_name=name,
                missing_keys=loading.missing_keys if loading else None,
                **kwargs,
            )
        return rounded

    def reverse_transform(self) -> WeightConverter:
        """Layers are saved as what they are: nothing matches."""
        return type(self)(r"(?!)", "none", self.operations)
