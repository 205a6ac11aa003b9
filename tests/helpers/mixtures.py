"""Small mixtures with random parameters."""

from contextlib import contextmanager
from math import prod

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn

from mpoe_convert.runtime import modeling_mpoe as modeling
from mpoe_convert.runtime.modeling_mpoe import Chain, FeedForward, Picks, Projection


def chain(in_dims, out_dims, bonds, shared, untied=None) -> dict:
    found = {"in_dims": in_dims, "out_dims": out_dims, "bonds": bonds, "shared": shared}
    return found if untied is None else found | {"untied": untied}


# Input features 12, output features 10, by the way their experts are applied.
TERMS = {
    "one-sided": chain([3, 4, 1], [1, 5, 2], [3, 2], [False, True, False]),
    "one-sided, left only": chain([3, 4], [1, 10], [2], [False, True]),
    "one-sided, right only": chain([12, 1], [5, 2], [2], [True, False]),
    "one-sided, five sites": chain([2, 3, 2, 1, 1], [1, 1, 5, 2, 1], [2, 5, 2, 1], [0, 0, 1, 0, 0]),
    "one-sided, shared centre of two": chain(
        [3, 4, 1, 1], [1, 1, 5, 2], [3, 2, 2], [False, True, True, False]
    ),
    "blocks of inputs": chain([3, 4], [1, 10], [3], [False, True], [True, False]),
    "blocks of outputs": chain([12, 1], [5, 2], [2], [True, False], [False, True]),
    "scales, blocks of inputs": chain([1, 3, 4], [1, 1, 10], [1, 3], [0, 0, 1], [1, 1, 0]),
    "blocks of outputs, scales": chain([12, 1, 1], [5, 2, 1], [2, 1], [1, 0, 0], [0, 1, 1]),
    "blocks of both, shared centre of two": chain(
        [3, 4, 1, 1], [1, 1, 5, 2], [2, 4, 3], [0, 1, 1, 0], [1, 0, 0, 1]
    ),
    "blocks, tied beside untied": chain([2, 2, 3, 1], [1, 1, 5, 2], [2, 3, 2], [0, 0, 1, 0], [0, 1, 0, 1]),
    "two-sided": chain([2, 3, 2], [2, 1, 5], [3, 4], [False, True, False]),
    "balanced": chain([2, 2, 3, 1, 1], [1, 2, 1, 1, 5], [2, 3, 3, 4], [0, 0, 1, 0, 0]),
    "dense": chain([12], [10], [], [False]),
    "shared": chain([12], [10], [], [True]),
    "low rank": chain([12, 1], [1, 10], [2], [False, False]),
    "two shared runs": chain([2, 3, 2], [5, 1, 2], [2, 2], [True, False, True]),
}


LORA = [TERMS["shared"], TERMS["low rank"]]


NUM_EXPERTS = 4


def fill(module: nn.Module, seed: int = 0, scale: float = 0.5) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return module


def randn(*shape, seed: int = 1, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def mirrored(term: dict) -> dict:
    """The same kind of chain for a matrix of the transposed shape."""
    names = ("out_dims", "in_dims", "bonds", "shared", "untied")
    return chain(*[term[name][::-1] for name in names if name in term])


def make_ffn(name="one-sided", top_k=2, bias=None) -> FeedForward:
    """A gated mixture, 12 -> 10 -> 12."""
    terms = LORA if name == "lora" else [TERMS[name]]
    up = {"terms": terms, "bias": bias}
    down = {"terms": [mirrored(term) for term in terms], "bias": bias}
    ffn = FeedForward({"gate": up, "up": up, "down": down}, NUM_EXPERTS, top_k)
    ffn.act = nn.SiLU()
    return fill(ffn)


SETTINGS = settings(deadline=None, derandomize=True, max_examples=20)


# The router computes in float32 in every dtype, so a float64 mixture is exact to float32 only there.
ROUTER_ROUNDING = 1e-5


LETTERS = "abcdefghijklmnopqrstuvwxyz"


def chain_matrix(module: Chain, expert: int) -> torch.Tensor:
    """One expert's matrix: a single einsum over all bonds, then input indices before output indices.

    An untied core carries the indices of the inputs to its right, or of the outputs to its left, as well.
    """
    sites, in_dims = len(module.shapes), [shape[1] for shape in module.shapes]
    out_dims = [shape[2] for shape in module.shapes]
    ins, outs, bonds = LETTERS[:sites], LETTERS[sites : 2 * sites], LETTERS[2 * sites :]
    operands = []
    for k, (name, shared) in enumerate(zip(module.core_names, module.shared, strict=True)):
        core = getattr(module, name)
        core, copied, dims = core if shared else core[expert], "", []
        if module.copies[k] > 1:
            from_right = prod(out_dims[: k + 1]) == 1
            copied = ins[k + 1 :] if from_right else outs[:k]
            dims = in_dims[k + 1 :] if from_right else out_dims[:k]
        shape = (module.shapes[k][0] // module.copies[k], *module.shapes[k][1:])
        operands.append((copied + bonds[k] + ins[k] + outs[k] + bonds[k + 1], core.reshape(*dims, *shape)))
    expression = ",".join(indices for indices, _ in operands) + f"->{bonds[0]}{ins}{outs}{bonds[sites]}"
    tensor = torch.einsum(expression, *[core for _, core in operands])
    return tensor.reshape(prod(in_dims), prod(out_dims))


def project(module: Projection, row: torch.Tensor, expert: int) -> torch.Tensor:
    y = sum(row @ chain_matrix(term, expert) for term in module.terms)
    if module.bias is None or module.bias_kind == "once":
        return y
    return y + (module.bias if module.bias.ndim == 1 else module.bias[expert])


def table(routing: modeling.Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and experts (T, k) of a rule that gives every token k choices."""
    choices, num_tokens = routing.choices, len(routing.logits)
    assert choices.tokens.tolist() == [t for t in range(num_tokens) for _ in range(choices.per_token)]
    shape = (num_tokens, choices.per_token)
    return choices.weights.reshape(shape), choices.experts.reshape(shape)


def ways(experts: torch.Tensor, num_experts: int) -> dict[str, Picks]:
    """Every way to say which expert each of some sorted rows has."""
    found = {
        "each": Picks(experts),
        "sizes": Picks.of_sorted(experts, num_experts, on_device=False),
        "ends": Picks.of_sorted(experts, num_experts, on_device=True),
    }
    return found | ({"one": Picks(int(experts[0]))} if len(experts.unique()) == 1 else {})


# Limits on what is copied: elsewhere, and on a processor.
COPIED = ("_FEW_COPIED_PARAMS", "_FEW_COPIED_BY_CPU")
# How many rows take which way, so that a handful of tokens takes any of them.
WAYS = {
    "each row its own cores": dict.fromkeys(COPIED, 1 << 60),
    "sorted rows": dict.fromkeys(COPIED, -1) | {"_MANY_ROWS": 1 << 60},
    "expert by expert": dict.fromkeys(COPIED, -1) | {"_MANY_ROWS": 0},
}


SCHEDULES = (*WAYS, "rebuild", "cached", "compiling, few rows", "compiling, many rows")


@contextmanager
def schedule(name: str, ffn: FeedForward | None = None):
    """ "compiling": what is traced by torch.compile, run as it stands."""
    with pytest.MonkeyPatch.context() as patch:
        if name in ("rebuild", "cached"):
            patch.setattr(ffn, "schedule", name)
            patch.setattr(ffn, "cache", modeling.MatrixCache("hit") if name == "cached" else None)
        elif name.startswith("compiling"):
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            name = "each row its own cores" if name.endswith("few rows") else "sorted rows"
        for constant, value in WAYS.get(name, {}).items():
            patch.setattr(modeling, constant, value)
        yield


@st.composite
def factors(draw, size: int, sites: int):
    """`sites` numbers whose product is `size`."""
    dims = [1] * sites
    for prime in (2, 3, 5, 7):
        while size % prime == 0:
            dims[draw(st.integers(0, sites - 1))] *= prime
            size //= prime
    assert size == 1
    return dims


@st.composite
def terms(draw, rows: int, cols: int):
    sites = draw(st.integers(1, 4))
    ins, outs = draw(factors(rows, sites)), draw(factors(cols, sites))
    bonds = [draw(st.integers(1, 3)) for _ in range(sites - 1)]
    shared = [draw(st.booleans()) for _ in range(sites)]
    carrying = [k for k in range(sites) if ins[k] > 1], [k for k in range(sites) if outs[k] > 1]
    if carrying[0] and carrying[1] and carrying[0][-1] > carrying[1][0]:
        return chain(ins, outs, bonds, shared)
    return chain(ins, outs, bonds, shared, [draw(st.booleans()) for _ in range(sites)])


@st.composite
def specs(draw, rows: int, cols: int):
    return {
        "terms": draw(st.lists(terms(rows, cols), min_size=1, max_size=2)),
        "bias": draw(st.sampled_from([None, "shared", "per-expert"])),
    }


@st.composite
def mixtures(draw, num_experts: int, top_k: int, **selection):
    hidden, inner = draw(st.sampled_from([4, 6])), draw(st.sampled_from([6, 8, 10]))
    form = {"up": draw(specs(hidden, inner)), "down": draw(specs(inner, hidden))}
    if draw(st.booleans()):
        form["gate"] = draw(specs(hidden, inner))
    if draw(st.booleans()):
        form["down"]["bias"] = "once"
    parts = draw(st.sampled_from([n for n in range(1, num_experts + 1) if num_experts % n == 0]))
    shared_experts = draw(st.integers(0, 2))
    more = {"shared_experts": shared_experts, "parts": parts} | selection
    ffn = FeedForward(form, num_experts, top_k, **more).double()
    ffn.act = nn.GELU()
    return fill(ffn, draw(st.integers(0, 99)))


def run_expert(ffn: FeedForward, token: torch.Tensor, expert: int) -> torch.Tensor:
    """What an expert makes of a token (H,)."""
    up = project(ffn.up, token, expert)
    inner = ffn.act(up) if ffn.gate is None else ffn.act(project(ffn.gate, token, expert)) * up
    return project(ffn.down, inner, expert)


def combined(ffn: FeedForward, token: torch.Tensor, weights: dict[int, torch.Tensor]) -> torch.Tensor:
    """The sum for a token (H,) of chosen experts by their weights, and of the shared ones, by the definition.

    Whole FFNs are averaged: with M shared experts all weights are divided by 1 + M. Parts add up.
    """
    num_shared = ffn.num_experts - ffn.router.num_experts
    scale = 1 if ffn.router.parts > 1 else 1 / (1 + num_shared)
    always = {ffn.router.num_experts + number: 1.0 for number in range(num_shared)}
    total = 0 * token
    for expert, weight in (weights | always).items():
        total = total + scale * weight * run_expert(ffn, token, expert)
    return total + ffn.down.bias if ffn.down.bias_kind == "once" else total


def hidden_size(ffn: FeedForward) -> int:
    return ffn.router.weight.shape[1]
