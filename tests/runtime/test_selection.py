"""Rules top-p (XMoE, arXiv 2403.18926) and top-any (DynMoE, arXiv 2405.14297), against their definitions.

The definitions are written here token by token. In float64 autograd differentiates them, with the rules that
the papers give where a step has no derivative of its own.
"""

import shutil

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
from helpers.models import assert_same_outputs, generative
from helpers.tiny import make_inputs
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mpoe_convert import router_stats
from mpoe_convert.runtime import modeling_mpoe as modeling
from mpoe_convert.runtime.modeling_mpoe import FeedForward, Router, efficiency_loss, likeness_loss

VARYING = ("top-p", "top-any")
THRESHOLD = 0.7


def scores(router: Router, token: torch.Tensor) -> torch.Tensor:
    """(E,) the router's logits of a token (H,): products, or cosines where experts have thresholds."""
    weight = router.weight.double()
    products = torch.stack([(row * token).sum() for row in weight])
    if router.threshold_bias is None:
        return products
    return products / torch.stack([row.square().sum().sqrt() for row in weight]) / token.square().sum().sqrt()


def weight_of_one(router: Router, token: torch.Tensor, expert: int) -> torch.Tensor:
    """It has the gradient of log p to the router alone: it does not depend on the token."""
    probability = scores(router, token.detach()).softmax(0)[expert]
    return probability / probability.detach()


def chosen(router: Router, token: torch.Tensor) -> dict[int, torch.Tensor]:
    """{expert: weight} of a token (H,)."""
    logits = scores(router, token)
    ranked = sorted(range(len(logits)), key=lambda e: -logits[e].item())
    if router.threshold_bias is not None:
        sigmoid = [1 / (1 + (-value).exp()) for value in (logits, router.threshold_bias.double())]
        values = sigmoid[0] - sigmoid[1]
        passing = sorted((e for e in ranked if values[e] > 0), key=lambda e: -values[e].item())
        found = passing[: router.top_k] or ranked[:1]
        gates = {e: 1 + (values[e] - values[e].detach()) for e in found}  # the sign's gradient is one
    else:
        values = logits.exp() / logits.exp().sum()
        found = []
        for e in ranked[: router.top_k]:
            if sum(values[other].item() for other in found) < router.threshold:
                found.append(e)
        gates = {e: values[e] for e in found}
        if router.combine == "raw":
            return gates
    weights, has_gates = {}, router.threshold_bias is not None
    for e in found:
        total = sum(gates[other] for other in found if other % router.parts == e % router.parts)
        alone = sum(other % router.parts == e % router.parts for other in found) == 1
        if not alone:
            weights[e] = gates[e] / total
        else:
            weights[e] = gates[e] / gates[e].detach() if has_gates else weight_of_one(router, token, e)
    return weights


def is_clear(router: Router, tokens: torch.Tensor) -> bool:
    """Whether rounding in the router, which computes in float32, changes no choice."""
    for token in tokens:
        logits = scores(router, token).detach()
        ranked = logits.sort(descending=True).values
        gaps = [*(ranked[:-1] - ranked[1:])]
        if router.threshold_bias is None:
            gaps += [*(logits.softmax(-1).sort(descending=True).values.cumsum(-1)[:-1] - router.threshold)]
        else:
            margins = logits.sigmoid() - router.threshold_bias.double().sigmoid()
            margins = margins.sort().values
            gaps += [*margins, *(margins[1:] - margins[:-1])]
        if min(abs(gap) for gap in gaps) < 1e-5:
            return False
    return True


def definition(ffn: FeedForward, tokens: torch.Tensor) -> torch.Tensor:
    rows = [combined(ffn, token, chosen(ffn.router, token)) for token in tokens]
    return torch.stack(rows) if rows else tokens.new_zeros(tokens.shape)


@st.composite
def cases(draw, rule: str):
    number = draw(st.integers(2, 4))
    ffn = draw(mixtures(number, draw(st.integers(2, number)), rule=rule, threshold=THRESHOLD))
    fill(ffn.router, draw(st.integers(0, 99)), draw(st.sampled_from([0.1, 0.5])))
    if rule == "top-p":
        ffn.router.combine = draw(st.sampled_from(["renormalised", "raw"]))
    x = randn(draw(st.sampled_from([0, 1, 2, 7])), hidden_size(ffn), seed=draw(st.integers(0, 99)))
    assume(is_clear(ffn.router, x))
    return ffn, x


@pytest.mark.parametrize("rule", VARYING)
@pytest.mark.parametrize("mode", SCHEDULES)
@settings(SETTINGS, max_examples=8)
@given(st.data())
def test_mixture_is_the_definition(mode, rule, data):
    """Forward and gradients, of every form, with parts and shared experts; compiled code too."""
    ffn, x = data.draw(cases(rule))
    x.requires_grad_()
    with schedule(mode, ffn):
        found = ffn(x)
    expected = definition(ffn, x)
    scale = max(1.0, expected.abs().max().item()) if x.numel() else 1.0
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUTER_ROUNDING * scale)
    if mode == "cached":  # which is for inference
        return
    inputs, probe = [x, *ffn.parameters()], randn(*x.shape, seed=2)
    one = torch.autograd.grad((found * probe).sum(), inputs, allow_unused=True, materialize_grads=True)
    total = (expected * probe).sum() + 0 * x.sum()
    other = torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
    for ours, theirs in zip(one, other, strict=True):
        scale = max(1.0, theirs.abs().max().item()) if theirs.numel() else 1.0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=20 * ROUTER_ROUNDING * scale)


def router(rule: str, seed: int = 0, scale: float = 0.5, top_k: int = NUM_EXPERTS) -> Router:
    return fill(Router(12, NUM_EXPERTS, top_k, rule, threshold=THRESHOLD), seed, scale)


def some_tokens(num: int = 40) -> torch.Tensor:
    return randn(num, 12, dtype=torch.float32)


@pytest.mark.parametrize("rule", ["top-k", *VARYING])
@pytest.mark.parametrize("parts", [1, 2, NUM_EXPERTS])
@pytest.mark.parametrize("top_k", [1, 2, NUM_EXPERTS])
def test_choices_are_the_same_without_gradients(rule, parts, top_k):
    """What only gradients need is left out then: the weight of an expert that is alone is one as it is."""
    module = fill(Router(12, NUM_EXPERTS, top_k, rule, parts, THRESHOLD), 0, 0.5)
    learning = module(some_tokens()).choices
    with torch.no_grad():
        found = module(some_tokens()).choices
    for one, other in zip(found[:3], learning[:3], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("rule", VARYING)
@pytest.mark.parametrize("masked", [False, True])
def test_fixed_shapes_hold_the_same_choices(rule, masked, monkeypatch):
    """In compiled code as many choices per token as there may be; what is not chosen counts for nothing."""
    module, tokens = router(rule).train(), some_tokens()
    module.capacity_factor = 0.7
    mask = (torch.arange(40) % 3 != 1).long() if masked else None
    found = module(tokens, mask=mask)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    fixed = module(tokens, mask=mask)
    assert len(fixed.choices.experts) == 40 * NUM_EXPERTS and 40 < len(found.choices.experts) < 160
    real = fixed.choices.take(fixed.choices.real.nonzero().squeeze(-1))
    for one, other in zip(real[:3], found.choices[:3], strict=True):
        assert torch.equal(one, other)
    assert not fixed.choices.weights[~fixed.choices.real].any()
    assert torch.equal(fixed.choices.load(NUM_EXPERTS, mask), found.choices.load(NUM_EXPERTS, mask))
    assert torch.equal(fixed.room[fixed.choices.real], found.room) and not found.room.all()
    assert modeling.load_balancing_loss(fixed, mask) == modeling.load_balancing_loss(found, mask)


@pytest.mark.parametrize("rule", VARYING)
def test_a_limit_takes_the_best(rule):
    whole, limited = (router(rule, top_k=top_k)(some_tokens()).choices for top_k in (NUM_EXPERTS, 2))
    kept = whole.ranks() < 2
    assert torch.equal(limited.tokens, whole.tokens[kept]) and not kept.all()
    assert torch.equal(limited.experts, whole.experts[kept])


def test_learned_thresholds_take_no_balancing_bias():
    made = make_ffn()
    made.add_balance_bias()
    assert made.balance_bias is not None
    made.rule = "top-any"
    with pytest.raises(ValueError, match="rule 'top-any', whose experts have thresholds that are learned"):
        made.add_balance_bias()


def test_ranks_with_a_balancing_bias():
    """It changes the order in which experts are taken, not what they add up to, nor their weights."""
    module, tokens = router("top-p"), some_tokens()
    bias = torch.tensor([0.5, -0.5, 0.0, 0.3])
    choices = module(tokens, bias).choices
    for token, logits in enumerate(module(tokens).logits.double()):
        p = logits.softmax(-1)
        found, total = [], 0.0
        for expert in (p + bias).sort(descending=True).indices.tolist():
            if total >= THRESHOLD:
                break
            found, total = [*found, expert], total + p[expert].item()
        own = choices.tokens == token
        assert choices.experts[own].tolist() == found
        torch.testing.assert_close(
            choices.weights[own].double(), p[found] / p[found].sum(), rtol=0, atol=1e-6
        )


# ---------------------------------------------------------------------------------------------------
# Losses of top-any


@pytest.mark.parametrize("masked", [False, True])
def test_losses_and_their_gradients(masked):
    module, tokens = router("top-any").train(), some_tokens()
    counted = [not masked or t % 3 != 1 for t in range(len(tokens))]
    routing = module(tokens)
    mask = torch.tensor(counted).long() if masked else None
    found = [routing.likeness, efficiency_loss(routing.gates, mask)]
    rows = module.weight.detach().double().requires_grad_()
    bias = module.threshold_bias.detach().double().requires_grad_()
    norms = rows.square().sum(1).sqrt()
    squares = 0.0
    for e in range(NUM_EXPERTS):
        for f in range(NUM_EXPERTS):
            squares = squares + ((rows[e] @ rows[f]) / norms[e] / norms[f] - float(e == f)).square()
    share, number = 0.0, 0
    for token in (token for token, counts in zip(tokens.double(), counted, strict=True) if counts):
        for e in range(NUM_EXPERTS):
            margin = torch.sigmoid(rows[e] @ token / norms[e] / token.norm()) - torch.sigmoid(bias[e])
            if margin > 0:  # the others get no gradient
                share, number = share + 1 + margin - margin.detach(), number + 1
    share = share / sum(counted) / NUM_EXPERTS
    assert 0 < number < sum(counted) * NUM_EXPERTS
    for one, other in zip(found, (squares.sqrt() + norms.mean(), share), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=0)
        ours = torch.autograd.grad(
            one, [module.weight, module.threshold_bias], retain_graph=True, allow_unused=True
        )
        theirs = torch.autograd.grad(other, [rows, bias], retain_graph=True, allow_unused=True)
        for each, wanted in zip(ours, theirs, strict=True):
            assert (each is None) == (wanted is None)
            if each is not None:
                torch.testing.assert_close(each.double(), wanted, rtol=1e-4, atol=1e-6)


def test_orthogonal_short_rows_have_no_likeness():
    assert likeness_loss(1e-3 * torch.eye(3)).item() == pytest.approx(1e-3)
    assert likeness_loss(torch.ones(2, 3)).item() == pytest.approx(2**0.5 + 3**0.5)


@pytest.mark.parametrize("rule", VARYING)
@pytest.mark.parametrize("masked", [False, True])
def test_statistics_count_experts_per_token(rule, masked):
    from mpoe_convert.training.router_stats import RouterStats

    module, tokens = router(rule), some_tokens()
    counted = [not masked or t % 3 != 1 for t in range(len(tokens))]
    stats = RouterStats(NUM_EXPERTS)
    for _ in range(2):
        stats.add(module(tokens), torch.tensor(counted) if masked else None)
    numbers = [len(chosen(module, t)) for t, counts in zip(tokens.double(), counted, strict=True) if counts]
    assert stats.experts_per_token == pytest.approx(sum(numbers) / len(numbers))
    shares = [numbers.count(n) / len(numbers) for n in range(NUM_EXPERTS + 1)]
    assert stats.counts.tolist() == pytest.approx(shares) and len(set(numbers)) > 1


# ---------------------------------------------------------------------------------------------------
# Whole models


def with_router(model, scale: float = 1.0):
    """Routers that give tokens different numbers of experts, as after training."""
    for number, (_, ffn) in enumerate(model.mixtures()):
        fill(ffn.router, number, scale)
    return model


def test_with_weights_that_are_probabilities_it_does_not(artifact):
    folder, out = artifact("gpt2", select="top-p", experts=4, top_k=2)
    auto = transformers.AutoModelForCausalLM
    dense, model = (
        auto.from_pretrained(folder).eval(),
        auto.from_pretrained(out, trust_remote_code=True, router_combine="raw"),
    )
    with pytest.raises(AssertionError):
        assert_same_outputs(dense, model.eval(), make_inputs(dense, generative("gpt2")))


@pytest.fixture
def load(artifact, tmp_path):
    def load(rule: str, model_type: str = "gpt2", kind: str = "mpo", **options):
        _, out = artifact(
            model_type, select=rule, experts=4, kind=kind, noise=0.0 if kind == "adapter" else 0.3
        )
        folder = tmp_path / f"{model_type}-{rule}-{kind}"
        if not folder.exists():
            shutil.copytree(out, folder)
            perturb(folder)
        auto = getattr(transformers, generative(model_type))
        return auto.from_pretrained(folder, trust_remote_code=True, **options)

    return load


@pytest.mark.parametrize(("model_type", "kind"), [("gpt2", "mpo"), ("llama", "split"), ("t5", "dense")])
@pytest.mark.parametrize("rule", VARYING)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_a_model_trains_saves_and_generates(model_type, kind, rule, load, tmp_path):
    model = with_router(load(rule, model_type, kind)).train()
    inputs = make_inputs(model, generative(model_type))
    inputs.pop("decoder_input_ids", None)
    inputs["labels"] = inputs["input_ids"].clone()
    gradients = []
    for reentrant in (None, True, False):
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.zero_grad()
        torch.manual_seed(0)
        model(**inputs, output_router_logits=True).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert all(name in gradients[0] for name, _ in model.named_parameters() if ".router." in name)
    for checkpointed in gradients[1:]:
        for name, expected in gradients[0].items():
            torch.testing.assert_close(checkpointed[name], expected, rtol=1e-3, atol=1e-5, msg=name)
    model.eval().save_pretrained(tmp_path / "saved")
    auto = getattr(transformers, generative(model_type))
    again = auto.from_pretrained(tmp_path / "saved", trust_remote_code=True).eval()
    assert_same_outputs(model, again, inputs, 1e-6)
    ids = inputs["input_ids"]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "attention_mask": ids > -1}
    cached, whole = (again.generate(ids, **options, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, whole)


@pytest.mark.parametrize("rule", VARYING)
def test_padding_does_not_count(rule, load):
    """Losses and statistics are those of the tokens that the attention mask counts."""
    model = with_router(load(rule)).train()
    model.config.router_aux_loss_coef = model.config.router_efficiency_loss_coef = 1.0
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = torch.arange(3, 23).reshape(2, 10)
    mask = (torch.arange(10) < 5).long().expand(2, -1)
    found = []
    for filler in (4, 9):
        model.zero_grad()
        given = torch.where(mask.bool(), ids, torch.tensor(filler))
        with router_stats(model) as stats:
            labels = torch.where(mask.bool(), ids, -100)
            model(input_ids=given, attention_mask=mask, labels=labels).loss.backward()
        numbers = [each.experts_per_token for each in stats.values()]
        found.append((numbers, [ffn.router.weight.grad.clone() for _, ffn in model.mixtures()]))
    assert found[0][0] == found[1][0] and len(set(found[0][0])) > 1
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", VARYING)
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled_in_one_graph(rule, load):
    torch._dynamo.reset()
    model = with_router(load(rule)).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = torch.arange(3, 13)[None]
    losses = []
    for each in (model, torch.compile(model, backend="eager", fullgraph=True)):
        model.zero_grad()
        with torch.set_grad_enabled(True):
            loss = each(ids, labels=ids, output_router_logits=True).loss
        loss.backward()
        losses.append((loss.detach(), [ffn.router.weight.grad.clone() for _, ffn in model.mixtures()]))
    torch._dynamo.reset()
    for one, other in zip(losses[0][1], losses[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("option", [{"router_bias_update_rate": 0.1}, {"router_combine": "raw"}])
def test_options_without_meaning_are_told(option, artifact):
    _, out = artifact("gpt2", select="top-any", experts=4)
    with pytest.raises(ValueError, match=f"{next(iter(option))} .*with the rule 'top-any'.* "):
        transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, **option)


# ---------------------------------------------------------------------------------------------------
# What they are for


def trained(ffn: FeedForward, steps: int, **coefs: float) -> tuple[float, float]:
    """Mean experts per token before and after training on the routers' losses and a task of its own."""
    tokens, target = some_tokens(60), randn(60, 12, seed=5, dtype=torch.float32)
    optimizer = torch.optim.Adam(ffn.parameters(), lr=0.02)
    numbers = []
    for _ in range(steps + 1):
        running = modeling.RouterPass(True, False, 0.0, 0.0, lambda *_: None, **coefs)
        ffn.train().router_pass = running
        loss = (ffn(tokens) - target).square().mean()
        numbers.append(len(running.calls[0].routing.choices.experts) / len(tokens))
        ffn.router_pass = None
        ffn.zero_grad()
        loss.backward()
        optimizer.step()
    return numbers[0], numbers[-1]


def selecting(rule: str, threshold: float = THRESHOLD) -> FeedForward:
    ffn = make_ffn()
    ffn.router = router(rule, scale=0.1)
    ffn.router.threshold = threshold
    return ffn


def test_the_efficiency_loss_moves_thresholds_until_fewer_experts_are_chosen():
    ffn = selecting("top-any")
    first = ffn.router.threshold_bias.detach().clone()
    start, fewer = trained(ffn, 40, efficiency_coef=30.0)
    assert fewer < 0.7 * start
    assert (ffn.router.threshold_bias > first).sum() >= 3
    _, without = trained(selecting("top-any"), 40)
    assert fewer < 0.8 * without


def test_the_likeness_loss_separates_rows():
    ffn = selecting("top-any")
    with torch.no_grad():
        ffn.router.weight += 1.0
    before = likeness_loss(ffn.router.weight)
    without = selecting("top-any")
    without.load_state_dict(ffn.state_dict())
    trained(ffn, 40, likeness_coef=1.0)
    trained(without, 40)
    assert likeness_loss(ffn.router.weight) < 0.8 * before
    assert likeness_loss(ffn.router.weight) < likeness_loss(without.router.weight)


def test_a_lower_threshold_chooses_fewer_experts():
    numbers = [len(selecting("top-p", t).router(some_tokens()).choices.experts) for t in (0.3, 0.6, 0.9)]
    assert numbers[0] < numbers[1] < numbers[2]
    assert trained(selecting("top-p", 0.4), 20)[1] < trained(selecting("top-p", 0.9), 20)[1]
