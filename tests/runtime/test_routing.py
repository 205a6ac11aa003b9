"""Selection, losses and statistics of the routers, against their definitions and transformers' own."""

import inspect
import math

import pytest
import torch
import transformers
from helpers.mixtures import table
from helpers.models import generative
from helpers.tiny import make_inputs
from torch import nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

from mpoe_convert import router_stats
from mpoe_convert.errors import TrainingError
from mpoe_convert.runtime.modeling_mpoe import (
    Router,
    Routing,
    counts_items,
    load_balancing_loss,
    router_z_loss,
    weigh,
)

AUX, Z = 0.3, 0.2
EXPERTS = 3


def load(folder, model_type="gpt2", train=True, **options):
    auto = getattr(transformers, generative(model_type))
    return auto.from_pretrained(folder, trust_remote_code=True, **options).train(train)


def no_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def skew(model, scale: float = 3.0):
    """Routers that prefer an expert by far; the hidden states of tiny models are of size one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("router.weight"):
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def seeded(model, **inputs):
    """A pass with the same dropout each time."""
    torch.manual_seed(0)
    return model(**inputs)


def routings(model, inputs) -> list[Routing]:
    """What the routers decide in a plain pass, with a graph."""
    found = []
    routers = [m for m in model.modules() if type(m).__name__ == "Router"]
    handles = [r.register_forward_hook(lambda _, __, out: found.append(out)) for r in routers]
    seeded(model, **inputs)
    for handle in handles:
        handle.remove()
    return found


def router(top_k=2, experts=4, hidden=6) -> Router:
    module = Router(hidden, experts, top_k)
    torch.manual_seed(0)
    module.reset_parameters(1.0)
    return module


def tokens(num=12, hidden=6, seed=0) -> torch.Tensor:
    return torch.randn(num, hidden, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------
# The formulas


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_losses_are_those_of_transformers(top_k, masked):
    routing = router(top_k)(tokens(12))
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 0]]) if masked else None
    flat = None if mask is None else mask.reshape(-1)
    expected = load_balancing_loss_func((routing.logits,), 4, top_k, mask)
    torch.testing.assert_close(load_balancing_loss(routing, flat), expected)
    counted = routing.logits if flat is None else routing.logits[flat.bool()]
    torch.testing.assert_close(router_z_loss(routing, flat), router_z_loss_func(counted[None]))
    other = router(top_k)(tokens(12, seed=5))
    assert not torch.allclose(load_balancing_loss(other, flat), expected, rtol=1e-3)


def test_a_mask_without_tokens_gives_zero():
    routing = router()(tokens(4))
    assert load_balancing_loss(routing, torch.zeros(4)) == router_z_loss(routing, torch.zeros(4)) == 0


# ---------------------------------------------------------------------------------------------------
# Into the loss


def batch(model, model_type: str) -> dict:
    inputs = make_inputs(model, generative(model_type))
    inputs.pop("decoder_input_ids", None)
    labels = inputs["input_ids"].clone()
    labels[0, -3:] = -100
    return inputs | {"labels": labels}


def gradients(loss, model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "llama", "albert", "t5"])
def test_training_loss_is_the_stock_loss_plus_both(model_type, artifact):
    model = load(artifact(model_type, noise=0.1)[1], model_type, router_aux_loss_coef=0.0)
    skew(model)
    inputs = batch(model, model_type)
    stock = seeded(model, **inputs).loss
    found = routings(model, inputs)
    masks = [None] * len(found)
    if model_type == "t5":  # labels that are ignored are padding of the decoder
        masks[len(found) // 2 :] = [(inputs["labels"] != -100).reshape(-1)] * (len(found) // 2)
    aux = sum(load_balancing_loss(r, m) for r, m in zip(found, masks, strict=True)) / len(found)
    z = sum(router_z_loss(r, m) for r, m in zip(found, masks, strict=True)) / len(found)
    expected = stock + AUX * aux + Z * z
    assert AUX * aux > 0.1 and Z * z > 0.1
    wanted = gradients(expected, model)
    model.config.router_aux_loss_coef, model.config.router_z_loss_coef = AUX, Z
    loss = seeded(model, **inputs).loss
    torch.testing.assert_close(loss, expected)
    for name, gradient in gradients(loss, model).items():
        scale = wanted[name].abs().max().item()
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5 * max(scale, 0.1), msg=name)
    as_tuple = seeded(model, **inputs, return_dict=False)[0]
    torch.testing.assert_close(as_tuple, expected)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "t5"])
def test_accumulated_passes_are_parts_of_one_step(model_type, artifact):
    """Trainer tells how many labels a step has: each pass weighs its own part, as the task's loss does."""
    model = load(artifact(model_type, noise=0.1)[1], model_type, router_aux_loss_coef=AUX)
    inputs = batch(model, model_type)
    labels = inputs["labels"] if model_type == "t5" else inputs["labels"][:, 1:]
    own = int((labels != -100).sum())
    whole = seeded(model, **inputs).loss
    weighs = getattr(model, "accepts_loss_kwargs", True)
    assert weighs == (model_type != "t5")
    for parts in (1, 4):
        found = seeded(model, **inputs, num_items_in_batch=parts * own).loss
        torch.testing.assert_close(found, whole / parts if weighs else whole)


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
@pytest.mark.parametrize("model_type", ["Llama", "GPTNeoX", "GPT2"])
def test_whether_a_head_counts_items_is_known_beforehand(model_type, head):
    cls = getattr(transformers, f"{model_type}For{head}")
    names = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 16}
    names |= {"intermediate_size": 8, "num_labels": 2}
    names |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    model = cls(cls.config_class(**names)).eval()
    ids = torch.tensor([[3, 4, 5]])
    labels = {"labels": ids % 2 if "Token" in head else ids[:, 0] % 2}
    if "Question" in head:
        labels = {"start_positions": torch.tensor([1]), "end_positions": torch.tensor([2])}
    whole = model(ids, **labels).loss
    takes = "kwargs" in inspect.signature(model.forward).parameters
    counted = takes and model(ids, **labels, num_items_in_batch=100).loss < whole / 10
    assert counts_items(cls) == counted
    assert not counts_items(transformers.ViTForImageClassification)  # not in a regression


def test_the_default_coefficient_is_on_in_training_only(artifact):
    model = no_dropout(load(artifact("gpt2")[1]))
    assert model.config.router_aux_loss_coef == 0.005 and model.config.router_z_loss_coef == 0
    inputs = batch(model, "gpt2")
    more = model(**inputs).loss - model.eval()(**inputs).loss
    assert 0.005 * 2 * 0.9 < more < 0.005 * EXPERTS  # 2 of 3 experts, between balanced and one for all
    with torch.no_grad():
        assert torch.equal(model.train()(**inputs).loss, model.eval()(**inputs).loss)


@pytest.mark.parametrize("scale", [1.0, 64.0])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "t5"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_checkpointing_keeps_the_gradient_of_the_losses(model_type, reentrant, scale, artifact):
    """Scaled as GradScaler and gradient accumulation scale it."""
    coefs = {"router_aux_loss_coef": AUX, "router_z_loss_coef": Z}
    model = skew(load(artifact(model_type, noise=0.1)[1], model_type, **coefs))
    inputs = batch(model, model_type)
    torch.manual_seed(0)
    loss = model(**inputs).loss
    expected = gradients(scale * loss, model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.manual_seed(0)
    found = model(**inputs).loss
    torch.testing.assert_close(found, loss)
    found = gradients(scale * found, model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        close = {"rtol": 1e-4, "atol": 1e-4 * float(gradient.abs().max()), "msg": name}
        torch.testing.assert_close(found[name], gradient, **close)
    model.config.router_aux_loss_coef = model.config.router_z_loss_coef = 0.0
    torch.manual_seed(0)
    without = gradients(scale * model(**inputs).loss, model)
    name = next(name for name in expected if name.endswith("router.weight"))
    assert not torch.allclose(without[name], expected[name], rtol=1e-2)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_checkpointed_passes_go_back_in_any_order_and_with_others_between(reentrant, artifact):
    model = skew(no_dropout(load(artifact("llama", noise=0.1)[1], "llama", router_aux_loss_coef=AUX)))
    first = batch(model, "llama") | {"use_cache": False}
    first["attention_mask"] = torch.ones_like(first["input_ids"])
    first["attention_mask"][:, :3] = 0
    second = {"input_ids": first["input_ids"].flip(1), "labels": first["labels"], "use_cache": False}
    longer = {name: second[name].repeat(1, 2) for name in ("input_ids", "labels")} | {"use_cache": False}

    def back(backward: list[int], between=lambda: None):
        losses = [scale * model(**inputs).loss for scale, inputs in ((8, first), (1, second), (2, longer))]
        between()
        model.zero_grad()
        for i in backward:
            losses[i].backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def evaluate():
        with torch.no_grad():
            model(input_ids=first["input_ids"])
            model.eval()(input_ids=first["input_ids"])
        model.train()

    expected = back([2, 1, 0])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for found in (back([0, 1, 2]), back([1, 2, 0]), back([0, 2, 1], evaluate), back([2, 1, 0], model.eval)):
        model.train()
        for name, gradient in found.items():
            atol = 1e-4 * float(expected[name].abs().max())
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=atol, msg=name)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_a_repeated_call_that_is_not_known_is_an_error(artifact):
    model = no_dropout(load(artifact("gpt2")[1]))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = model(**batch(model, "gpt2")).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="or was repeated before; expected one backward pass"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [None, True])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_a_loss_made_by_hand_from_the_logits_optimises_them_too(reentrant, artifact):
    model = skew(no_dropout(load(artifact("gpt2", noise=0.1)[1], router_aux_loss_coef=AUX)))
    inputs = batch(model, "gpt2")
    labels = inputs.pop("labels")
    expected = gradients(model(**inputs, labels=labels).loss, model)
    if reentrant:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    for return_dict in (True, False):
        output = model(**inputs, return_dict=return_dict)
        logits = output.logits if return_dict else output[0]
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        for name, gradient in gradients(loss, model).items():
            atol = 1e-4 * float(expected[name].abs().max())
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=atol, msg=name)


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_added_to_a_loss_made_by_hand_they_are_scaled_as_it_is(reentrant, artifact):
    coefs = {"router_aux_loss_coef": AUX, "router_z_loss_coef": Z}
    model = skew(no_dropout(load(artifact("gpt2", noise=0.1)[1], **coefs)))
    with pytest.raises(ValueError, match="no forward pass in training"):
        model.add_router_losses(torch.zeros(()))
    inputs = batch(model, "gpt2")
    labels = inputs.pop("labels")
    own = model(**inputs, labels=labels).loss
    expected = gradients(64.0 * own, model)
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for share in (1.0, 0.25):
        logits = model(**inputs).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss = model.add_router_losses(share * loss, share)
        torch.testing.assert_close(loss, share * own)
        for name, gradient in gradients(64.0 / share * loss, model).items():
            atol = 1e-4 * float(expected[name].abs().max())
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=atol, msg=name)


@pytest.mark.parametrize("model_type", ["gpt2", "bart"])
def test_padding_does_not_count(model_type, artifact):
    model = skew(no_dropout(load(artifact(model_type, noise=0.1)[1], model_type)))
    model.config.router_aux_loss_coef, model.config.router_z_loss_coef = AUX, Z
    ids = make_inputs(model, generative(model_type))["input_ids"].clamp(min=3)
    labels = ids.clone()
    labels[:, :4] = -100  # the first real token is predicted from padding
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    losses = []
    for padding in (1, 2):
        padded = ids.clone()
        padded[:, :3] = padding
        decoder = {"decoder_input_ids": padded} if model.config.is_encoder_decoder else {}
        losses.append(model(input_ids=padded, attention_mask=mask, labels=labels, **decoder).loss)
    if model_type == "gpt2":
        torch.testing.assert_close(losses[0], losses[1])
    # The mask decides: without it the padding counts.
    whole = model(input_ids=padded, labels=labels, **decoder).loss
    assert not torch.allclose(whole, losses[1], rtol=1e-4)


@pytest.mark.parametrize("model_type", ["gpt2", "bert", "t5", "vit"])
def test_router_logits_in_the_outputs(model_type, artifact):
    model = load(artifact(model_type)[1], model_type, train=False)
    inputs = make_inputs(model, generative(model_type))
    plain = model(**inputs)
    assert "router_logits" not in plain and "aux_loss" not in plain
    shown = model(**inputs, output_router_logits=True)
    found = routings(model, inputs)
    assert all(torch.equal(a, b.logits) for a, b in zip(shown.router_logits, found, strict=True))
    expected = torch.stack([load_balancing_loss(r) for r in found]).mean()
    torch.testing.assert_close(shown.aux_loss, expected)
    model.config.output_router_logits = True
    assert torch.equal(model(**inputs).aux_loss, shown.aux_loss)
    assert isinstance(model(**inputs, return_dict=False), tuple)
    with pytest.raises(ValueError, match="a tuple has no place for `aux_loss`"):
        model(**inputs, output_router_logits=True, return_dict=False)


def test_compiles_whole_with_the_losses(artifact):
    from torch._dynamo import reset

    reset()
    model = skew(no_dropout(load(artifact("llama", noise=0.1)[1], "llama", router_aux_loss_coef=AUX)))
    inputs = batch(model, "llama") | {"use_cache": False}
    expected = model(**inputs).loss
    wanted = gradients(expected, model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(**inputs).loss
    torch.testing.assert_close(found, expected)
    for name, gradient in gradients(found, model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-5, msg=name)
    reset()


# ---------------------------------------------------------------------------------------------------
# Selection


def test_raw_weights_are_the_probabilities():
    module = router()
    module.combine = "raw"
    routing = module(tokens())
    probabilities = (tokens() @ module.weight.T).softmax(-1).sort(descending=True)
    weights, experts = table(routing)
    torch.testing.assert_close(weights, probabilities.values[:, :2])
    assert torch.equal(experts, probabilities.indices[:, :2]) and weights.sum() < 12


def test_jitter_is_for_training():
    module = router()
    calm = module.eval()(tokens()).logits
    module.jitter_noise = 0.1
    assert torch.equal(module(tokens()).logits, calm)
    noisy = module.train()(tokens()).logits
    assert 0 < (noisy - calm).abs().max() <= (tokens().abs() @ module.weight.abs().T * 0.1).max()


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0, 1.5, 4.0])
def test_capacity_by_its_definition(factor):
    """First choices before second ones, early tokens before late ones."""
    module = router().train()
    weights, experts = table(module(tokens(20)))
    module.capacity_factor = factor
    found = module(tokens(20))
    assert torch.equal(table(found)[0], weights)
    room = {e: max(math.ceil(factor * 20 * 2 / 4), 1) for e in range(4)}
    kept = torch.ones(20, 2, dtype=torch.bool)
    for choice in range(2):
        for token in range(20):
            expert = int(experts[token, choice])
            room[expert] -= 1
            kept[token, choice] = room[expert] >= 0
    assert torch.equal(found.room, kept.reshape(-1))
    assert bool(kept.all()) == (factor >= 1.5)
    served = found.served()
    assert torch.equal(served.weights, weights[kept]) and torch.equal(served.experts, experts[kept])
    assert torch.equal(served.tokens, kept.nonzero()[:, 0])
    assert module.eval()(tokens(20)).room is None


def test_bias_balances_without_a_loss(artifact, tmp_path):
    """The bias moves against the load after each step, never weighs, and is saved."""
    model = load(artifact("gpt2", top_k=1, noise=0.1)[1], router_aux_loss_coef=0.0)
    assert not any("balance_bias" in name for name in model.state_dict())
    options = {"router_aux_loss_coef": 0.0, "router_bias_update_rate": 0.05}
    model = skew(no_dropout(load(artifact("gpt2", top_k=1, noise=0.1)[1], **options)), scale=0.3)
    inputs = batch(model, "gpt2")
    loads = []
    for _ in range(60):
        with router_stats(model) as stats:
            model(**inputs).loss.backward()
        model.zero_grad()
        loads.append(torch.stack([layer.load for layer in stats.values()]))
    assert loads[0].max() > 0.5
    assert torch.stack(loads[-20:]).mean(0).max() < 0.45  # a third each is balanced
    biases = [b for name, b in model.state_dict().items() if name.endswith("balance_bias")]
    assert len(biases) == 2 and all(bias.abs().max() > 0 for bias in biases)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved", dtype=torch.bfloat16).mixtures()[0][1]
    assert again.balance_bias.dtype == torch.float32 and torch.equal(again.balance_bias, biases[0])
    for cast in (again.bfloat16, again.half, lambda: again.to("cpu", torch.bfloat16)):
        cast()
        assert again.down.bias.dtype != torch.float32 and again.balance_bias.dtype == torch.float32
        assert torch.equal(again.balance_bias, biases[0])
    found = routings(model.eval(), inputs)[0]
    assert torch.equal(found.choices.weights, torch.ones(len(found.logits)))


def test_the_balancing_loss_balances(artifact):
    """Plain descent on the loss of the routers alone."""
    model = skew(no_dropout(load(artifact("gpt2", top_k=1)[1], router_aux_loss_coef=1.0)), scale=0.3)
    routers = [p for name, p in model.named_parameters() if name.endswith("router.weight")]
    inputs = batch(model, "gpt2")
    spread = []
    for _ in range(30):
        with router_stats(model) as stats:
            loss = model(**inputs).loss
        spread.append(max(float(layer.load.max()) for layer in stats.values()))
        grads = torch.autograd.grad(loss, routers)
        with torch.no_grad():
            for parameter, gradient in zip(routers, grads, strict=True):
                parameter -= 0.1 * gradient
    assert spread[0] > 0.5 and min(spread) < 0.45


@pytest.mark.parametrize(
    ("name", "value"),
    [("router_combine", "all"), ("mpoe_schedule", "fast"), ("mpoe_cache", "some")],
)
def test_unknown_options_are_named(name, value, artifact):
    with pytest.raises(ValueError, match=f"{name} is '{value}': choose one of"):
        load(artifact("gpt2")[1], **{name: value})


def test_options_survive_saving(artifact, tmp_path):
    model = load(artifact("gpt2")[1], router_combine="raw", router_capacity_factor=1.25, mpoe_cache="all")
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.config.router_combine == "raw" and again.config.mpoe_cache == "all"
    ffn = again.mixtures()[0][1]
    assert ffn.router.combine == "raw" and ffn.router.capacity_factor == 1.25 and ffn.cache.keep == "all"


# ---------------------------------------------------------------------------------------------------
# Statistics


def test_statistics_by_their_definition(artifact):
    model = skew(load(artifact("gpt2", noise=0.3)[1], train=False))
    inputs = make_inputs(model, generative("gpt2"))
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :4] = 0
    inputs["attention_mask"] = mask
    with router_stats(model, similarity_tokens=5) as stats:
        model(**inputs)
        model(**inputs)
    found = routings(model, inputs)
    assert list(stats) == ["h.0.mlp", "h.1.mlp"]
    kept = mask.reshape(-1).bool()
    for layer, routing in zip(stats.values(), found, strict=True):
        chosen = table(routing)[1][kept].reshape(-1)
        expected = torch.bincount(chosen, minlength=EXPERTS) / len(chosen)
        torch.testing.assert_close(layer.load, expected.double())
        probability = routing.logits[kept].softmax(-1)
        torch.testing.assert_close(layer.probability, probability.mean(0).double(), rtol=1e-5, atol=1e-6)
        entropy = torch.distributions.Categorical(probs=probability).entropy().mean()
        assert layer.entropy == pytest.approx(entropy.item(), rel=1e-4)
        assert layer.num_tokens == 2 * kept.sum() and layer.dropped == 0
        torch.testing.assert_close(layer.similarity.diagonal(), torch.ones(EXPERTS).double())
        others = layer.similarity[~torch.eye(EXPERTS, dtype=torch.bool)]
        assert (others < 0.999).all() and (others > 0.3).all()
    count = stats["h.0.mlp"].num_tokens
    model(**inputs)
    assert stats["h.0.mlp"].num_tokens == count  # not watched any more


def test_equal_experts_are_similar_and_a_wrapped_model_is_watched(artifact):
    model = load(artifact("gpt2")[1], train=False)
    with router_stats(nn.DataParallel(model), similarity_tokens=3) as stats:
        model(**make_inputs(model, generative("gpt2")))
    for layer in stats.values():
        torch.testing.assert_close(layer.similarity, torch.ones(EXPERTS, EXPERTS).double())
    with pytest.raises(TrainingError, match="no mixture"):
        router_stats(nn.Linear(2, 2))


def test_dropped_mass(artifact):
    model = skew(load(artifact("gpt2")[1], router_capacity_factor=0.5))
    with router_stats(model) as stats:
        model(**batch(model, "gpt2"))
    assert len(stats) == 2 and all(0.1 < layer.dropped < 0.8 for layer in stats.values())


# ---------------------------------------------------------------------------------------------------
# Wherever the loss is made from, and however the model is wrapped


def router_gradient(model, loss) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat(
        [p.grad.flatten() for n, p in model.named_parameters() if "router" in n and p.grad is not None]
    )


def checkpointed(model, reentrant: bool | None):
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


def some_loss(outputs) -> torch.Tensor:
    return outputs.logits.square().mean()


LOSSES = {
    "labels given, loss by hand": lambda m, x: some_loss(m(**x)),
    "no labels": lambda m, x: some_loss(m(input_ids=x["input_ids"])),
    "hidden states": lambda m, x: m(**x, output_hidden_states=True).hidden_states[-1].square().mean(),
    "two passes": lambda m, x: some_loss(m(**x)) + some_loss(m(input_ids=x["input_ids"].flip(1))),
    "in place": lambda m, x: m(**x).loss.mul_(2.0) + m(**x).logits[:, 1:].div_(0.7).square().mean(),
}


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_any_loss_optimises_the_routers_losses(name, reentrant, artifact):
    """The gradient of the router, less what it is without the coefficient, is the balancing loss's own."""
    model = skew(no_dropout(load(artifact("gpt2", noise=0.1)[1], router_aux_loss_coef=0.0)))
    inputs = batch(model, "gpt2")
    without = router_gradient(model, LOSSES[name](model, inputs))
    passes = [inputs]
    if name == "two passes":
        passes.append({"input_ids": inputs["input_ids"].flip(1)})
    factors = {"two passes": (1.0, 1.0), "in place": (2.0, 1.0)}.get(name, (1.0,))
    if name == "in place":
        passes.append(inputs)
    aux = 0.0
    for factor, each in zip(factors, passes, strict=True):
        found = routings(model, each)
        aux = aux + factor * sum(load_balancing_loss(r) for r in found) / len(found)
    expected = without + AUX * router_gradient(model, aux)
    model.config.router_aux_loss_coef = AUX
    found = router_gradient(checkpointed(model, reentrant), LOSSES[name](model, inputs))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(found, without, rtol=0.05)


@pytest.mark.parametrize("head", ["AutoModel", "AutoModelForSequenceClassification"])
def test_a_pooled_output_reaches_them_too(head, artifact):
    _, out = artifact("bert", head, noise=0.1)
    model = skew(no_dropout(getattr(transformers, head).from_pretrained(out, trust_remote_code=True)))
    found = {}
    for model.config.router_aux_loss_coef in (0.0, 100.0):
        outputs = model.train()(torch.arange(3, 15).reshape(2, 6))
        pooled = outputs.pooler_output if head == "AutoModel" else outputs.logits
        found[model.config.router_aux_loss_coef] = router_gradient(model, pooled.sum()).norm()
    assert found[100.0] > 2 * found[0.0]


@pytest.mark.parametrize("reentrant", [None, True])
@pytest.mark.parametrize(
    "wanted",
    [{"target_parameters": ["router.weight"]}, {"modules_to_save": ["mlp"]}, {"modules_to_save": ["router"]}],
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*target_modules.*")
def test_with_peft(wanted, reentrant, artifact):
    import peft

    options = {"router_aux_loss_coef": 0.0, "router_bias_update_rate": 0.1, "output_router_logits": True}
    model = skew(no_dropout(load(artifact("llama", noise=0.1)[1], "llama", **options)))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], **wanted)).train()
    inputs = batch(model, "llama")
    gradients = {}
    for model.config.router_aux_loss_coef in (0.0, 100.0):
        outputs = checkpointed(wrapped, reentrant)(**inputs)
        assert len(outputs.router_logits) == 2 and outputs.aux_loss > 0
        gradients[model.config.router_aux_loss_coef] = router_gradient(wrapped, outputs.loss).norm()
        wrapped.zero_grad()
    assert gradients[100.0] > 2 * gradients[0.0]
    wrapped(**inputs)
    assert any(ffn.balance_bias.abs().max() > 0 for _, ffn in model.mixtures())


# ---------------------------------------------------------------------------------------------------
# The balancing bias


def biases(model) -> torch.Tensor:
    return torch.stack([ffn.balance_bias for _, ffn in model.mixtures()])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_the_bias_moves_once_per_step(reentrant, to_none, artifact):
    model = skew(no_dropout(load(artifact("gpt2", noise=0.1)[1], router_bias_update_rate=0.1)))
    checkpointed(model, reentrant)
    inputs = batch(model, "gpt2")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    for step in range(3):
        for _ in range(4):  # accumulated
            losses = [model(**inputs).loss for _ in range(2)]  # two passes, one backward pass
            torch.testing.assert_close(biases(model).abs().max(), torch.tensor(0.1 * step))
            sum(losses).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)
    model.update_router_bias()
    moved = biases(model).clone()
    assert moved.abs().max() > 0.25
    model(**inputs)
    assert torch.equal(biases(model), moved)  # nothing was noted since


def test_a_trained_bias_is_kept_whatever_the_rate(artifact, tmp_path):
    model = no_dropout(load(artifact("gpt2", noise=0.1)[1]))
    assert all(ffn.balance_bias is None for _, ffn in model.mixtures())
    model.config.router_bias_update_rate = 0.3  # also after loading
    inputs = batch(model, "gpt2")
    for _ in range(2):  # one move, which none can take back
        model(**inputs).loss.backward()
        model.zero_grad()
    model.save_pretrained(tmp_path / "saved")
    expected = model.eval()(**inputs).logits
    again = load(tmp_path / "saved", router_bias_update_rate=0.0).eval()
    assert torch.equal(biases(again), biases(model)) and biases(again).abs().max() > 0
    assert torch.equal(again(**inputs).logits, expected)


# ---------------------------------------------------------------------------------------------------
# Outputs, masks and statistics in rarer settings


def test_outputs_with_router_logits_can_be_rebuilt(artifact):
    from torch.utils._pytree import tree_flatten, tree_unflatten

    model = load(artifact("gpt2")[1], output_router_logits=True)
    outputs = model(**batch(model, "gpt2"))
    leaves, tree = tree_flatten(outputs)
    again = tree_unflatten(leaves, tree)
    assert isinstance(again, transformers.utils.ModelOutput) and again.keys() == outputs.keys()
    assert len(again.router_logits) == 2 and torch.equal(again.aux_loss, outputs.aux_loss)


def padded(model) -> dict:
    ids = torch.arange(3, 23).reshape(2, 10)
    return {"input_ids": ids, "attention_mask": (torch.arange(10) < 5).long().expand(2, -1)}


def test_padding_in_chunks_of_an_ffn(artifact):
    _, out = artifact("bert", "AutoModelForMaskedLM", noise=0.1)
    auto = transformers.AutoModelForMaskedLM
    found = []
    for chunk in (0, 5):
        model = auto.from_pretrained(out, trust_remote_code=True, chunk_size_feed_forward=chunk)
        skew(no_dropout(model.eval()))
        with torch.no_grad(), router_stats(model) as stats:
            model(**padded(model))
        found.append(stats)
    for path, whole in found[0].items():
        assert whole.num_tokens == found[1][path].num_tokens == 10
        torch.testing.assert_close(whole.load, found[1][path].load)


def test_padding_of_multiple_choices(artifact):
    _, out = artifact("bert", "AutoModelForMultipleChoice", noise=0.1)
    model = transformers.AutoModelForMultipleChoice.from_pretrained(out, trust_remote_code=True)
    skew(no_dropout(model.train()))
    ids, mask = padded(model).values()
    losses = []
    for fill in (3, 4):
        ids = torch.where(mask.bool(), ids, torch.tensor(fill))
        inputs = {"input_ids": ids[None], "attention_mask": mask[None], "labels": torch.tensor([1])}
        model.config.router_z_loss_coef = 1.0
        losses.append(model(**inputs).loss)
    assert torch.equal(*losses)


def test_padding_takes_no_room(artifact):
    model = load(artifact("gpt2", noise=0.1)[1], router_capacity_factor=0.5)
    skew(no_dropout(model))
    inputs = padded(model)
    short = {name: value[:, :5] for name, value in inputs.items()}
    with router_stats(model) as stats, torch.no_grad():
        model(**short)
    inputs["input_ids"] = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], 7)
    with router_stats(model) as more, torch.enable_grad():
        model(**inputs)
    assert len(stats) == 2
    for path, found in stats.items():
        assert more[path].num_tokens == found.num_tokens == 10
        assert more[path].dropped == pytest.approx(found.dropped) and found.dropped > 0


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_statistics_of_a_compiled_model(artifact):
    from torch._dynamo import reset

    reset()
    model = load(artifact("gpt2")[1]).eval()
    compiled = torch.compile(model, backend="eager")
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        compiled(ids)
        with router_stats(compiled) as stats:
            compiled(ids)
    assert [layer.num_tokens for layer in stats.values()] == [10, 10]  # of both layers
    reset()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_statistics_count_a_checkpointed_token_once(reentrant, artifact):
    model = checkpointed(load(artifact("gpt2")[1]), reentrant)
    ids = torch.arange(3, 13)[None]
    with router_stats(model) as stats:
        model(ids, labels=ids).loss.backward()
    assert [layer.num_tokens for layer in stats.values()] == [10, 10]  # of both layers


def test_a_tuple_without_a_loss_stays_as_it_is(artifact):
    _, out = artifact("bert", "AutoModelForPreTraining", noise=0.1)
    model = transformers.AutoModelForPreTraining.from_pretrained(out, trust_remote_code=True)
    model = no_dropout(model.train())
    ids = torch.arange(3, 15).reshape(2, 6)
    found = []
    for model.config.router_aux_loss_coef in (0.0, 1000.0):
        found.append(model(input_ids=ids, labels=ids, return_dict=False)[0])  # no next_sentence_label
    assert torch.equal(*found)


def test_an_expert_of_no_probability_has_a_weight():
    logits = torch.tensor([[0.0, 300.0, -300.0]])
    weights = weigh(Router(4, 3, 1), logits, logits[:, 2:], torch.tensor([[2]]))
    assert torch.equal(weights, torch.ones(1, 1))


def test_runs_on_the_meta_device(artifact):
    model = load(artifact("gpt2")[1]).to("meta")
    ids = torch.ones(2, 5, dtype=torch.long, device="meta")
    model.config.pad_token_id = None  # transformers would look for it
    assert model(ids).logits.shape[:2] == (2, 5)
