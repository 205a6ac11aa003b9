"""Read how a module that was named by hand holds its experts: run on small random numbers, beside ours.

transformers marks its modules of experts with flags; others are known by their tensors alone. Every way in
which those could be the matrices of gate, up and down is tried, until one computes what the module computes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ..errors import FamilyError, few, one_line
from ..runtime.shapes import functions
from .ffn import Source

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# Sizes of a trial: all different, so that a wrong order fails.
EXPERTS, HIDDEN, INNER, TOKENS, CHOSEN = 3, 6, 10, 7, 2
# Activations that a module's code may call without holding them, by their names in transformers' table.
_FUNCTIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2", "quick_gelu", "sigmoid", "tanh", "linear")


@dataclass(frozen=True)
class Layout:
    """How a module holds its experts and is called.

    Attributes:
        projections: role -> its tensor. Names are those below the module; of listed experts, below each.
        activation: its path below the module, or its name in transformers' table; None: where the modules
            have it that transformers marks.
        listed: the experts are children "0", "1", … of linear layers; else tensors have all experts.
        one_by_one: the block takes experts from the list and calls each; else it calls the module with hidden
            states, chosen experts and their weights.
    """

    projections: Mapping[str, Source]
    activation: str | None
    listed: bool = False
    one_by_one: bool = False

    def sources(self, prefix: str) -> dict[str, Source]:
        """Role -> where the matrices of all experts are, of the module with that prefix.

        Listed ones are read under the name that one expert's tensor would have without its number.
        """
        return {
            role: replace(source, weight=prefix + source.weight, bias=source.bias and prefix + source.bias)
            for role, source in self.projections.items()
        }

    @property
    def tensors(self) -> dict[str, str]:
        """Name below the module, or below each expert -> role of one that is in it."""
        pairs = [(each, role) for role, source in self.projections.items() for each in _names_of(source)]
        return dict(reversed(pairs))

    def size(self, module: Any) -> tuple[int, int, int]:
        """(experts, hidden size, inner size) of a module."""
        source = self.projections["down"]
        if self.listed:
            experts, shape = len(listed_experts(module)), _tensor(listed_experts(module)[0], source).shape
        else:
            experts, *shape = _tensor(module, source).shape
        inner, hidden = shape if source.transposed else shape[::-1]
        return experts, hidden, inner


def _names_of(source: Source) -> list[str]:
    return [name for name in (source.weight, source.bias) if name]


def _tensor(module: nn.Module, source: Source) -> Tensor:
    return _parameters(module)[source.weight]


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters(remove_duplicate=False))


def listed_experts(module: nn.Module) -> list[Any]:
    """The children "0", "1", … of a module; [] if they are not all it has."""
    children = dict(module.named_children())
    found = [children[name] for name in map(str, range(len(children))) if name in children]
    return found if found and len(found) == len(children) else []


def holds_experts(module: nn.Module) -> bool:
    """Whether a module may hold experts: a list of modules of one kind, or tensors of three axes."""
    from torch import nn

    if experts := listed_experts(module):
        kinds = {type(each) for each in experts}
        return len(experts) > 1 and len(kinds) == 1 and len(_linears(experts[0])) in (2, 3)
    if any(isinstance(each, (nn.ModuleList, nn.ModuleDict, nn.Conv1d)) for each in module.children()):
        return False
    own = [*module.parameters(recurse=False)]
    if not own and any(holds_experts(child) for child in module.children()):
        return False
    below = [p for child in module.children() for p in child.parameters(recurse=False)]
    return sum(p.ndim == 3 and p.shape[0] > 1 for p in own or below) in (2, 3)


def is_readable(module: nn.Module) -> bool:
    """Whether the shapes of all that a module learns could be those of experts."""
    return any(True for _ in _candidates(module, ()))


def _linears(expert: nn.Module) -> list[str]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return [name for name, child in expert.named_modules() if isinstance(child, (nn.Linear, Conv1D))]


def read_layout(module: nn.Module, projections: Sequence[str] = ()) -> Layout:
    """How a module holds its experts.

    Args:
        module: of the stock model, on the meta device.
        projections: names of the matrices in the order (gate,) up, down, or of gate and up in one tensor and
            down; of listed experts those of the linear layers. (): to be found.

    Raises:
        FamilyError: no way to read it computes what the module computes; says what is in the way, without
            naming the module.
    """
    drops = (n for n, m in module.named_modules() if "Dropout" in type(m).__name__ and getattr(m, "p", 0))
    if dropped := next(drops, None):
        raise FamilyError(f"{type(module).__name__} drops out in training ({dropped}), which ours does not")
    candidates = list(_candidates(module, projections))
    error = ""
    runs = False
    for layout, activation in product(candidates, _activations(module)):
        layout = replace(layout, activation=activation)
        try:
            if computes_the_same(module, layout):
                return layout
            runs = True
        except Exception as raised:  # the model's code may need anything else
            error = error or f"{type(raised).__name__}: {one_line(raised)}"
    name = type(module).__name__
    if not candidates:
        raise FamilyError(f"{name} holds {_held(module)}; expected {_EXPECTED}")
    if not runs:
        raise FamilyError(f"{name} could not be tried with smaller sizes ({error})")
    gated = any("gate" in layout.projections for layout in candidates)
    formula = "down(act(gate x) * up x)" if gated else "down(act(up x))"
    raise FamilyError(f"{name} computes something else than {formula}")


_EXPECTED = (
    "matrices of all experts in two or three tensors, (experts, out, in) or (experts, in, out), or a list of "
    "experts, each of two or three linear layers, and nothing else that is learnt"
)


def _held(module: nn.Module) -> str:
    shapes = [f"{name} {list(p.shape)}" for name, p in _parameters(module).items()]
    return few(shapes) or "no tensors"


# ---------------------------------------------------------------------------------------------------
# What the tensors could be


def _candidates(module: nn.Module, projections: Sequence[str]) -> Iterator[Layout]:
    """All ways to read the tensors whose shapes fit together, without the activation."""
    if experts := listed_experts(module):
        yield from _of_list(module, experts, projections)
        return
    shapes = {name: tuple(p.shape) for name, p in _parameters(module).items()}
    matrices = [name for name, shape in shapes.items() if len(shape) == 3]
    biases = [name for name, shape in shapes.items() if len(shape) == 2]
    if len(matrices) + len(biases) < len(shapes) or len({shape[0] for shape in shapes.values()}) > 1:
        return
    for names in _orders(matrices, projections):
        for own in permutations([*biases, *[None] * (len(names) - len(biases))], len(names)):
            for turned in product((False, True), repeat=2):
                found = [
                    Source(name, bias, turned[name == names[-1]], stacked=True)
                    for name, bias in zip(names, own, strict=True)
                ]
                if set(biases) <= {*own} and _biases_fit(found, shapes):
                    yield from _fitting(found, {n: s[1:] for n, s in shapes.items()})


def _of_list(module: nn.Module, experts: Sequence[Any], projections: Sequence[str]) -> Iterator[Layout]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    first = {name: tuple(p.shape) for name, p in _parameters(experts[0]).items()}
    alike = all({n: tuple(p.shape) for n, p in _parameters(each).items()} == first for each in experts)
    if not alike or len({type(each) for each in experts}) > 1:
        return
    linears = _linears(experts[0])
    one_by_one = type(module).forward is nn.Module.forward
    for names in _orders(linears, projections):
        found = []
        for name in names:
            bias = f"{name}.bias" if f"{name}.bias" in first else None
            turned = isinstance(experts[0].get_submodule(name), Conv1D)
            found.append(Source(f"{name}.weight", bias, turned, stacked=True))
        if {name for source in found for name in _names_of(source)} == set(first):
            for layout in _fitting(found, first):
                yield replace(layout, listed=True, one_by_one=one_by_one)


def _orders(names: Sequence[str], projections: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The orders (gate,) up, down of all the names: the one that is given, or every one."""
    if projections:
        given = tuple(name for each in projections for name in names if name in (each, f"{each}.weight"))
        yield from [given] if len(given) == len(projections) == len(names) else []
    elif len(names) in (2, 3):
        yield from permutations(names)


def _biases_fit(sources: Sequence[Source], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return all(
        source.bias is None or shapes[source.bias][1] == shapes[source.weight][2 if source.transposed else 1]
        for source in sources
    )


def _fitting(sources: Sequence[Source], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Layout]:
    """The layouts of projections (gate,) up, down whose matrices lead to the neurons and back."""
    sizes = [shapes[s.weight] if s.transposed else shapes[s.weight][::-1] for s in sources]
    (rows, cols), (inner, hidden) = sizes[0], sizes[-1]
    if hidden != rows or any(size != (rows, cols) for size in sizes[:-1]):
        return
    *first, down = sources
    if cols == inner:
        yield Layout(dict(zip(("gate", "up")[-len(first) :], first, strict=True)) | {"down": down}, "")
    elif len(first) == 1 and cols == 2 * inner:
        for order, interleaved in product((("gate", "up"), ("up", "gate")), (False, True)):
            halves = [replace(first[0], part=part, interleaved=interleaved) for part in (0, 1)]
            found = dict(zip(order, halves, strict=True))
            yield Layout({"gate": found["gate"], "up": found["up"], "down": down}, "")


def _activations(module: nn.Module) -> list[str]:
    """Paths below the module of what may be its activation, then names of transformers' table."""
    experts = listed_experts(module)
    own, prefix = (experts[0], "0.") if experts else (module, "")
    paths = [
        name
        for name, child in own.named_children()
        if not [*child.parameters()] and not [*child.children()] and callable(child)
    ]
    paths += [name for name, value in vars(own).items() if callable(value) and not name.startswith("_")]
    return [*(prefix + name for name in paths), *_FUNCTIONS]


# ---------------------------------------------------------------------------------------------------
# Run beside ours


def computes_the_same(module: nn.Module, layout: Layout) -> bool:
    """Whether a small copy of the module gives what ours gives. Raises what the module's code raises."""
    import torch

    small = _small(module, layout)
    ours = make_ours(small, layout, CHOSEN)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(TOKENS, HIDDEN, generator=generator)
    index = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(-1)[:, :CHOSEN]
    weights = torch.rand(TOKENS, CHOSEN, generator=generator)
    calls = [(tokens, index, weights)]
    modules = [(small, ours)]
    if layout.one_by_one:
        modules, calls = list(zip(listed_experts(small), ours, strict=True)), [(tokens,)]
    with torch.no_grad():
        return all(same(own(*call), stock(*call)) for stock, own in modules for call in calls)


def same(found: Tensor, expected: Tensor) -> bool:
    """Whether outputs agree to rounding."""
    import torch

    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def make_ours(module: Any, layout: Layout, top_k: int) -> Any:
    """Our experts, whole, with the numbers of a stock module."""
    from torch import nn

    experts, hidden, inner = layout.size(module)
    sizes = {"gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}
    form = {
        role: {"terms": [whole(*sizes[role])], "bias": "per-expert" if source.bias else None}
        for role, source in layout.projections.items()
    }
    kind = functions().ExpertList if layout.one_by_one else functions().Experts
    made = kind(form, experts, top_k, module, layout.activation)
    for role, source in layout.projections.items():
        projection = getattr(made, role)
        stack = matrices_of(stacked(module, layout, source.weight), source)
        projection.terms[0].aux_0 = nn.Parameter(stack.detach())
        if source.bias:
            biases = biases_of(stacked(module, layout, source.bias), source)
            projection.bias = nn.Parameter(biases.detach())
    return made


def stacked(module: nn.Module, layout: Layout, name: str) -> Tensor:
    """The tensor of that name for all experts of a module."""
    import torch

    if not layout.listed:
        return _parameters(module)[name]
    tensors = [_parameters(each)[name] for each in listed_experts(module)]
    if all(tensor is tensors[0] for tensor in tensors):
        return tensors[0].expand(len(tensors), *tensors[0].shape)
    return torch.stack(tensors)


def _small(module: nn.Module, layout: Layout) -> Any:
    """A small copy of a module with random parameters."""
    import torch

    experts, hidden, inner = layout.size(module)
    small = copy.deepcopy(module).eval()
    generator = torch.Generator().manual_seed(1)
    if layout.listed:
        first = small.get_submodule("0")
        small._modules.clear()
        for name in map(str, range(EXPERTS)):
            small._modules[name] = copy.deepcopy(first)
            _shrink(small._modules[name], layout, generator)
    else:
        _shrink(small, layout, generator, EXPERTS)
    _resize(small, {2 * inner: 2 * INNER, inner: INNER, hidden: HIDDEN}, experts)
    return small


def _shrink(module: Any, layout: Layout, generator: torch.Generator, *leading: int) -> None:
    """Give a module's tensors random numbers of small sizes, with `leading` axes before them."""
    import torch
    from torch import nn

    widths = {"gate": INNER, "up": INNER, "down": HIDDEN}
    for name, role in layout.tensors.items():
        source = layout.projections[role]
        out = widths[role] * (1 if source.part is None else 2)
        shape = (INNER, out) if role == "down" else (HIDDEN, out)
        shape = (out,) if name == source.bias else shape if source.transposed else shape[::-1]
        path, _, last = name.rpartition(".")
        value = torch.randn(*leading, *shape, generator=generator)
        setattr(module.get_submodule(path), last, nn.Parameter(value))


def _resize(module: nn.Module, sizes: Mapping[int, int], experts: int) -> None:
    """Let the sizes that a module and its children have noted be those of the trial."""
    for each in module.modules():
        for name, value in vars(each).items():
            if isinstance(value, int) and not isinstance(value, bool):
                counts = "expert" in name and not any(part in name for part in ("dim", "size", "width"))
                known = {**sizes, experts: EXPERTS} if counts else {experts: EXPERTS, **sizes}
                vars(each)[name] = known.get(value, value)
        if "config" in vars(each):
            config: Any = copy.copy(each.config) or SimpleNamespace()
            config._experts_implementation = "eager"
            vars(each)["config"] = config


# ---------------------------------------------------------------------------------------------------
# The matrices in a tensor


def matrices_of(tensor: Tensor, source: Source) -> Tensor:
    """A view (E, in, out) of the tensor that holds the matrices of all experts."""
    stack = tensor if source.transposed else tensor.mT
    if source.part is None:
        return stack
    return stack[..., source.part :: 2] if source.interleaved else stack.chunk(2, dim=-1)[source.part]


def biases_of(tensor: Tensor, source: Source) -> Tensor:
    """A view (E, out) of the tensor that holds the biases of all experts."""
    if source.part is None:
        return tensor
    return tensor[..., source.part :: 2] if source.interleaved else tensor.chunk(2, dim=-1)[source.part]


def whole(rows: int, cols: int) -> dict:
    """The term of experts that are whole matrices."""
    return {"in_dims": [rows], "out_dims": [cols], "bonds": [], "shared": [False]}
