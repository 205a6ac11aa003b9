"""Experts that were named by hand, in calibration: those of one tensor per projection, and those of a list.

The first are read like those that transformers marks. Of a list, each expert runs as the stock code calls it,
and what its linear layers get is looked at. The block's output is a sum of what its experts give, each row
times its combine weight: the weights are the derivatives of that output by what the experts give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..runtime.shapes import functions
from ..source.expert_layout import Layout, biases_of, listed_experts, matrices_of
from ..source.ffn import Source

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

_GATE, _UP = (Source("", None, True, part, stacked=True) for part in (0, 1))
_WHOLE = Source("", None, True, stacked=True)


class StackView:
    """A module whose tensors hold all experts, with the attributes of those that transformers marks.

    Attributes:
        projections: role -> its part of what `gate_up_proj` or `up_proj` gives.
    """

    is_transposed = True

    def __init__(self, module: nn.Module, layout: Layout) -> None:
        self.module, self.layout = module, layout
        self.has_gate = "gate" in layout.projections
        self.has_bias = any(source.bias for source in layout.projections.values())
        self.projections = {"gate": _GATE, "up": _UP} if self.has_gate else {"up": _WHOLE}
        self.act_fn = functions().find_activation(module, layout.activation)
        self.down_proj, self.down_proj_bias = self._matrices("down"), self._biases("down")
        self.up_proj, self.up_proj_bias = self._matrices("up"), self._biases("up")
        if self.has_gate:
            self.gate_up_proj = _Joined(self._matrices("gate"), self.up_proj)
            self.gate_up_proj_bias = _Joined(self._biases("gate"), self.up_proj_bias)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def _matrices(self, role: str) -> Tensor:
        """(E, in, out)"""
        source = self.layout.projections[role]
        return matrices_of(self.module.get_parameter(source.weight), source)

    def _biases(self, role: str) -> Tensor:
        """(E, out); zeros where the projection has none."""
        source = self.layout.projections[role]
        if source.bias is None:
            stack = self._matrices(role)
            return stack.new_zeros(len(stack), stack.shape[-1])
        return biases_of(self.module.get_parameter(source.bias), source)


class _Joined:
    """Gate and up of one expert, side by side."""

    def __init__(self, gate: Tensor, up: Tensor) -> None:
        self.gate, self.up = gate, up

    def __getitem__(self, expert: int) -> Tensor:
        return torch.cat([self.gate[expert], self.up[expert]], dim=-1)


def as_marked(module: Any, layout: Layout | None) -> Any:
    """The module, or a view of it, with the attributes of those that transformers marks."""
    return module if layout is None else StackView(module, layout)


def linear_layers(experts: nn.Module, layout: Layout) -> Iterator[tuple[int, str, nn.Module]]:
    """(expert, role, linear layer) of a list; a layer of gate and up appears for both."""
    for number, expert in enumerate(listed_experts(experts)):
        for role, source in layout.projections.items():
            yield number, role, expert.get_submodule(source.weight.removesuffix(".weight"))


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states that a block is called with, by place or by name."""
    return next(each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor))


@dataclass(frozen=True, eq=False)
class ExpertCall:
    """One call of an expert of a list.

    Attributes:
        expert: its number.
        inputs: (n, in), of gate and up.
        inner: (n, inner), of down.
        output: (n, in), what the block goes on with.
    """

    expert: int
    inputs: Tensor
    inner: Tensor
    output: Tensor


def watch_calls(
    experts: nn.Module, layout: Layout, see: Callable[[ExpertCall], None], *, apart: bool
) -> Iterator[RemovableHandle]:
    """Let `see` be called with every call of a list's experts.

    Args:
        apart: the experts run without gradients, and their blocks with; what an expert gives begins a graph.
    """
    rows: dict[str, Tensor] = {}

    def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
        torch.set_grad_enabled(False)

    def before(role: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = first_input(args, kwargs)
        rows[role] = x.detach().reshape(-1, x.shape[-1])

    def behind(number: int, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if apart:
            torch.set_grad_enabled(True)
        output = output.detach().requires_grad_(True) if apart else output.clone()
        see(ExpertCall(number, rows["up"], rows["down"], output))
        return output.clone()  # which the block may change in place

    for number, expert in enumerate(listed_experts(experts)):
        if apart:
            yield expert.register_forward_pre_hook(begin)
        yield expert.register_forward_hook(partial(behind, number))
    for _, role, linear in linear_layers(experts, layout):
        if role in ("up", "down"):
            yield linear.register_forward_pre_hook(partial(before, role), with_kwargs=True)


def combine_weights(block_output: Tensor, calls: Sequence[ExpertCall], counted: Tensor) -> list[Tensor]:
    """Per call (n, 1) in float32: what the block multiplies each row by; 0 for tokens that do not count.

    A layer that goes on with what its block gives, and is no sum any more, counts every row as one.

    Args:
        block_output: (..., in), of a graph that has the calls' outputs.
        counted: (tokens,) bool.
    """
    if not calls:
        return []
    weigh = counted.reshape(*block_output.shape[:-1], 1).to(block_output).expand_as(block_output)
    outputs = [call.output for call in calls]
    found = torch.autograd.grad(block_output, outputs, weigh, retain_graph=True, allow_unused=True)
    pairs = zip(found, outputs, strict=True)
    return [_per_row(torch.zeros_like(y) if slope is None else slope) for slope, y in pairs]


def _per_row(slope: Tensor) -> Tensor:
    """(n, 1) of derivatives (..., in), whose entries are the same in each row of a sum."""
    slope = slope.detach().float().reshape(-1, slope.shape[-1])
    mean = slope.mean(-1, keepdim=True)
    if torch.allclose(slope, mean, rtol=0.05, atol=1e-6):
        return mean
    return (slope != 0).any(-1, keepdim=True).float()


def watch_gradients(
    experts: nn.Module, layout: Layout, see: Callable[[str, Tensor], None]
) -> Iterator[RemovableHandle]:
    """Let `see(role, gradient)` be called with gradients at what the projections of a list's experts give."""

    def behind(role: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            see(role, biases_of(gradient.reshape(-1, gradient.shape[-1]), layout.projections[role]))

        output.register_hook(add)

    for _, role, linear in linear_layers(experts, layout):
        yield linear.register_forward_hook(partial(behind, role))
