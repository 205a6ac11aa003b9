"""What trainers and pipelines expect of a mixture: outputs, numbers in the config, names, whole backbones."""

import json
import logging

import pytest
import tokenizers
import torch
import transformers
from helpers.models import generative, load, stored
from helpers.selection import quick
from helpers.tiny import make_inputs
from torch import nn
from torch.nn.functional import cross_entropy
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.trainer_pt_utils import LabelSmoother

from mpoe_convert.runtime.modeling_mpoe import Picks, load_balancing_loss
from mpoe_convert.source.architecture import heads
from mpoe_convert.source.families import FAMILY_OF

AUX, Z = 0.3, 0.2
CHECKPOINTED = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"
)


def trained(folder, model_type: str, **options):
    """A model in training mode without dropout, whose routers prefer an expert by far."""
    auto = getattr(transformers, generative(model_type))
    if model_type in ("opt", "bart"):  # whose rates are no modules
        options |= {"dropout": 0.0, "attention_dropout": 0.0}
    model = auto.from_pretrained(folder, trust_remote_code=True, **options).train()
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for _, ffn in model.mixtures():
        ffn.router.weight.data = 3 * torch.randn(ffn.router.weight.shape, generator=generator)
    return model


def router_gradients(loss: torch.Tensor, model) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.stack([ffn.router.weight.grad for _, ffn in model.mixtures()]).clone()


def checkpointed(model, reentrant: bool | None):
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


def causal_batch(model, model_type: str) -> dict:
    inputs = make_inputs(model, generative(model_type))
    return {name: value for name, value in inputs.items() if name != "decoder_input_ids"}


def next_token_loss(outputs, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def balancing(model, inputs: dict) -> torch.Tensor:
    """The loss with a graph, from hooks on the routers in a plain pass."""
    found = []
    handles = [
        ffn.router.register_forward_hook(lambda _, __, out: found.append(out)) for _, ffn in model.mixtures()
    ]
    model(**inputs)
    for handle in handles:
        handle.remove()
    return torch.stack([load_balancing_loss(routing) for routing in found]).mean()


# ---------------------------------------------------------------------------------------------------
# The auxiliary loss counts once


@CHECKPOINTED
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("way", ["its loss", "added outside", "shown and left out", "a tuple"])
def test_a_shown_loss_counts_once(way, reentrant, artifact):
    """`ce(logits) + coef * outputs.aux_loss` is what TRL computes of every mixture of transformers."""
    model = trained(artifact("llama", noise=0.1)[1], "llama", router_aux_loss_coef=0.0)
    inputs = causal_batch(model, "llama")
    labels = inputs["input_ids"]
    without = router_gradients(next_token_loss(model(**inputs), labels), model)
    balanced = router_gradients(balancing(model, inputs), model)
    checkpointed(model, reentrant)
    model.config.router_aux_loss_coef = AUX
    if way == "a tuple":  # which cannot show it, so that it joins by itself
        model.config.output_router_logits = True
        loss = model(**inputs, labels=labels, return_dict=False)[0]
    elif way == "its loss":
        loss = model(**inputs, labels=labels, output_router_logits=True).loss
    else:
        outputs = model(**inputs, labels=labels, output_router_logits=True)
        loss = next_token_loss(outputs, labels)
        loss = loss + AUX * outputs.aux_loss if way == "added outside" else loss
    expected = without if way == "shown and left out" else without + AUX * balanced
    torch.testing.assert_close(router_gradients(loss, model), expected, rtol=1e-3, atol=1e-5)
    assert (AUX * balanced).norm() > 0.1 * without.norm()


@CHECKPOINTED
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_the_z_loss_joins_by_itself_in_either_way(reentrant, artifact):
    model = trained(artifact("llama", noise=0.1)[1], "llama", router_aux_loss_coef=0.0)
    inputs = causal_batch(model, "llama")
    found = {}
    for shows in (False, True):
        for model.config.router_z_loss_coef in (0.0, Z):
            outputs = checkpointed(model, reentrant)(**inputs, output_router_logits=shows)
            loss = next_token_loss(outputs, inputs["input_ids"])
            found[shows, model.config.router_z_loss_coef] = router_gradients(loss, model)
    torch.testing.assert_close(found[True, Z], found[False, Z])
    assert (found[True, Z] - found[True, 0.0]).norm() > 0.1 * found[True, 0.0].norm()


def test_the_shown_loss_is_a_part_of_the_loss_in_training_alone(artifact):
    model = trained(artifact("llama", noise=0.1)[1], "llama", router_aux_loss_coef=AUX)
    inputs = causal_batch(model, "llama") | {"output_router_logits": True}
    outputs = model(**inputs, labels=inputs["input_ids"])
    expected = next_token_loss(outputs, inputs["input_ids"]) + AUX * outputs.aux_loss
    torch.testing.assert_close(outputs.loss, expected)
    outputs = model.eval()(**inputs, labels=inputs["input_ids"])
    torch.testing.assert_close(outputs.loss, next_token_loss(outputs, inputs["input_ids"]))


def test_the_shown_loss_compiles(artifact):
    from torch._dynamo import reset

    reset()
    model = trained(artifact("llama", noise=0.1)[1], "llama", router_aux_loss_coef=AUX)
    inputs = causal_batch(model, "llama") | {"output_router_logits": True, "use_cache": False}
    expected = model(**inputs, labels=inputs["input_ids"])
    wanted = router_gradients(expected.loss, model)
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs, labels=inputs["input_ids"])
    torch.testing.assert_close(found.aux_loss, expected.aux_loss)
    torch.testing.assert_close(router_gradients(found.loss, model), wanted, rtol=1e-3, atol=1e-5)
    reset()


# ---------------------------------------------------------------------------------------------------
# The backbone


BACKBONES = ("gpt2", "llama", "opt", "bert", "gpt_neox")


@pytest.mark.parametrize("model_type", BACKBONES)
def test_the_backbone_has_the_routers_losses(model_type, artifact):
    """Whoever trains a head of their own on it gets the gradients of the model around it."""
    model = trained(artifact(model_type, noise=0.1)[1], model_type, router_aux_loss_coef=AUX)
    inputs = causal_batch(model, model_type)
    backbone = model.base_model
    assert type(backbone).__name__ == f"MPOE{type(backbone).__mro__[2].__name__}"
    assert [path for path, _ in backbone.mixtures()] == [path for path, _ in model.mixtures()]

    def gradient(of) -> torch.Tensor:
        return router_gradients(
            of(**inputs, output_hidden_states=True).hidden_states[-1].square().mean(), model
        )

    torch.testing.assert_close(gradient(backbone), gradient(model), rtol=1e-3, atol=1e-6)
    found = gradient(backbone)
    model.config.router_aux_loss_coef = 0.0
    without = gradient(backbone)
    assert (found - without).norm() > 0.1 * without.norm()


@pytest.mark.parametrize("model_type", (*BACKBONES, "t5", "bart"))
def test_the_backbone_shows_its_routers(model_type, artifact):
    model = load(artifact(model_type)[1], model_type)
    inputs = make_inputs(model, generative(model_type))
    expected = model(**inputs, output_router_logits=True)
    if model.base_model is not model:
        found = model.base_model(**inputs, output_router_logits=True)
        torch.testing.assert_close(found.aux_loss, expected.aux_loss)
        assert len(found.router_logits) == len(expected.router_logits) == len(model.mixtures())
    config = model.config
    assert (config.num_experts, config.num_experts_per_tok) == (3, 2)
    inner = model.mixtures()[0][1].up(torch.zeros(1, config.hidden_size), Picks(0)).shape[-1]
    assert config.moe_intermediate_size == inner
    by_layer = [load_balancing_loss_func((layer,), 3, 2) for layer in expected.router_logits]
    torch.testing.assert_close(expected.aux_loss, torch.stack(by_layer).mean())


def test_what_a_dense_config_says_of_experts_does_not_count(artifact):
    """Some dense checkpoints name one expert."""
    out = artifact("llama", "AutoModel")[1]
    path = out / "config.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps(written | {"num_experts": 1, "moe_intermediate_size": 7}))
    config = transformers.AutoConfig.from_pretrained(out, trust_remote_code=True)
    path.write_text(json.dumps(written))
    assert (config.num_experts, config.moe_intermediate_size) == (3, config.intermediate_size)
    assert "num_experts" not in config.to_dict()


def test_the_backbone_takes_tasks_and_moves_the_balancing_bias(artifact):
    out = artifact("llama", noise=0.1)[1]
    model = trained(out, "llama", router_tasks=["a", "b"], router_bias_update_rate=0.1)
    ids = causal_batch(model, "llama")["input_ids"]
    shown = model.model(ids, task_ids="b", output_router_logits=True).router_logits
    rows = shown[0].unflatten(0, ids.shape)
    assert torch.equal(rows, rows[:1, :1].expand_as(rows))  # the same for all tokens of a task
    model.model(ids, task_ids=["a", "b"]).last_hidden_state.sum().backward()
    model.zero_grad()
    model.model(ids, task_ids="a")  # the first pass after the step
    assert all(ffn.balance_bias.abs().max() > 0 for _, ffn in model.mixtures())


def test_the_forward_is_what_its_signature_says(artifact):
    """vLLM binds arguments by the signature and hands dynamo the code that is behind it."""
    import inspect

    model = load(artifact("llama")[1], "llama")
    for each in (model, model.model):
        stock = inspect.signature(type(each).__mro__[2].forward).parameters
        found = inspect.signature(type(each).forward).parameters
        assert [n for n in found if n not in ("task_ids", "output_router_logits")] == list(stock)
        assert all(found[n].default == p.default and found[n].kind == p.kind for n, p in stock.items())
        code = type(each).forward.__code__
        number = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARKEYWORDS)
        assert set(code.co_varnames[:number]) == set(found)


# ---------------------------------------------------------------------------------------------------
# Stacks


STACKS = [(t, s) for t in ("t5", "bart", "mbart") for s in ("encoder", "decoder")] + [("opt", "decoder")]
QUICK_STACKS = quick(STACKS, lambda model_type, _: model_type != "mbart")


@pytest.mark.parametrize("model_type, stack", QUICK_STACKS)
def test_a_stack_saved_alone_loads_again(model_type, stack, artifact, tmp_path):
    model = load(artifact(model_type, noise=0.1)[1], model_type)
    name = f"{model_type}-{stack}"  # transformers takes folders of one name with the same code for one model
    part = model.get_encoder() if stack == "encoder" else model.get_decoder()
    part.save_pretrained(tmp_path / name)
    assert set(stored(tmp_path / name)) <= {name for name, _ in part.state_dict(keep_vars=True).items()}
    ids = torch.arange(3, 15).reshape(2, 6)
    with torch.no_grad():
        expected = part(input_ids=ids).last_hidden_state
    for auto in (type(part), transformers.AutoModel):
        options = {"trust_remote_code": True} if auto is transformers.AutoModel else {}
        again, info = auto.from_pretrained(tmp_path / name, output_loading_info=True, **options)
        assert type(again).__name__ == type(part).__name__ and not info["missing_keys"], info
        assert len(again.mixtures()) == len(part.mixtures()) > 0
        with torch.no_grad():
            torch.testing.assert_close(again.eval()(input_ids=ids).last_hidden_state, expected)
    assert "AutoModelForCausalLM" not in (again.config.auto_map or {})
    model.save_pretrained(tmp_path / "whole")  # whose config is not the stack's
    whole = load(tmp_path / "whole", model_type)
    assert type(whole).__name__ == type(model).__name__


def test_a_stack_in_training_has_the_routers_losses(artifact):
    model = trained(artifact("bart", noise=0.1)[1], "bart", router_aux_loss_coef=0.0)
    ids = torch.arange(3, 15).reshape(2, 6)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    for stack in (model.get_encoder(), model.get_decoder()):
        shown = {}
        for model.config.router_aux_loss_coef in (0.0, 100.0):
            loss = stack(input_ids=ids, attention_mask=mask).last_hidden_state.square().mean()
            model.zero_grad()
            loss.backward()
            shown[model.config.router_aux_loss_coef] = stack.mixtures()[0][1].router.weight.grad.norm()
        assert shown[100.0] > 2 * shown[0.0]
        logits = stack(ids, attention_mask=mask, output_router_logits=True).router_logits
        aux = stack(ids, attention_mask=mask, output_router_logits=True).aux_loss
        by_layer = [load_balancing_loss_func((layer,), 3, 2, mask) for layer in logits]
        torch.testing.assert_close(aux, torch.stack(by_layer).mean())


def test_a_forward_of_any_arguments_takes_them_by_place(artifact):
    """BART's decoder alone has a wrapper whose forward is `(*args, **kwargs)`."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        artifact("bart", "AutoModelForCausalLM")[1], trust_remote_code=True
    ).eval()
    ids = torch.arange(3, 15).reshape(2, 6)
    with torch.no_grad():
        by_place, by_name = model.base_model(ids), model.base_model(input_ids=ids)
    assert torch.equal(by_place.last_hidden_state, by_name.last_hidden_state)


def test_mixtures_in_the_encoder_alone_are_shown_where_they_run(artifact):
    model = load(artifact("bart", include=("encoder.*",))[1], "bart")
    model.config.output_router_logits = True
    ids = torch.arange(3, 15).reshape(2, 6)
    assert len(model(input_ids=ids).router_logits) == len(model.mixtures())
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[0] == 2


def test_a_config_without_a_block_has_no_numbers_of_experts(artifact):
    config = transformers.AutoConfig.from_pretrained(artifact("llama")[1], trust_remote_code=True)
    config.mpoe = None
    assert not hasattr(config, "num_experts") and getattr(config, "moe_intermediate_size", 5) == 5


# ---------------------------------------------------------------------------------------------------
# Names


CAUSAL = [
    t for t in FAMILY_OF if "AutoModelForCausalLM" in heads(t) and generative(t) == "AutoModelForCausalLM"
]


@pytest.mark.parametrize("model_type", CAUSAL[::5])
def test_label_smoothing_shifts_the_labels(model_type, artifact, tmp_path):
    """Trainer shifts them for classes in its table of causal models; a token must not learn itself."""
    from transformers import Trainer, TrainingArguments

    out = artifact(model_type)[1]
    model = load(out, model_type)
    args = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to="none")
    inputs = causal_batch(model, model_type)
    labels = inputs["input_ids"].clone()
    with torch.no_grad():
        expected = LabelSmoother(epsilon=0.1)(model(**inputs), labels, shift_labels=True)
        found = Trainer(model=model, args=args).compute_loss(model, inputs | {"labels": labels})
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("model_type, task", [("gpt2", "text-generation"), ("bert", "fill-mask")])
def test_pipelines_know_the_model(model_type, task, artifact, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = load(artifact(model_type)[1], model_type)
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 3, "[MASK]": 4}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="[MASK]")
    assert transformers.pipeline(task, model=model, tokenizer=tokenizer).model is model
    assert "is not supported" not in caplog.text
