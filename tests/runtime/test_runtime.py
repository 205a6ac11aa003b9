"""The shipped module against the definition of a mixture of chains, in float64: token by token."""

from itertools import product

import numpy as np
import pytest
import torch
from helpers.mixtures import (
    LORA,
    NUM_EXPERTS,
    ROUTER_ROUNDING,
    SCHEDULES,
    SETTINGS,
    TERMS,
    chain_matrix,
    combined,
    fill,
    hidden_size,
    make_ffn,
    mirrored,
    mixtures,
    randn,
    schedule,
    table,
    ways,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mpoe_convert.runtime import modeling_mpoe as modeling
from mpoe_convert.runtime.modeling_mpoe import Chain, FeedForward, Picks, Projection, Router, chain_shapes

CHOICES = [(1, 1), (2, 1), (3, 2), (4, 2), (4, 3), (4, 4)]  # experts, and how many a token gets


# ---------------------------------------------------------------------------------------------------
# The definition, written without the module's own contraction


def mixture(ffn: FeedForward, tokens: torch.Tensor) -> torch.Tensor:
    """Token by token, expert by expert; tokens (T, H)."""
    rows = []
    for token in tokens:
        logits = ffn.router.weight.double() @ token
        ranked = sorted(range(len(logits)), key=lambda e: -logits[e].item())
        chosen, parts, weights = ranked[: ffn.router.top_k], ffn.router.parts, {}
        for expert in chosen:
            alike = [logits[e].exp() for e in chosen if e % parts == expert % parts]
            weights[expert] = logits[expert].exp() / sum(alike)
            if len(alike) == 1:  # one in value, with the gradient of log p, which the token has none of
                logits_of_router = ffn.router.weight.double() @ token.detach()
                log_p = logits_of_router.log_softmax(0)[expert]
                weights[expert] = 1 + log_p - log_p.detach()
        rows.append(combined(ffn, token, weights))
    return torch.stack(rows) if rows else tokens.new_zeros(tokens.shape)


# ---------------------------------------------------------------------------------------------------
# Strategies


leading = st.sampled_from([(), (1,), (5,), (0,), (2, 3), (2, 0), (0, 3), (1, 1), (2, 1, 2)])


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


# Every term in every way with a bias; a bias is added alike to all of them.
GRADIENTS = [
    (name, way, "per-expert") for name in (*TERMS, "lora") for way in ("each", "sizes", "ends", "one")
]
GRADIENTS += [("lora", way, bias) for way in ("each", "one") for bias in (None, "shared")]


@pytest.mark.parametrize("rebuild", [False, True], ids=["apply", "rebuild"])
@pytest.mark.parametrize(("name", "way", "bias"), GRADIENTS)
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
    [(name, False) for name in ("one-sided", "blocks of inputs", "two-sided", "balanced", "dense", "lora")]
    + [("one-sided", True), ("blocks of inputs", True)],
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


@pytest.mark.parametrize("rule", ["top-k", "top-any"])
def test_exports_for_any_number_of_tokens(rule):
    ffn = parts_of_an_ffn(rule)
    lengths = {"hidden_states": {0: torch.export.Dim("tokens", min=2, max=32)}}
    program = torch.export.export(ffn, (randn(6, 12),), dynamic_shapes=lengths).module()
    for tokens in (3, 9):
        x = randn(tokens, 12, seed=tokens)
        torch.testing.assert_close(program(x), ffn(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.parametrize("limits", [("_FEW_COPIED_BY_CPU",), ("_FEW_COPIED_BY_CPU", "_FEW_COPIED_PARAMS")])
@pytest.mark.parametrize("rule", ["top-k", "top-any"])
def test_traces_for_any_number_of_tokens(rule, limits, monkeypatch):
    """Sizes of the example that Python reads would stay in the trace."""
    for name in limits:
        monkeypatch.setattr(modeling, name, -1)
    ffn = parts_of_an_ffn(rule)
    with torch.no_grad():
        traced = torch.jit.trace(ffn, (randn(6, 12),), check_trace=False)
        for tokens in (3, 9):
            x = randn(tokens, 12, seed=tokens)
            torch.testing.assert_close(traced(x), ffn(x))


def parts_of_an_ffn(rule: str) -> FeedForward:
    """Four experts, of which two at a time hold the same neurons."""
    term = TERMS["one-sided"]
    form = {
        "up": {"terms": [term], "bias": None},
        "down": {"terms": [mirrored(term)], "bias": None},
    }
    ffn = FeedForward(form, 4, 4 if rule == "top-any" else 2, rule=rule, parts=2)
    ffn.act = nn.SiLU()
    return fill(ffn).eval()
