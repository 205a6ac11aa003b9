"""Choices of any number per token: a rule that no release has, against loops over tokens and experts."""

import functools
import shutil
import sys
from math import ceil

import pytest
import torch
import transformers
from helpers.artifacts import perturb
from helpers.mixtures import (
    NUM_EXPERTS,
    ROUTER_ROUNDING,
    SCHEDULES,
    SETTINGS,
    combined,
    fill,
    hidden_size,
    make_ffn,
    mixtures,
    randn,
    schedule,
)
from helpers.models import generative
from helpers.tiny import make_inputs
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from mpoe_convert import router_stats
from mpoe_convert.artifact.verify_child import by_expert
from mpoe_convert.exports.average import combine_weights
from mpoe_convert.runtime import modeling_mpoe as modeling
from mpoe_convert.runtime.modeling_mpoe import (
    Choices,
    FeedForward,
    Router,
    Routing,
    load_balancing_loss,
    router_z_loss,
)
from mpoe_convert.source.json_files import read_json_object, write_json
from mpoe_convert.training.router_stats import RouterStats

KNOWN = "expert-choice, top-any, top-k, top-p"
LEAST = 0.4  # probability that an expert needs to be chosen


def threshold(router, logits, bias, context):
    """Every expert of at least this probability: none, one or several per token."""
    probabilities = logits.softmax(-1)
    scores = probabilities if bias is None else probabilities + bias
    ranked, order = scores.sort(descending=True, stable=True)
    tokens, place = (ranked >= LEAST).nonzero(as_tuple=True)
    experts = order[tokens, place]
    return Choices(tokens, experts, probabilities[tokens, experts])


@pytest.fixture(autouse=True)
def known_rule(monkeypatch):
    monkeypatch.setitem(modeling.RULES, "threshold", threshold)


def irregular(ffn: FeedForward) -> FeedForward:
    ffn.router.select = threshold
    return ffn


def chosen(ffn: FeedForward, token: torch.Tensor) -> dict[int, torch.Tensor]:
    """{expert: weight} of a token (H,), the first choice first, by the definition of the rule."""
    probabilities = (ffn.router.weight.double() @ token).softmax(-1)
    ranked = sorted(range(len(probabilities)), key=lambda e: -probabilities[e].item())
    return {e: probabilities[e] for e in ranked if probabilities[e] >= LEAST}


def is_clear(ffn: FeedForward, tokens: torch.Tensor) -> bool:
    """Whether rounding in the router, which computes in float32, changes no choice."""
    probabilities = (tokens @ ffn.router.weight.double().T).softmax(-1)
    ranked = probabilities.sort(-1).values
    gaps = (ranked[:, 1:] - ranked[:, :-1]).flatten()
    return all(not len(each) or each.abs().min() > 1e-5 for each in ((probabilities - LEAST).flatten(), gaps))


def mixture(ffn: FeedForward, tokens: torch.Tensor) -> torch.Tensor:
    """Token by token, expert by expert; tokens (T, H)."""
    rows = [combined(ffn, token, chosen(ffn, token)) for token in tokens]
    return torch.stack(rows) if rows else tokens.new_zeros(tokens.shape)


def router(seed: int = 0, scale: float = 1.0) -> Router:
    return fill(Router(12, NUM_EXPERTS, 2, "threshold"), seed, scale)


def some_tokens(num: int = 40) -> torch.Tensor:
    return randn(num, 12, dtype=torch.float32)


# ---------------------------------------------------------------------------------------------------
# The mixture


@st.composite
def cases(draw):
    ffn = irregular(draw(mixtures(draw(st.integers(1, 4)), 1)))
    fill(ffn.router, draw(st.integers(0, 99)), draw(st.sampled_from([0.1, 0.5])))
    x = randn(draw(st.sampled_from([0, 1, 2, 7])), hidden_size(ffn), seed=draw(st.integers(0, 99)))
    assume(is_clear(ffn, x))
    return ffn, x


@pytest.mark.parametrize("mode", SCHEDULES)
@settings(SETTINGS, max_examples=12)
@given(st.data())
def test_mixture_is_the_definition(mode, data):
    ffn, x = data.draw(cases())
    with schedule(mode, ffn):
        found = ffn(x)
    expected = mixture(ffn, x)
    scale = max(1.0, expected.abs().max().item()) if x.numel() else 1.0
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUTER_ROUNDING * scale)
    for token, row in zip(x, found, strict=True):
        assert chosen(ffn, token) or ffn.shared or ffn.down.bias_kind == "once" or not row.any()


@pytest.mark.parametrize("mode", SCHEDULES)
@settings(SETTINGS, max_examples=12)
@given(st.data())
def test_gradients_are_those_of_the_definition(mode, data):
    ffn, x = data.draw(cases())
    inputs = [x.requires_grad_(), *ffn.parameters()]
    probe = randn(*x.shape, seed=2)
    with schedule(mode, ffn):
        found = torch.autograd.grad((ffn(x) * probe).sum(), inputs, allow_unused=True)
    total = (mixture(ffn, x) * probe).sum() + 0 * x.sum()
    expected = torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
    for tensor, one, other in zip(inputs, found, expected, strict=True):
        one = torch.zeros_like(tensor) if one is None else one
        scale = max(1.0, other.abs().max().item()) if other.numel() else 1.0
        torch.testing.assert_close(one, other, rtol=0, atol=10 * ROUTER_ROUNDING * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", SCHEDULES)
def test_in_half_precision(mode, dtype):
    """Tokens have none, one and two choices; a sum is rounded once."""
    ffn = irregular(make_ffn(bias="shared"))
    ffn.to(dtype).router.to(torch.float32)
    x = some_tokens().to(dtype)
    counts = {len(chosen(ffn, token.double())) for token in x}
    assert counts == {0, 1, 2}
    with schedule(mode, ffn):
        found = ffn(x)
    exact = irregular(make_ffn(bias="shared"))
    exact.load_state_dict({name: p.float() for name, p in ffn.state_dict().items()})
    with schedule(mode, exact), torch.autocast("cpu", torch.bfloat16):
        rounded = exact(x.float())
    expected = mixture(exact.double(), x.double())
    assert found.dtype == dtype
    error = (found.double() - expected).norm() / expected.norm()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)
    assert (rounded.double() - expected).norm() / expected.norm() < 2e-2


# ---------------------------------------------------------------------------------------------------
# What is made of choices


def by_loop(module: Router, tokens: torch.Tensor) -> list[tuple[int, int]]:
    """(token, expert) of all choices, token by token."""
    ffn = FeedForward.__new__(FeedForward)
    torch.nn.Module.__init__(ffn)
    ffn.router = module
    return [(t, e) for t, token in enumerate(tokens.double()) for e in chosen(ffn, token)]


@pytest.mark.parametrize("masked", [False, True])
def test_losses(masked):
    module, tokens = router(), some_tokens()
    routing = module(tokens)
    counted = [not masked or t % 3 != 1 for t in range(len(tokens))]
    mask = torch.tensor(counted).long() if masked else None
    probabilities = routing.logits.double().softmax(-1)
    share, mean, squares = [0.0] * NUM_EXPERTS, [0.0] * NUM_EXPERTS, 0.0
    for token, expert in by_loop(module, tokens):
        share[expert] += counted[token] / sum(counted)
    for token, row in enumerate(probabilities):
        for expert in range(NUM_EXPERTS):
            mean[expert] += row[expert].item() * counted[token] / sum(counted)
        squares += routing.logits[token].double().logsumexp(-1).item() ** 2 * counted[token] / sum(counted)
    expected = NUM_EXPERTS * sum(f * p for f, p in zip(share, mean, strict=True))
    assert load_balancing_loss(routing, mask).item() == pytest.approx(expected, rel=1e-5)
    assert router_z_loss(routing, mask).item() == pytest.approx(squares, rel=1e-5)
    other = module(some_tokens(39))
    assert load_balancing_loss(other, None if mask is None else mask[:39]).item() != pytest.approx(expected)


@pytest.mark.parametrize("factor", [0.3, 0.8, 5.0])
@pytest.mark.parametrize("masked", [False, True])
def test_capacity(factor, masked):
    """First choices before second ones, early tokens before late ones; padding takes no room."""
    module, tokens = router().train(), some_tokens()
    choices = by_loop(module, tokens)
    real = [not masked or t % 4 != 2 for t in range(len(tokens))]
    room = max(ceil(factor * sum(real[t] for t, _ in choices) / NUM_EXPERTS), 1)
    rank = [sum(t == other for other, _ in choices[:n]) for n, (t, _) in enumerate(choices)]
    assert set(rank) == {0, 1}
    taken, kept = [0] * NUM_EXPERTS, [True] * len(choices)
    for n in sorted(range(len(choices)), key=lambda n: (rank[n], choices[n][0])):
        token, expert = choices[n]
        if real[token]:
            taken[expert] += 1
            kept[n] = taken[expert] <= room
    module.capacity_factor = factor
    routing = module(tokens, mask=torch.tensor(real).long() if masked else None)
    assert routing.room.tolist() == kept and all(kept) == (factor == 5.0)
    served = routing.served()
    found = list(zip(served.tokens.tolist(), served.experts.tolist(), strict=True))
    assert found == [choice for choice, is_kept in zip(choices, kept, strict=True) if is_kept]


@pytest.mark.parametrize("rule", ["top-k", "threshold"])
@pytest.mark.parametrize("mode", ["each row its own cores", "sorted rows", "expert by expert", "rebuild"])
def test_dropped_choices_are_not_computed(mode, rule, monkeypatch):
    """As many rows go through the experts as there is room for; compiled code computes them for nothing."""
    ffn = make_ffn().train()
    ffn.router.select = modeling.RULES[rule]
    ffn.router.capacity_factor = 0.5
    x = some_tokens()
    routing = ffn.router(x)
    kept = int(routing.room.sum())
    assert 0 < kept < len(routing.room)
    rows, experts = [], ffn._experts

    def count(inputs, *rest, **more):
        rows.append(len(inputs.rows))
        return experts(inputs, *rest, **more)

    monkeypatch.setattr(ffn, "_experts", count)
    with schedule(mode, ffn):
        found = ffn(x)
    assert sum(rows) == kept
    rows.clear()
    with schedule("compiling, many rows", ffn):
        torch.testing.assert_close(ffn(x), found, rtol=1e-4, atol=1e-5)
    assert sum(rows) == len(routing.room)
    weights = routing.choices.weights * routing.room
    outputs = ffn.run_all_experts(x)  # (E, T, H)
    expected = torch.zeros_like(x)
    for token, expert, weight in zip(routing.choices.tokens, routing.choices.experts, weights, strict=True):
        expected[token] += weight * outputs[expert, token]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_router_stats(masked):
    module, tokens = router().train(), some_tokens()
    module.capacity_factor = 0.8
    counted = [not masked or t % 3 != 1 for t in range(len(tokens))]
    routing = module(tokens)
    stats = RouterStats(NUM_EXPERTS)
    for _ in range(2):
        stats.add(routing, torch.tensor(counted) if masked else None)
    load, lost, total = [0] * NUM_EXPERTS, 0.0, 0.0
    probabilities = routing.logits.double().softmax(-1)
    for (token, expert), has_room in zip(by_loop(module, tokens), routing.room.tolist(), strict=True):
        load[expert] += counted[token]
        total += probabilities[token, expert].item() * counted[token]
        lost += probabilities[token, expert].item() * counted[token] * (not has_room)
    assert stats.num_tokens == 2 * sum(counted)
    assert stats.load.tolist() == pytest.approx([each / sum(load) for each in load])
    assert stats.dropped == pytest.approx(lost / total) and stats.dropped > 0


def test_a_call_without_any_choice():
    """All tokens are undecided: the output is zero, and a backward pass goes through."""
    ffn = irregular(make_ffn()).train()
    with torch.no_grad():
        ffn.router.weight.zero_()
    for mode in ("each row its own cores", "sorted rows", "expert by expert"):
        with schedule(mode, ffn):
            found = ffn(some_tokens())
        assert not found.any()
        found.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in ffn.parameters())
    routing = ffn.router(some_tokens())
    assert load_balancing_loss(routing) == 0 and len(routing.choices.experts) == 0


def test_a_call_without_any_choice_learns_from_the_losses():
    ffn = irregular(make_ffn()).train()
    fill(ffn.router, scale=1e-3)
    ffn.router_pass = modeling.RouterPass(True, False, 0.0, 1.0, lambda *_: None)
    found = ffn(some_tokens())
    assert len(ffn.router_pass.calls[0].routing.choices.experts) == 0 and not found.any()
    found.sum().backward()
    gradient = ffn.router.weight.grad.clone()
    ffn.zero_grad()
    router_z_loss(ffn.router(some_tokens())).backward()
    assert gradient.any()
    torch.testing.assert_close(gradient, ffn.router.weight.grad)


def test_costs_are_those_of_the_choices():
    """FLOPs as torch counts them; the estimate that `auto` goes by takes the number of choices."""
    ffn, x = irregular(make_ffn()), some_tokens(37)
    num_choices = len(ffn.router(x).choices.experts)
    assert num_choices not in (37, 74)
    with schedule("sorted rows", ffn), torch.no_grad(), FlopCounterMode(display=False) as counter:
        ffn.schedule = "apply"
        ffn(x)
    assert counter.get_total_flops() == ffn.flops(37, "apply", num_choices)
    assert ffn.flops(37, "apply", 74) == ffn.flops(37, "apply")
    assert ffn.work(37, 0).experts == 0 and ffn.work(1, 4).experts == 4


# ---------------------------------------------------------------------------------------------------
# A whole model


@pytest.fixture
def load(artifact, tmp_path, monkeypatch):
    def load(model_type: str = "gpt2", **options):
        _, out = artifact(model_type, noise=0.3)
        folder = tmp_path / model_type
        if not folder.exists():
            shutil.copytree(out, folder)
            perturb(folder)
            config = read_json_object(folder / "config.json")
            config["mpoe"]["rule"] = "threshold"
            write_json(folder / "config.json", config)
        cls = get_class_from_dynamic_module("modeling_mpoe.FeedForward", folder)
        monkeypatch.setitem(sys.modules[cls.__module__].RULES, "threshold", threshold)
        auto = getattr(transformers, generative(model_type))
        return auto.from_pretrained(folder, trust_remote_code=True, **options)

    return load


def routings(model, inputs) -> dict[str, Routing]:
    found, handles = {}, []
    for path, ffn in model.mixtures():
        hook = functools.partial(lambda path, _, __, out: found.update({path: out}), path)
        handles.append(ffn.router.register_forward_hook(hook))
    torch.manual_seed(0)
    model(**inputs)
    for handle in handles:
        handle.remove()
    return found


def test_an_unknown_rule_is_named(artifact, tmp_path):
    with pytest.raises(ValueError, match=f"the rule 'best': this file knows {KNOWN}, threshold"):
        Router(12, NUM_EXPERTS, 2, "best")
    folder = shutil.copytree(artifact("gpt2")[1], tmp_path / "out")
    config = read_json_object(folder / "config.json")
    assert "rule" not in config["mpoe"]
    config["mpoe"]["rule"] = "best"
    write_json(folder / "config.json", config)
    with pytest.raises(ValueError, match=f"the rule 'best': this file knows {KNOWN}"):
        transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "t5"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_a_model_trains_and_generates(model_type, load, tmp_path):
    coefs = {"router_aux_loss_coef": 0.3, "router_z_loss_coef": 0.2, "router_capacity_factor": 0.8}
    model = load(model_type, **coefs).train()
    inputs = make_inputs(model, generative(model_type))
    inputs.pop("decoder_input_ids", None)
    inputs["labels"] = inputs["input_ids"].clone()
    found = routings(model, inputs)
    counts = torch.cat([each.choices.tokens.bincount(minlength=len(each.logits)) for each in found.values()])
    assert {0, 1} <= set(counts.tolist()) <= {0, 1, 2} and not all(each.room.all() for each in found.values())
    gradients = []
    for reentrant in (None, True, False):
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.zero_grad()
        torch.manual_seed(0)
        outputs = model(**inputs, output_router_logits=True)
        outputs.loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for checkpointed in gradients[1:]:
        for name, expected in gradients[0].items():
            torch.testing.assert_close(checkpointed[name], expected, rtol=1e-3, atol=1e-5, msg=name)
    aux = torch.stack([load_balancing_loss(each) for each in found.values()]).mean()
    torch.testing.assert_close(outputs.aux_loss, aux)
    model.eval().save_pretrained(tmp_path / "saved")
    ids = inputs["input_ids"]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "attention_mask": ids > -1}
    cached, whole = (model.generate(ids, **options, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, whole)
    assert read_json_object(tmp_path / "saved" / "config.json")["mpoe"]["rule"] == "threshold"


def test_statistics_and_averages_of_a_model(load):
    model = load("llama").eval()
    batch = {"input_ids": torch.arange(3, 27).reshape(2, 12), "attention_mask": torch.ones(2, 12).long()}
    batch["attention_mask"][1, 7:] = 0
    real = batch["attention_mask"].flatten().bool()
    with torch.no_grad():
        found = routings(model, batch)
        with router_stats(model) as stats:
            model(**batch)
    totals = combine_weights(model, [batch])
    for path, routing in found.items():
        load, weights = torch.zeros(3).double(), torch.zeros(3).double()
        for token, expert, weight in zip(*routing.choices[:3], strict=True):
            load[expert] += real[token]
            weights[expert] += real[token] * weight
        torch.testing.assert_close(stats[path].load, load / load.sum())
        torch.testing.assert_close(totals[path], weights)


def test_the_balancing_bias_sees_the_choices(load):
    model = load("gpt2", router_bias_update_rate=0.1, router_aux_loss_coef=0.0).train()
    inputs = make_inputs(model, generative("gpt2"))
    expected = {
        path: each.choices.experts.bincount(minlength=3) for path, each in routings(model, inputs).items()
    }
    assert {path: ffn.load.tolist() for path, ffn in model.mixtures()} == {
        path: load.tolist() for path, load in expected.items()
    }
    model.update_router_bias()
    for path, ffn in model.mixtures():
        load = expected[path].float()
        torch.testing.assert_close(ffn.balance_bias, 0.1 * (load.mean() - load).sign())


def only(ffn: FeedForward, expert: int, x: torch.Tensor) -> torch.Tensor:
    return ffn.run_all_experts(x.flatten(0, -2))[expert].reshape(x.shape)


def test_all_tokens_to_one_expert(load):
    model = load("gpt2").eval()
    inputs = make_inputs(model, generative("gpt2"))
    for expert, each in enumerate(by_expert(model, range(3))):
        with torch.no_grad():
            found = each(**inputs).logits
            for _, ffn in model.mixtures():
                ffn.forward = functools.partial(only, ffn, expert)
            torch.testing.assert_close(found, model(**inputs).logits)
        for _, ffn in model.mixtures():
            del ffn.forward
