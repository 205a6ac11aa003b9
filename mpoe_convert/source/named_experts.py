"""Experts that `--experts-at` names: where they are, and whether their block computes the same with ours."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, Any

from ..errors import FamilyError, nearest, one_line
from ..options import called
from ..runtime.shapes import functions
from .expert_layout import Layout, holds_experts, is_readable, listed_experts, make_ours, read_layout, same
from .probe import describe_slot

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# Up to so many numbers each expert of a block has its own in a trial of the block; beyond, all have the same.
_MOST_NUMBERS = 2**26
_TOKENS = 7


@dataclass(frozen=True)
class Named:
    """The text "layers.{}.mlp.experts:gate_proj,up_proj,down_proj", read.

    Attributes:
        text: as it was given.
        layers: "layers.{}".
        slot: path of the block in the layer: "mlp"; "" if the layer itself calls the experts.
        experts: their name in the block.
        projections: names of the matrices, if they are given.
    """

    text: str
    layers: str
    slot: str
    experts: str
    projections: tuple[str, ...]

    @property
    def path(self) -> str:
        """Of the experts, with "{}" for the number of the layer."""
        return ".".join(filter(None, [self.layers, self.slot, self.experts]))


def parse(text: str) -> Named:
    """Raises FamilyError if the text is malformed."""
    match = re.fullmatch(r"((?:\w+\.)*\{\})\.((?:\w+\.)*)(\w+)(?::([\w.]+(?:,[\w.]+){1,2}))?", text)
    if match is None:
        raise FamilyError(
            f'{called("experts_at")} is "{text}"; expected "LAYERS.{{}}.BLOCK.EXPERTS", with '
            '":gate,up,down" behind it to name the matrices'
        )
    projections = tuple(match[4].split(",")) if match[4] else ()
    return Named(text, match[1], match[2].rstrip("."), match[3], projections)


def find(base: Any, named: Named) -> dict[str, Any]:
    """{path of a layer: its experts}, of all layers that have some.

    Raises:
        FamilyError: no layer has such a module, or it holds no experts; says what is nearest.
    """
    pattern = re.compile(re.escape(named.path).replace(r"\{\}", r"(\d+)"))
    modules = {path: match for path, _ in base.named_modules() if (match := pattern.fullmatch(path))}
    if not modules:
        raise FamilyError(
            f"{called('experts_at')} does not fit {type(base).__name__}, which has no {named.path}"
            f"{_suggestion(base, named.path)}"
        )
    found = {
        named.layers.format(match[1]): base.get_submodule(path)
        for path, match in sorted(modules.items(), key=lambda each: int(each[1][1]))
    }
    if not any(map(_may_be, found.values())):
        path = next(iter(modules))
        raise FamilyError(
            f"{called('experts_at')} names {path}, {_what_is(base, path)}{_suggestion(base, named.path)}"
        )
    return {layer: module for layer, module in found.items() if _may_be(module)}


def is_marked(module: Any) -> bool:
    """Whether transformers marks a module as experts, and how they are held."""
    return hasattr(type(module), "_apply_gate") and hasattr(module, "is_transposed")


def _may_be(module: nn.Module) -> bool:
    return is_marked(module) or holds_experts(module)


def _what_is(base: Any, path: str) -> str:
    """What a module that holds no experts is, in words."""
    kind = type(base.get_submodule(path)).__name__
    if ffn := _dense_ffn(base, path):
        return f'a {kind}, which is a dense FFN ({called("ffn")} "{ffn}" names it) and holds no experts'
    return f"a {kind}, which holds no experts"


def _dense_ffn(base: Any, path: str) -> str | None:
    """What --ffn takes for a module that is a dense FFN."""
    match = re.fullmatch(r"((?:\w+\.)*?)(\d+)\.(.+)", path)
    linears = [n for n, child in base.get_submodule(path).named_children() if hasattr(child, "weight")]
    if match is None or len(linears) not in (2, 3):
        return None
    for order in permutations(linears):
        try:
            describe_slot(base, match[1] + match[2], match[3], order)
        except FamilyError:
            continue
        return f"{match[1]}{{}}.{match[3]}:{','.join(order)}"
    return None


def proposals(base: Any) -> list[str]:
    """Paths of modules that may hold experts, as --experts-at takes them."""
    modules = ((path, module) for path, module in base.named_modules() if _may_be(module))
    found = (_template(path) for path, module in modules if is_marked(module) or is_readable(module))
    return list(dict.fromkeys(filter(None, found)))


def _template(path: str) -> str | None:
    """ "layers.3.mlp.experts" -> "layers.{}.mlp.experts"."""
    match = re.fullmatch(r"((?:\w+\.)*?)\d+\.((?:\w+\.)*[A-Za-z_]\w*)", path)
    return match and f"{match[1]}{{}}.{match[2]}"


def _suggestion(base: Any, path: str) -> str:
    """The nearest path that may hold experts, or what else is there."""
    known = proposals(base)
    if not known:
        return f"; no module of {type(base).__name__} holds experts, it is a dense model"
    return f'; did you mean "{nearest(path, known, alike=0.0) or known[0]}"?'


def read(base: Any, named: Named, found: dict[str, Any]) -> Layout | None:
    """How the modules of `find` hold their experts; None: transformers marks them, and says it.

    Raises:
        FamilyError: it cannot be read, or the layers differ.
    """
    kinds = {is_marked(module) for module in found.values()}
    layout, first = None, ""
    if kinds == {False}:
        seen: dict[object, Layout] = {}
        for layer, module in found.items():
            key = (type(module), *((name, tuple(p.shape)) for name, p in module.named_parameters()))
            if key not in seen:
                seen[key] = _layout(_path(named, layer), module, named)
            if layout is not None and seen[key] != layout:
                raise FamilyError(
                    f"the experts of {layer} are built differently from those of {first}; expected one form "
                    "in all layers"
                )
            layout, first = seen[key], first or layer
    elif named.projections or len(kinds) > 1:
        raise FamilyError(
            f"{called('experts_at')} names matrices of {named.path}, which transformers knows by itself; "
            "leave out what stands behind the colon"
        )
    return layout


def _path(named: Named, layer: str) -> str:
    return ".".join(filter(None, [layer, named.slot, named.experts]))


def _layout(path: str, module: nn.Module, named: Named) -> Layout:
    try:
        return read_layout(module, named.projections)
    except FamilyError as error:
        raise FamilyError(f"{called('experts_at')} names {path}, and {error}") from error


# ---------------------------------------------------------------------------------------------------
# Confirmed by running a block


def check_blocks(base: Any, named: Named, found: dict[str, Any], layout: Layout) -> None:
    """Run a block of each kind with its own experts and with ours. Raises FamilyError if outputs differ."""
    blocks = {layer: base.get_submodule(".".join(filter(None, [layer, named.slot]))) for layer in found}
    for layer in {type(block): layer for layer, block in reversed(blocks.items())}.values():
        if named.slot:  # else it is the layer, which takes more than hidden states
            _check_block(blocks[layer], f"{layer}.{named.slot}", named, layout)


def _check_block(block: Any, path: str, named: Named, layout: Layout) -> None:
    import torch

    block = copy.deepcopy(block).eval()
    _, hidden, _ = layout.size(getattr(block, named.experts))
    _fill(block, getattr(block, named.experts), layout)
    tokens = torch.randn(1, _TOKENS, hidden, generator=torch.Generator().manual_seed(0))
    who = f"{path}, a {type(block).__name__},"
    try:
        expected = _run(block, tokens)
    except Exception as error:  # the model's code may need other inputs, and may raise anything
        if not layout.one_by_one:
            return  # it hands its experts what they were run on
        raise FamilyError(
            f"{who} does not run on hidden states alone ({type(error).__name__}: {one_line(error)}), so what "
            "it does with its experts is not known"
        ) from error
    ours = make_ours(getattr(block, named.experts), layout, 1)
    functions().put_experts(block, ours, named.experts, {"__name__": __name__})
    try:
        alike = same(_run(block, tokens), expected)
    except Exception as error:  # as above
        raise FamilyError(
            f"{who} takes more of its experts than what they compute ({type(error).__name__}: "
            f"{one_line(error)})"
        ) from error
    if not alike:
        raise FamilyError(f"{who} computes something else with experts that compute the same")


def _fill(block: nn.Module, experts: nn.Module, layout: Layout) -> None:
    """Give a block on the meta device random numbers on the CPU; large experts all get the same."""
    import torch

    generator = torch.Generator().manual_seed(1)
    few = sum(parameter.numel() for parameter in experts.parameters()) <= _MOST_NUMBERS
    alike: dict[str, nn.Parameter] = {}
    stacked = {id(p) for p in experts.parameters()} if not layout.listed else set()
    within = {id(p): n for each in listed_experts(experts) for n, p in each.named_parameters()}
    for module in block.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            key = within.get(id(parameter), "")
            if key not in alike or few:
                one = id(parameter) in stacked and not few
                numbers = _random(parameter[:1] if one else parameter, generator).expand(parameter.shape)
                made = torch.nn.Parameter(numbers, requires_grad=False)
                alike |= {key: made} if key else {}
            else:
                made = alike[key]
            module._parameters[name] = made
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = _random(buffer, generator)


def _random(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers of that shape whose products with inputs of size 1 have size 1; zeros for integers."""
    import torch

    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    return torch.randn(tensor.shape, generator=generator) / max(tensor.shape[-1:] or (1,)) ** 0.5


def _run(block: nn.Module, tokens: Tensor) -> Tensor:
    """The hidden states that a block gives."""
    import torch

    with torch.no_grad():
        found = block(tokens)
    return found[0] if isinstance(found, tuple) else found
