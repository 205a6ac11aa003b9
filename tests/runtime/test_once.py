"""Shared cores at the beginning and the end of chains work on a token once, however many experts it has."""

import pytest
import torch
from helpers.mixtures import WAYS, fill, randn
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mpoe_convert.decomposition.stacks import stack_terms
from mpoe_convert.runtime import modeling_mpoe as modeling
from mpoe_convert.runtime.modeling_mpoe import Experts

NUM_EXPERTS, TOP_K, HIDDEN, INNER, TOKENS = 4, 3, 12, 10, 7
RANKS = {"none": (5,), "input": (6,), "output": (6,), "both": (6, 5), "base": (4,), "whole": ()}


def make_experts(gate: str, up: str, down: str, bias: str | None = None) -> Experts:
    sizes = {"gate": (HIDDEN, INNER), "up": (HIDDEN, INNER), "down": (INNER, HIDDEN)}
    forms = {"gate": gate, "up": up, "down": down}
    spec = {
        role: {"terms": stack_terms(forms[role], RANKS[forms[role]], *size), "bias": bias}
        for role, size in sizes.items()
    }
    made = fill(Experts(spec, NUM_EXPERTS, TOP_K), scale=0.4).double()
    made.act, made.schedule = nn.SiLU(), "apply"
    return made


def choices(tokens=TOKENS):
    generator = torch.Generator().manual_seed(2)
    chosen = torch.rand(tokens, NUM_EXPERTS, generator=generator).topk(TOP_K).indices
    return chosen, torch.rand(tokens, TOP_K, generator=generator, dtype=torch.float64)


def whole(experts: Experts, role: str, expert: int) -> torch.Tensor:
    """The matrix (in, out) of an expert, product by product."""
    total = 0.0
    for chain in getattr(experts, role).terms:
        cores = [getattr(chain, name) for name in chain.core_names]
        product = torch.eye(chain.in_features, dtype=torch.float64)
        for core, shared in zip(cores, chain.shared, strict=True):
            product = product @ (core if shared else core[expert])
        total = total + product
    return total


def reference(experts: Experts, x, chosen, weights):
    """Token by token, expert by expert, by whole matrices."""
    rows = []
    for token, own, scales in zip(x, chosen.tolist(), weights, strict=True):
        total = torch.zeros(HIDDEN, dtype=torch.float64)
        for expert, scale in zip(own, scales, strict=True):
            inner = nn.functional.silu(token @ whole(experts, "gate", expert))
            inner = inner * (token @ whole(experts, "up", expert))
            total = total + scale * (inner @ whole(experts, "down", expert))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", RANKS)
def test_outputs_are_those_of_whole_matrices(form, way, monkeypatch):
    for name, value in WAYS[way].items():
        monkeypatch.setattr(modeling, name, value)
    experts, x = make_experts(form, "input", form), randn(TOKENS, HIDDEN)
    with torch.no_grad():
        found = experts(x, *choices())
    torch.testing.assert_close(found, reference(experts, x, *choices()))


@pytest.mark.parametrize("form", RANKS)
def test_gradients_are_those_of_whole_matrices(form):
    experts, x = make_experts(form, "both", form), randn(TOKENS, HIDDEN).requires_grad_()
    chosen, weights = choices()
    aim, names = randn(TOKENS, HIDDEN, seed=4), [x, weights.requires_grad_(), *experts.parameters()]
    found = torch.autograd.grad((experts(x, chosen, weights) * aim).sum(), names)
    expected = torch.autograd.grad((reference(experts, x, chosen, weights) * aim).sum(), names)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("form", "once", "each"), [
    # numbers that a token is multiplied by once, and once for each of its experts
    ("none", 0, 3 * 5 * (HIDDEN + INNER)),
    ("input", 2 * 6 * HIDDEN, 2 * 6 * INNER + 6 * (INNER + HIDDEN)),
    ("output", 6 * HIDDEN, 2 * 6 * (HIDDEN + INNER) + 6 * INNER),
    ("both", 2 * 6 * HIDDEN + 5 * HIDDEN, 2 * (6 * 5 + 5 * INNER) + 6 * INNER + 6 * 5),
    ("base", 3 * HIDDEN * INNER, 3 * 4 * (HIDDEN + INNER)),
])  # fmt: skip
def test_operations_are_those_of_the_formula(form, once, each):
    experts, x = make_experts(form, form, form), randn(TOKENS, HIDDEN)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        experts(x, *choices())
    assert counter.get_total_flops() == 2 * TOKENS * (once + TOP_K * each)
    assert experts.flops(TOKENS, "apply") == counter.get_total_flops()


def test_a_bias_is_added_for_every_expert():
    """The weighted sum of biases is no sum of one; so the end then works on every expert's row."""
    experts, x = make_experts("input", "input", "both", bias="shared"), randn(TOKENS, HIDDEN)
    chosen, weights = choices()
    with torch.no_grad():
        for part in (experts.gate, experts.up):
            part.bias.zero_()
        expected = reference(experts, x, chosen, weights) + weights.sum(1, keepdim=True) * experts.down.bias
        torch.testing.assert_close(experts(x, chosen, weights), expected)


def test_offloaded_chains_are_called_once():
    """accelerate loads a module's weights whenever it is called."""
    experts, x = make_experts("both", "input", "both"), randn(TOKENS, HIDDEN)
    calls = []
    for part in experts.parts:
        for chain in part.terms:
            chain._hf_hook = object()
            chain.register_forward_pre_hook(lambda module, args: calls.append(module))
    with torch.no_grad():
        found = experts(x, *choices())
    assert len(calls) == len({id(each) for each in calls}) == 3
    torch.testing.assert_close(found, reference(experts, x, *choices()))


class CountTensors(TorchDispatchMode):
    """How many tensors operations give, views included."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.count += len(made) if isinstance(made, (tuple, list)) else 1
        return made


def test_experts_that_no_token_goes_to_cost_nothing(monkeypatch):
    for name, value in WAYS["sorted rows"].items():
        monkeypatch.setattr(modeling, name, value)
    counts = []
    for num_experts in (NUM_EXPERTS, 10 * NUM_EXPERTS):
        monkeypatch.setitem(globals(), "NUM_EXPERTS", num_experts)
        experts, chosen = make_experts("none", "none", "none"), torch.tensor([[3, 0, 1]])
        with torch.no_grad(), CountTensors() as counted:
            experts(randn(1, HIDDEN), chosen, torch.ones(1, TOP_K, dtype=torch.float64))
        counts.append(counted.count)
    assert counts[0] == counts[1]
