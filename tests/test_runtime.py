"""The shipped module against the definition of a mixture of chains, in float64: token by token."""

from contextlib import contextmanager
from itertools import product
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mpoe_convert.runtime import modeling_mpoe as modeling
from mpoe_convert.runtime.modeling_mpoe import (
    Chain,
    FeedForward,
    Picks,
    Projection,
    Router,
    chain_shapes,
)

SETTINGS = settings(deadline=None, derandomize=True, max_examples=20)
# The router computes in float32 in every dtype, so a float64 mixture is exact to float32 only there.
ROUTER_ROUNDING = 1e-5
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def chain(in_dims, out_dims, bonds, shared) -> dict:
    return {"in_dims": in_dims, "out_dims": out_dims, "bonds": bonds, "shared": shared}


# Input features 12, output features 10, by the way their experts are applied.
TERMS = {
    "one-sided": chain([3, 4, 1], [1, 5, 2], [3, 2], [False, True, False]),
    "one-sided, left only": chain([3, 4], [1, 10], [2], [False, True]),
    "one-sided, right only": chain([12, 1], [5, 2], [2], [True, False]),
    "one-sided, five sites": chain([2, 3, 2, 1, 1], [1, 1, 5, 2, 1], [2, 5, 2, 1], [0, 0, 1, 0, 0]),
    "one-sided, shared centre of two": chain(
        [3, 4, 1, 1], [1, 1, 5, 2], [3, 2, 2], [False, True, True, False]
    ),
    "two-sided": chain([2, 3, 2], [2, 1, 5], [3, 4], [False, True, False]),
    "balanced": chain([2, 2, 3, 1, 1], [1, 2, 1, 1, 5], [2, 3, 3, 4], [0, 0, 1, 0, 0]),
    "dense": chain([12], [10], [], [False]),
    "shared": chain([12], [10], [], [True]),
    "low rank": chain([12, 1], [1, 10], [2], [False, False]),
    "two shared runs": chain([2, 3, 2], [5, 1, 2], [2, 2], [True, False, True]),
}
LORA = [TERMS["shared"], TERMS["low rank"]]
NUM_EXPERTS = 4
CHOICES = [(1, 1), (2, 1), (3, 2), (4, 2), (4, 3), (4, 4)]  # experts, and how many a token gets


def fill(module: nn.Module, seed: int = 0, scale: float = 0.5) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return module


def randn(*shape, seed: int = 1, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


# ---------------------------------------------------------------------------------------------------
# The definition, written without the module's own contraction


def chain_matrix(module: Chain, expert: int) -> torch.Tensor:
    """One expert's matrix: a single einsum over all bonds, then input indices before output indices."""
    names = iter(LETTERS)
    bond, operands, ins, outs = next(names), [], "", ""
    first = bond
    for name, shape, shared in zip(module.core_names, module.shapes, module.shared, strict=True):
        core = getattr(module, name)
        core = core.reshape(shape if shared else (-1, *shape))
        i, o, right = next(names), next(names), next(names)
        operands.append((bond + i + o + right, core if shared else core[expert]))
        ins, outs, bond = ins + i, outs + o, right
    expression = ",".join(indices for indices, _ in operands) + f"->{first}{ins}{outs}{bond}"
    tensor = torch.einsum(expression, *[core for _, core in operands])
    return tensor.reshape(
        prod(shape[1] for shape in module.shapes), prod(shape[2] for shape in module.shapes)
    )


def project(module: Projection, row: torch.Tensor, expert: int) -> torch.Tensor:
    y = sum(row @ chain_matrix(term, expert) for term in module.terms)
    if module.bias is None:
        return y
    return y + (module.bias if module.bias.ndim == 1 else module.bias[expert])


def mixture(ffn: FeedForward, tokens: torch.Tensor) -> torch.Tensor:
    """Token by token, expert by expert; tokens (T, H)."""
    rows = []
    for token in tokens:
        logits = ffn.router.weight.double() @ token
        ranked = sorted(range(ffn.num_experts), key=lambda e: -logits[e].item())
        chosen = ranked[: ffn.router.top_k]
        exponentials = [logits[e].exp() for e in chosen]
        weights = [value / sum(exponentials) for value in exponentials]
        if len(chosen) == 1:  # one in value, with the gradient of log p
            log_p = logits[chosen[0]] - logits.exp().sum().log()
            weights = [1 + log_p - log_p.detach()]
        total = 0
        for expert, weight in zip(chosen, weights, strict=True):
            up = project(ffn.up, token, expert)
            gated = None if ffn.gate is None else project(ffn.gate, token, expert)
            inner = ffn.act(up) if gated is None else ffn.act(gated) * up
            total = total + weight * project(ffn.down, inner, expert)
        rows.append(total)
    return torch.stack(rows) if rows else tokens.new_zeros(tokens.shape)


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


# How many rows take which way, so that a handful of tokens takes any of them.
WAYS = {
    "each row its own cores": {"_FEW_COPIED_PARAMS": 1 << 60},
    "sorted rows": {"_FEW_COPIED_PARAMS": -1, "_MANY_ROWS": 1 << 60},
    "expert by expert": {"_FEW_COPIED_PARAMS": -1, "_MANY_ROWS": 0},
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


# ---------------------------------------------------------------------------------------------------
# Strategies


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
    return chain(
        draw(factors(rows, sites)),
        draw(factors(cols, sites)),
        [draw(st.integers(1, 3)) for _ in range(sites - 1)],
        [draw(st.booleans()) for _ in range(sites)],
    )


@st.composite
def specs(draw, rows: int, cols: int):
    return {
        "terms": draw(st.lists(terms(rows, cols), min_size=1, max_size=2)),
        "bias": draw(st.sampled_from([None, "shared", "per-expert"])),
    }


@st.composite
def mixtures(draw, num_experts: int, top_k: int):
    hidden, inner = draw(st.sampled_from([4, 6])), draw(st.sampled_from([6, 8, 10]))
    form = {"up": draw(specs(hidden, inner)), "down": draw(specs(inner, hidden))}
    if draw(st.booleans()):
        form["gate"] = draw(specs(hidden, inner))
    ffn = FeedForward(form, num_experts, top_k).double()
    ffn.act = nn.GELU()
    return fill(ffn, draw(st.integers(0, 99)))


leading = st.sampled_from([(), (1,), (5,), (0,), (2, 3), (2, 0), (0, 3), (1, 1), (2, 1, 2)])


def hidden_size(ffn: FeedForward) -> int:
    return ffn.router.weight.shape[1]


# ---------------------------------------------------------------------------------------------------
# Chains and projections


def rows_and_experts(rows_per_expert, in_features: int):
    experts = torch.tensor([e for e, n in enumerate(rows_per_expert) for _ in range(n)]).long()
    return randn(len(experts), in_features), experts


@pytest.mark.parametrize("counts", [(3, 1, 2, 4), (0, 5, 0, 1), (0, 0, 0, 1), (0, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
def test_chain_multiplies_by_the_experts_matrix(term, counts):
    module = fill(Chain(term, NUM_EXPERTS).double())
    rows, experts = rows_and_experts(counts, 12)
    expected = [row @ chain_matrix(module, e) for row, e in zip(rows, experts.tolist(), strict=True)]
    expected = torch.stack(expected) if expected else rows.new_zeros(0, 10)
    picks = ways(experts, NUM_EXPERTS)
    for way, rebuild in product(picks, (False, True)):
        found = module(rows, picks[way], rebuild)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, msg=way)
    if len(rows):
        with torch.no_grad():
            next(module.parameters()).mul_(1.01)
        for way, rebuild in product(picks, (False, True)):
            assert not torch.allclose(module(rows, picks[way], rebuild), expected, rtol=1e-4)


@pytest.mark.parametrize("name", TERMS)
def test_which_chains_act_on_the_activations(name):
    """No expert's matrix is built where input comes first, output last and only one core has both."""
    module = Chain(TERMS[name], NUM_EXPERTS)
    assert module.acts == (name not in ("two-sided", "balanced", "two shared runs"))


@pytest.mark.parametrize("bias", [None, "shared", "per-expert"])
@pytest.mark.parametrize("rebuild", [False, True], ids=["apply", "rebuild"])
@pytest.mark.parametrize("way", ["each", "sizes", "ends", "one"])
@pytest.mark.parametrize("name", [*TERMS, "lora"])
def test_gradients_of_a_projection(name, way, rebuild, bias):
    """Finite differences in float64, for the rows and for every core; one expert has no row."""
    spec = {"terms": LORA if name == "lora" else [TERMS[name]], "bias": bias}
    module = fill(Projection(spec, NUM_EXPERTS).double())
    rows, experts = rows_and_experts((0, 0, 3, 0) if way == "one" else (1, 0, 2, 1), 12)
    picks = ways(experts, NUM_EXPERTS)[way]
    names = [name for name, _ in module.named_parameters()]

    def call(rows, *values):
        return torch.func.functional_call(
            module, dict(zip(names, values, strict=True)), (rows, picks, rebuild)
        )

    values = [p.detach().clone().requires_grad_() for p in module.parameters()]
    assert torch.autograd.gradcheck(call, (rows.requires_grad_(), *values), fast_mode=True)


def test_shapes_of_the_parameters():
    """Shared cores once, per-expert cores with a leading expert axis, named by site."""
    module = Chain(TERMS["one-sided, shared centre of two"], NUM_EXPERTS)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "aux_0": (4, 1 * 3, 1 * 3),
        "central_1": (3 * 4, 1 * 2),
        "central_2": (2 * 1, 5 * 2),
        "aux_3": (4, 2 * 1, 2 * 1),
    }
    assert chain_shapes(TERMS["dense"]) == [(1, 12, 10, 1)]


@pytest.mark.parametrize("name", TERMS)
def test_flops_are_those_of_the_products(name):
    """Counted by torch while a batch runs with one row, whose expert's matrix is built."""
    from torch.utils.flop_counter import FlopCounterMode

    module = fill(Chain(TERMS[name], NUM_EXPERTS).double())
    counts = []
    for rows in (1, 3):
        with FlopCounterMode(display=False) as counter:
            module(randn(rows, 12), Picks(1))
        counts.append(counter.get_total_flops())
    per_row = (counts[1] - counts[0]) // 2
    assert per_row == module.flops_per_row
    if not module.acts:
        assert counts[0] - per_row == module.rebuild_flops


# ---------------------------------------------------------------------------------------------------
# The mixture


@pytest.mark.parametrize("mode", SCHEDULES)
@pytest.mark.parametrize(("num_experts", "top_k"), CHOICES)
@settings(SETTINGS, max_examples=15)
@given(st.data())
def test_mixture_is_the_definition(num_experts, top_k, mode, data):
    ffn, shape = data.draw(mixtures(num_experts, top_k)), data.draw(leading)
    x = randn(*shape, hidden_size(ffn))
    with schedule(mode, ffn):
        found = ffn(x)
    assert found.shape == x.shape
    expected = mixture(ffn, x.reshape(-1, x.shape[-1])).reshape(x.shape)
    scale = max(1.0, expected.abs().max().item()) if x.numel() else 1.0
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUTER_ROUNDING * scale)
    assert not found.numel() or not torch.equal(fill(ffn, seed=100)(x), found)


@pytest.mark.parametrize("mode", SCHEDULES)
@pytest.mark.parametrize(("num_experts", "top_k"), CHOICES)
@settings(SETTINGS, max_examples=6)
@given(st.data())
def test_gradients_are_those_of_the_definition(num_experts, top_k, mode, data):
    ffn, shape = data.draw(mixtures(num_experts, top_k)), data.draw(leading)
    x = randn(*shape, hidden_size(ffn)).requires_grad_()
    inputs = [x, *ffn.parameters()]
    probe = randn(*x.shape, seed=2)
    with schedule(mode, ffn):
        found = torch.autograd.grad((ffn(x) * probe).sum(), inputs, allow_unused=True)
    flat = mixture(ffn, x.reshape(-1, x.shape[-1])).reshape(x.shape)
    expected = torch.autograd.grad(
        (flat * probe).sum() + 0 * x.sum(), inputs, allow_unused=True, materialize_grads=True
    )
    for tensor, one, other in zip(inputs, found, expected, strict=True):
        one = torch.zeros_like(tensor) if one is None else one
        scale = max(1.0, other.abs().max().item()) if other.numel() else 1.0
        torch.testing.assert_close(one, other, rtol=0, atol=10 * ROUTER_ROUNDING * scale)


def mirrored(term: dict) -> dict:
    """The same kind of chain for a matrix of the transposed shape."""
    names = ("out_dims", "in_dims", "bonds", "shared")
    return chain(*[term[name][::-1] for name in names])


def make_ffn(name="one-sided", top_k=2, bias=None) -> FeedForward:
    """A gated mixture, 12 -> 10 -> 12."""
    terms = LORA if name == "lora" else [TERMS[name]]
    up = {"terms": terms, "bias": bias}
    down = {"terms": [mirrored(term) for term in terms], "bias": bias}
    ffn = FeedForward({"gate": up, "up": up, "down": down}, NUM_EXPERTS, top_k)
    ffn.act = nn.SiLU()
    return fill(ffn)


@SETTINGS
@given(st.integers(1, NUM_EXPERTS), st.integers(0, 5), st.sampled_from([1e-3, 1.0, 1e3]))
def test_combine_weights_are_a_softmax_over_the_chosen(top_k, num_tokens, scale):
    router = fill(Router(12, NUM_EXPERTS, top_k), scale=scale)
    tokens = randn(num_tokens, 12, dtype=torch.float32)
    weights, experts = table(router(tokens))
    assert weights.dtype == torch.float32 and weights.shape == experts.shape == (num_tokens, top_k)
    torch.testing.assert_close(weights.sum(-1), torch.ones(num_tokens))
    logits = (tokens.double() @ router.weight.double().T).detach().numpy()
    assert [set(row) for row in experts.tolist()] == [
        set(row) for row in np.argsort(-logits, axis=1)[:, :top_k].tolist()
    ]
    if top_k > 1 and num_tokens:  # softmax over all experts, then divided by what was chosen
        full = np.exp(logits - logits.max(1, keepdims=True))
        picked = np.take_along_axis(full, experts.numpy(), 1)
        expected = torch.from_numpy(picked / picked.sum(1, keepdims=True)).float()
        torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-5)


def test_one_expert_per_token_has_weight_one_and_a_router_gradient():
    router = fill(Router(12, NUM_EXPERTS, 1))
    tokens = randn(6, 12, dtype=torch.float32)
    weights, experts = table(router(tokens))
    assert torch.equal(weights, torch.ones(6, 1))
    weights.sum().backward()
    # d/dW sum log p(chosen) = sum over tokens of (one-hot - p) x token
    logits = tokens @ router.weight.detach().T
    one_hot = nn.functional.one_hot(experts[:, 0], NUM_EXPERTS).float()
    torch.testing.assert_close(router.weight.grad, (one_hot - logits.softmax(-1)).T @ tokens)
    assert router.weight.grad.abs().max() > 0.1


@pytest.mark.parametrize("top_k", range(1, NUM_EXPERTS + 1))
@pytest.mark.parametrize("name", ["one-sided", "two-sided", "dense"])
def test_equal_experts_make_a_dense_ffn_whatever_the_router_says(name, top_k):
    ffn = make_ffn(name, top_k)
    with torch.no_grad():
        for key, parameter in ffn.named_parameters():
            if ".aux_" in key:
                parameter.copy_(parameter[:1].expand_as(parameter))
    x = randn(3, 5, 12, dtype=torch.float32)
    gate, up, down = (chain_matrix(p.terms[0], 0) for p in (ffn.gate, ffn.up, ffn.down))
    dense = (nn.functional.silu(x @ gate) * (x @ up)) @ down
    torch.testing.assert_close(ffn(x), dense, rtol=1e-4, atol=1e-4)
    fill(ffn.router, seed=7, scale=30.0)
    torch.testing.assert_close(ffn(x), dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", SCHEDULES)
@pytest.mark.parametrize("name", ["one-sided", "two-sided", "dense"])
def test_an_expert_without_tokens_gets_no_gradient_and_does_no_harm(name, mode):
    ffn = make_ffn(name, top_k=1)
    with torch.no_grad():  # logits are the first NUM_EXPERTS features of a token
        ffn.router.weight.copy_(torch.eye(NUM_EXPERTS, 12))
    x = randn(7, 12, dtype=torch.float32)
    x[:, 2] = -100.0
    with torch.no_grad():
        for key, parameter in ffn.named_parameters():
            if ".aux_" in key:
                parameter[2] *= 1e3
    with schedule(mode, ffn):
        y = ffn(x)
    y.sum().backward()
    for key, parameter in ffn.named_parameters():
        if ".aux_" in key:
            assert (parameter.grad[2] == 0).all() and (parameter.grad != 0).any(), key
    with torch.no_grad():
        for key, parameter in ffn.named_parameters():
            if ".aux_" in key:
                parameter[2] = 0
    with schedule(mode, ffn):
        torch.testing.assert_close(ffn(x), y)
    x[0, 2] = 100.0  # seen to fail: the first token's only expert is now the empty one
    assert not torch.allclose(ffn(x)[0], y[0])


@pytest.mark.parametrize("name", ["one-sided", "two-sided", "dense"])
def test_tokens_do_not_see_each_other(name):
    """A batch gives what its tokens give one by one, in any order."""
    ffn = make_ffn(name)
    x = randn(9, 12, dtype=torch.float32)
    together = ffn(x)
    torch.testing.assert_close(torch.cat([ffn(token[None]) for token in x]), together)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ffn(x[order]), together[order])


@pytest.mark.parametrize("adds_residual", [False, True])
def test_the_output_is_its_own_tensor(adds_residual):
    """Stock layers add to it in place; neither the input nor the residual may change by that."""
    ffn = make_ffn()
    ffn.adds_residual = adds_residual
    x, residual = randn(5, 12, dtype=torch.float32), randn(5, 12, seed=3, dtype=torch.float32)
    before = x.clone(), residual.clone()
    y = ffn(x, residual)
    y.add_(1.0)
    y.sum().backward()
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


@pytest.mark.parametrize("mode", SCHEDULES)
@pytest.mark.parametrize("name", ["one-sided", "two-sided", "dense", "lora"])
def test_autocast_computes_in_bfloat16_and_routes_in_float32(name, mode, monkeypatch):
    ffn = make_ffn(name, bias="shared")
    x = randn(6, 12, dtype=torch.float32)
    routed = []
    route = ffn.router.forward

    def noting(*given, **more):
        routed.append(route(*given, **more))
        return routed[-1]

    monkeypatch.setattr(ffn.router, "forward", noting)
    exact = ffn(x)
    with schedule(mode, ffn), torch.autocast("cpu", torch.bfloat16):
        rounded = ffn(x)
    (weights, experts), (autocast_weights, autocast_experts) = map(table, routed)
    assert autocast_weights.dtype == torch.float32
    assert torch.equal(weights, autocast_weights) and torch.equal(experts, autocast_experts)
    error = (rounded - exact).norm() / exact.norm()
    assert 1e-4 < error < 2e-2  # bfloat16 has 8 bits: 4e-3 each in a few products
    rounded.float().square().mean().backward()
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in ffn.parameters())


def test_bfloat16_weights_route_in_float32():
    ffn = make_ffn(bias="shared")
    router = ffn.router.weight.detach().clone()
    ffn.to(torch.bfloat16)
    ffn.router.to(torch.float32)  # as the loader leaves it
    with torch.no_grad():
        ffn.router.weight.copy_(router)
    x = randn(6, 12, dtype=torch.bfloat16)
    y = ffn(x)
    assert y.dtype == torch.bfloat16
    weights, _ = table(ffn.router(x))
    expected = (x.double() @ router.double().T).topk(2).values.softmax(-1)
    torch.testing.assert_close(weights.double(), expected, rtol=0, atol=1e-6)
    exact = make_ffn(bias="shared")
    exact.load_state_dict({name: p.float() for name, p in ffn.state_dict().items()})
    reference = exact(x.float())
    assert (y.float() - reference).norm() / reference.norm() < 2e-2


@pytest.mark.parametrize("name", TERMS)
def test_random_initialisation_keeps_the_scale(name):
    """Freshly initialised matrices have entries near the given standard deviation, none unset."""
    module = Chain(TERMS[name], NUM_EXPERTS)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
    torch.manual_seed(0)
    samples = []
    for _ in range(20):
        module.reset_parameters(0.02)
        samples += [chain_matrix(module, e).detach() for e in range(NUM_EXPERTS)]
    rms = torch.stack(samples).square().mean().sqrt().item()
    assert 0.02 / 3 < rms < 0.02 * 3


@pytest.mark.parametrize(
    ("name", "autocast"),
    [(name, False) for name in ("one-sided", "two-sided", "balanced", "dense", "lora")]
    + [("one-sided", True)],
)
def test_compiles_whole_for_any_number_of_tokens(name, autocast):
    """One graph, forward and backward, for few tokens or many, whichever experts they choose."""
    from torch._dynamo import mark_dynamic, reset
    from torch._dynamo.testing import CompileCounterWithBackend

    reset()
    ffn = make_ffn(name, bias="per-expert")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ffn, fullgraph=True, backend=counter)
    inputs = list(ffn.parameters())
    graphs, tolerance = set(), 3e-2 if autocast else 1e-4
    for num_tokens in (5, 9, 2):
        x = randn(num_tokens, 12, seed=num_tokens, dtype=torch.float32)
        mark_dynamic(x, 0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found, expected = compiled(x), ffn(x)
        assert found.dtype == expected.dtype
        scale = expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)
        gradients = (torch.autograd.grad(y.square().sum(), inputs) for y in (found, expected))
        for one, other in zip(*gradients, strict=True):
            scale = other.abs().max().item()
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance * max(scale, 1.0))
        graphs.add(counter.frame_count)
    assert graphs == {1}
    reset()
