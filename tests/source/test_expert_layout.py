"""How a module holds its experts, read by running it: every way of holding them is told from the others."""

import copy
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mpoe_convert.errors import FamilyError
from mpoe_convert.source.expert_layout import computes_the_same, holds_experts, is_readable, read_layout
from mpoe_convert.source.named_experts import proposals

EXPERTS = 5


class Tensors(nn.Module):
    """Experts in tensors, computed token by token.

    Args:
        first: what the first tensor holds: "up"; "gate" (then a second one has up); "gate, up" or "up, gate",
            one behind the other; the same with "turns", in turns.
        turned: (experts, in, out) for the tensors but the last, and for the last.
    """

    def __init__(self, first="gate, up", turned=(False, False), bias=False, hidden=8, inner=12, scale=1.0):
        super().__init__()
        self.first, self.turned, self.scale, self.num_experts = first, turned, scale, EXPERTS
        width = 2 * inner if "," in first else inner
        sizes = {"a": (hidden, width), "z": (inner, hidden)}
        if first == "gate":
            sizes["b"] = (hidden, inner)
        for name, (rows, cols) in sizes.items():
            shape = (rows, cols) if turned[name == "z"] else (cols, rows)
            self.register_parameter(name, nn.Parameter(torch.empty(EXPERTS, *shape)))
            if bias:
                self.register_parameter(f"of_{name}", nn.Parameter(torch.empty(EXPERTS, cols)))

    def one(self, name, expert, x):
        weight = getattr(self, name)[expert]
        y = x @ weight if self.turned[name == "z"] else weight @ x
        return y + getattr(self, f"of_{name}")[expert] if hasattr(self, f"of_{name}") else y

    def neurons(self, expert, x):
        y = self.one("a", expert, x)
        if self.first == "up":
            return F.gelu(y)
        if self.first == "gate":
            return F.gelu(y) * self.one("b", expert, x)
        halves = (y[::2], y[1::2]) if "turns" in self.first else y.chunk(2)
        gate, up = halves if self.first.startswith("gate") else halves[::-1]
        return F.gelu(gate) * up

    def forward(self, states, index, weights):
        output = torch.zeros_like(states)
        for token, x in enumerate(states):
            for expert, weight in zip(index[token], weights[token], strict=True):
                output[token] += self.scale * weight * self.one("z", expert, self.neurons(expert, x))
        return output


def made(**options) -> Tensors:
    with torch.device("meta"):
        return Tensors(**options)


FIRST = ("up", "gate", "gate, up", "up, gate", "gate, up in turns", "up, gate in turns")


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("bias", [False, True])
def test_tensors_of_all_are_read(first, bias):
    for turned in product((False, True), repeat=2):
        module = made(first=first, turned=turned, bias=bias)
        assert holds_experts(module)
        layout = read_layout(module)
        assert layout.activation == "gelu" and not layout.listed and not layout.one_by_one
        assert layout.size(module) == (EXPERTS, 8, 12)
        found = {
            role: (source.weight, source.bias, source.transposed, source.part, source.interleaved)
            for role, source in layout.projections.items()
        }
        order = [each.strip() for each in first.removesuffix(" in turns").split(",")]
        roles = {"gate": "a", "up": "b"} if first == "gate" else dict.fromkeys(order, "a")
        expected = {"down": ("z", "of_z" if bias else None, turned[1], None, False)}
        for role, name in roles.items():
            part = order.index(role) if "," in first else None
            expected[role] = (name, f"of_{name}" if bias else None, turned[0], part, "turns" in first)
        assert found == expected


def test_square_matrices_are_read_too():
    for first, turned in product(FIRST, product((False, True), repeat=2)):
        module = made(first=first, turned=turned, bias=True, hidden=8, inner=8)
        layout = read_layout(module)
        assert computes_the_same(module, layout)
        assert layout.projections["down"].transposed == turned[1]


def test_matrices_can_be_named():
    module = made(first="gate")
    assert read_layout(module, ("a", "b", "z")) == read_layout(module)
    with pytest.raises(FamilyError, match=r"^Tensors computes something else than down\(act\(gate x\) \* up"):
        read_layout(module, ("b", "a", "z"))
    for names in (("z", "a", "b"), ("a", "z"), ("a", "b", "c")):
        with pytest.raises(FamilyError, match=r"^Tensors holds 'a \[5, 12, 8\]', .*; expected matrices"):
            read_layout(module, names)


def test_another_function_is_told():
    for first in FIRST:
        formula = "act(up x)" if first == "up" else "act(gate x) * up x"
        with pytest.raises(FamilyError) as caught:
            read_layout(made(first=first, scale=1.01))
        assert str(caught.value) == f"Tensors computes something else than down({formula})"


def test_a_module_that_needs_more_is_told():
    module = made()
    module.forward = lambda states: states
    with pytest.raises(FamilyError, match=r"^Tensors could not be tried with smaller sizes \(TypeError: "):
        read_layout(module)


class Linear(nn.Module):
    """One expert of linear layers."""

    def __init__(self, gated=True, bias=False, inner=12):
        super().__init__()
        self.first, self.last = nn.Linear(8, inner, bias=bias), nn.Linear(inner, 8, bias=bias)
        self.second = nn.Linear(8, inner, bias=bias) if gated else None
        self.act = nn.Tanh()

    def forward(self, x):
        y = self.act(self.first(x))
        return self.last(y if self.second is None else y * self.second(x))


class Called(nn.ModuleList):
    """A list that is called as a whole."""

    def forward(self, states, index, weights):
        output = torch.zeros_like(states)
        for expert, one in enumerate(self):
            rows, places = torch.where(index == expert)
            output.index_add_(0, rows, one(states[rows]) * weights[rows, places, None])
        return output


@pytest.mark.parametrize("kind", [nn.ModuleList, Called])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_lists_are_read(kind, gated, bias):
    with torch.device("meta"):
        module = kind(Linear(gated, bias) for _ in range(EXPERTS))
    assert holds_experts(module)
    layout = read_layout(module)
    assert layout.activation == "0.act" and layout.listed and layout.one_by_one == (kind is nn.ModuleList)
    assert layout.size(module) == (EXPERTS, 8, 12)
    names = {"gate": "first", "up": "second", "down": "last"} if gated else {"up": "first", "down": "last"}
    assert {role: (source.weight, source.bias) for role, source in layout.projections.items()} == {
        role: (f"{name}.weight", f"{name}.bias" if bias else None) for role, name in names.items()
    }


def test_experts_that_differ_are_told():
    with torch.device("meta"):
        module = nn.ModuleList([Linear(), Linear(inner=16)])
    with pytest.raises(FamilyError, match=r"^ModuleList holds '0.first.weight \[12, 8\]', .*; expected matr"):
        read_layout(module)


def test_the_module_is_left_as_it_is():
    for module in (made(), nn.ModuleList(Linear() for _ in range(EXPERTS))):
        before = copy.deepcopy(vars(module)), {n: (p.shape, p.device) for n, p in module.named_parameters()}
        read_layout(module)
        assert {n: (p.shape, p.device) for n, p in module.named_parameters()} == before[1]
        assert module.training and getattr(module, "num_experts", EXPERTS) == EXPERTS


def test_what_holds_no_experts():
    plain = [nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 8)] * 3), Linear(), nn.ModuleList([Linear()])]
    assert not any(map(holds_experts, [*plain, nn.ModuleList([Linear(), nn.Sequential()]), nn.Tanh()]))


class Normed(Linear):
    """An FFN that learns a norm too, as blocks of a convolution do."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)


def test_lists_of_what_learns_more_are_not_proposed():
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Module()])
    model.layers[0].experts = nn.ModuleList(Linear() for _ in range(2))
    model.layers[0].blocks = nn.ModuleList(Normed() for _ in range(2))
    assert [is_readable(each) for each in model.layers[0].children()] == [True, False]
    assert proposals(model) == ["layers.{}.experts"]
