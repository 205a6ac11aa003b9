"""Rule expert-choice (expert choice routing, arXiv 2202.09368) against its definition.

The definition is written here sequence by sequence and expert by expert. Autograd differentiates it, in
float64.
"""

import pytest
import torch
import transformers
from helpers.mixtures import (
    NUM_EXPERTS,
    ROUTER_ROUNDING,
    TERMS,
    combined,
    fill,
    hidden_size,
    mirrored,
    randn,
)
from helpers.models import assert_same_outputs, generative, load_pair, token_ids
from helpers.tiny import make_inputs
from torch import nn

from mpoe_convert import Export, Recipe, export, plan, router_stats
from mpoe_convert.errors import ExportError, RecipeError
from mpoe_convert.runtime.modeling_mpoe import FeedForward, RouterPass

RULE = "expert-choice"
ENCODER = ("bert", "AutoModelForMaskedLM")
LENGTH = 7


def make_ffn(top_k: int, combine: str, shared_experts: int = 0) -> FeedForward:
    """12 -> 10 -> 12, whose routers prefer some experts."""
    terms = {"up": TERMS["dense"], "down": mirrored(TERMS["dense"])}
    form = {name: {"terms": [term], "bias": "per-expert"} for name, term in terms.items()}
    ffn = fill(FeedForward(form, NUM_EXPERTS, top_k, RULE, shared_experts).double())
    ffn.act = nn.SiLU()
    ffn.router.combine = combine
    return ffn


def shares(ffn: FeedForward, tokens: torch.Tensor, real: list[bool]) -> list[dict[int, torch.Tensor]]:
    """{expert: weight} of every token of a sequence (L, H)."""
    logits = [torch.stack([row @ token for row in ffn.router.weight.double()]) for token in tokens]
    probabilities = [row.exp() / row.exp().sum() for row in logits]
    capacity = -(-sum(real) * ffn.router.top_k // NUM_EXPERTS)
    found: list[list[int]] = [[] for _ in tokens]
    for expert in range(NUM_EXPERTS):
        order = sorted(range(len(tokens)), key=lambda t: -probabilities[t][expert].item())
        for t in [t for t in order if real[t]][:capacity]:
            found[t].append(expert)
    weights = []
    for experts, row, logit, token in zip(found, probabilities, logits, tokens, strict=True):
        if ffn.router.combine == "raw":
            weights.append({e: row[e] for e in experts})
            continue
        experts = experts or [int(row.argmax())]
        total = sum(logit[e].exp() for e in experts)
        if len(experts) == 1:  # one, which does not depend on the token
            row = (ffn.router.weight.double() @ token.detach()).softmax(0)
            total = logit[experts[0]].exp() / (row / row.detach())[experts[0]]
        weights.append({e: logit[e].exp() / total for e in experts})
    return weights


def definition(ffn: FeedForward, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    rows = []
    for sequence, real in zip(x, mask.bool().tolist(), strict=True):
        pairs = zip(sequence, shares(ffn, sequence, real), strict=True)
        rows.append(torch.stack([combined(ffn, token, weights) for token, weights in pairs]))
    return torch.stack(rows)


MASKS = {"all": [7, 7, 7], "padded": [7, 3, 1]}
CASES = [(1, "renormalised", 0), (2, "renormalised", 1), (2, "raw", 0), (NUM_EXPERTS, "renormalised", 0)]


@pytest.mark.parametrize("mode", ["apply", "compiled"])
@pytest.mark.parametrize("lengths", MASKS)
@pytest.mark.parametrize(("top_k", "combine", "shared"), CASES)
def test_mixture_is_the_definition(top_k, combine, shared, lengths, mode, monkeypatch):
    """Forward and gradients; in compiled code too, whose shapes do not depend on values."""
    ffn = make_ffn(top_k, combine, shared)
    mask = (torch.arange(LENGTH) < torch.tensor(MASKS[lengths])[:, None]).long()
    if lengths == "padded":
        ffn.router_pass = RouterPass(False, False, 0.0, 0.0, lambda *call: mask.flatten())
    x = randn(3, LENGTH, hidden_size(ffn)).requires_grad_()
    if mode == "compiled":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found, expected = ffn(x), definition(ffn, x, mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=10 * ROUTER_ROUNDING)
    inputs, probe = [x, *ffn.parameters()], randn(*x.shape, seed=2)
    for ours, theirs in zip(
        torch.autograd.grad((found * probe).sum(), inputs, allow_unused=True, materialize_grads=True),
        torch.autograd.grad((expected * probe).sum(), inputs, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        scale = max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=20 * ROUTER_ROUNDING * scale)


def test_the_load_is_balanced_and_what_none_takes_is_nothing():
    """With the paper's weights."""
    ffn = make_ffn(1, "raw")
    x = randn(2, 8, hidden_size(ffn))
    choices = ffn.router(x.flatten(0, 1), num_sequences=2).choices
    assert choices.load(NUM_EXPERTS).tolist() == [4.0] * NUM_EXPERTS  # 2 of 8 tokens, of two sequences
    without = sorted(set(range(16)) - set(choices.tokens.tolist()))
    assert without and ffn.down.bias_kind != "once"
    assert not ffn(x).flatten(0, 1)[without].any()


# ---------------------------------------------------------------------------------------------------
# Whole models


@pytest.fixture(scope="module")
def load(artifact, tmp_path_factory):
    """(dense model, a converted one with routers that prefer some experts), by what else the recipe says."""

    def load(model_type, auto=None, **recipe):
        folder, out = artifact(model_type, auto, **{"experts": 4, "select": RULE} | recipe)
        dense, model = load_pair(folder, out, auto or generative(model_type))
        for number, (_, ffn) in enumerate(model.mixtures()):
            fill(ffn.router, number)
        return dense, model

    return load


@pytest.mark.parametrize(("model_type", "auto"), [ENCODER, ("vit", None), ("distilbert", None)])
@pytest.mark.parametrize("kind", ["mpo", "low-rank"])
def test_identical_experts_compute_the_dense_model(model_type, auto, kind, load):
    dense, model = load(model_type, auto, kind=kind)
    inputs = make_inputs(dense, auto or generative(model_type))
    with router_stats(model) as stats:
        assert_same_outputs(dense, model, inputs)
    assert stats
    assert all(each.experts_per_token >= 2 and (each.counts > 0).sum() > 1 for each in stats.values())


def test_a_sequence_does_not_see_its_neighbours(load):
    """Nor padding, whatever stands there."""
    _, model = load(*ENCODER, noise=0.75)
    ids, mask = token_ids(3, 9), (torch.arange(9) < torch.tensor([9, 5, 2])[:, None]).long()
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask).logits
        for row, length in enumerate((9, 5, 2)):
            alone = model(input_ids=ids[row : row + 1, :length]).logits[0]
            torch.testing.assert_close(together[row, :length], alone, rtol=1e-4, atol=1e-4)


def test_the_encoder_of_a_translator(load):
    """Its decoder stays dense; generation gives the encoder the mask."""
    _, model = load("t5", exclude=("decoder*",), noise=0.75)
    ids, mask = token_ids(2, 8), (torch.arange(8) < torch.tensor([8, 4])[:, None]).long()
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    for more in ({}, {"self_contrast": 0.5}):
        together = model.generate(ids, attention_mask=mask, **options, **more)
        for row, length in enumerate((8, 4)):
            one = ids[row : row + 1, :length]
            alone = model.generate(one, attention_mask=torch.ones_like(one), **options, **more)
            assert torch.equal(alone[0], together[row])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_a_model_trains_and_saves(artifact, tmp_path):
    """No loss for the load; checkpointed layers choose again as before."""
    _, out = artifact(*ENCODER, experts=4, select=RULE, noise=0.75)
    auto = transformers.AutoModelForMaskedLM
    ids, mask = token_ids(2, 9), (torch.arange(9) < torch.tensor([9, 5])[:, None]).long()
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    gradients = []
    for coef, checkpointed in ((0.0, False), (1.0, False), (1.0, True)):
        model = auto.from_pretrained(out, trust_remote_code=True, router_aux_loss_coef=coef)
        for number, (_, ffn) in enumerate(model.mixtures()):
            fill(ffn.router, number)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**inputs).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    routers = [gradient for name, gradient in gradients[0].items() if ".router." in name]
    assert len(routers) == 2 and all(gradient.any() for gradient in routers)
    for others in gradients[1:]:
        for name, expected in gradients[0].items():
            torch.testing.assert_close(others[name], expected, rtol=1e-4, atol=1e-6, msg=name)
    model.eval().save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert_same_outputs(model, again, {"input_ids": ids, "attention_mask": mask}, 1e-6)


@pytest.mark.slow  # whole models take 10 seconds
def test_compiled_it_computes_the_same(load):
    torch._dynamo.reset()
    _, model = load(*ENCODER, noise=0.75)
    inputs = {"input_ids": token_ids(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("model_type", "auto", "told"),
    [
        (
            "gpt2",
            None,
            "for 'h.0', a layer of a decoder, where an expert would choose a token by later",
        ),
        (
            "t5",
            None,
            "'decoder.block.0.layer.2', a layer of a decoder.*leave the decoder dense by `?-*exclude",
        ),
    ],
)
def test_decoders_are_refused(model_type, auto, told, artifact):
    folder, _ = artifact(model_type, auto)
    with pytest.raises(RecipeError, match=told):
        plan(Recipe(str(folder), select=RULE))


def test_parts_are_refused():
    with pytest.raises(RecipeError, match="of which a token that one expert takes would pass one part"):
        Recipe("m", select=RULE, kind="split")


OPTIONS = {
    "router_bias_update_rate": (0.1, "router_balance_bias is set with the rule 'expert-choice'"),
    "router_capacity_factor": (
        1.0,
        "router_capacity_factor is set with the rule 'expert-choice', whose",
    ),
    "router_tasks": (["a"], "choose among the tokens of a sequence, which have one task"),
    "chunk_size_feed_forward": (4, "chunk_size_feed_forward is 4 with the rule 'expert-choice'.*expected 0"),
    "is_decoder": (
        True,
        "has the rule 'expert-choice' for encoder.layer.0.intermediate, a layer of a decoder",
    ),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_without_meaning_are_refused(option, artifact):
    _, out = artifact(*ENCODER, experts=4, select=RULE, noise=0.75)
    value, told = OPTIONS[option]
    config = transformers.AutoConfig.from_pretrained(out, trust_remote_code=True)
    setattr(config, option, value)
    with pytest.raises(ValueError, match=told):
        transformers.AutoModelForMaskedLM.from_config(config, trust_remote_code=True)


def test_exports(artifact, tmp_path):
    _, out = artifact(*ENCODER, experts=4, select=RULE, noise=0.75)
    with pytest.raises(ExportError, match="take more tokens of a longer sequence"):
        export(out, tmp_path / "onnx", Export(to="onnx"))
    export(out, tmp_path / "dense", Export(to="dense"))
