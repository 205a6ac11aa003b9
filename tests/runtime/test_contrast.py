"""Self-contrast (SCMoE, arXiv 2405.14507) against a loop of two forward passes, written from the paper.

The loop keeps no cache, and routes weakly by hooks that compute every expert anew.
"""

import functools
import math
from contextlib import contextmanager

import pytest
import torch
import transformers
from helpers.expert_mixtures import EXPERTS, save_mixture
from helpers.mixtures import combined, fill
from helpers.models import generative, load_pair, token_ids

from mpoe_convert import Recipe, convert, router_stats
from mpoe_convert.artifact.layout import files_in_folders
from mpoe_convert.runtime import GENERATE_PATH
from mpoe_convert.runtime.modeling_mpoe import Router, choose_weakly, contrast
from mpoe_convert.source.hub import GENERATE_FILE

STRENGTH, ALPHA, STEPS = 0.7, 0.1, 4
OPTIONS = {"max_new_tokens": STEPS, "return_dict_in_generate": True, "output_scores": True}


@pytest.fixture(scope="module")
def load(artifact):
    """A model whose experts differ, with routers that are far from indifferent, made once."""
    made = {}

    def load(model_type: str, **recipe):
        key = (model_type, *recipe.items())
        if key not in made:
            folder, out = artifact(model_type, **{"experts": 5, "noise": 0.75} | recipe)
            _, model = load_pair(folder, out, generative(model_type))
            for _, ffn in model.mixtures():
                fill(ffn.router)
                for name, parameter in ffn.named_parameters():
                    if ".aux_" in name:
                        fill_like(parameter)
            model.generation_config.eos_token_id = None
            made[key] = model
        return made[key]

    return load


def fill_like(parameter: torch.nn.Parameter) -> None:
    """Let the experts differ a lot."""
    generator = torch.Generator().manual_seed(parameter.shape[0])
    with torch.no_grad():
        parameter.add_(0.7 * torch.randn(parameter.shape, generator=generator))


def third_best(ffn, token: torch.Tensor) -> int:
    """Or the last one, of fewer."""
    scores = [(row @ token).item() for row in ffn.router.weight]
    if ffn.rule == "top-any":
        scores = [score / row.norm().item() for score, row in zip(scores, ffn.router.weight, strict=True)]
    return sorted(range(len(scores)), key=lambda expert: -scores[expert])[: min(3, len(scores))][-1]


@contextmanager
def weakly(model):
    """Inside, every token goes to its third best expert alone, in every mixture."""

    def run(ffn, args, output):
        rows = [combined(ffn, token, {third_best(ffn, token): 1.0}) for token in args[0].flatten(0, -2)]
        return torch.stack(rows).reshape(output.shape)

    hooks = [ffn.register_forward_hook(run) for _, ffn in model.mixtures()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def last_logits(model, ids, mask, target) -> torch.Tensor:
    """(B, V) of the next token."""
    if model.config.is_encoder_decoder:
        return model(input_ids=ids, attention_mask=mask, decoder_input_ids=target).logits[:, -1]
    whole = torch.cat([ids, target], 1)
    mask = torch.cat([mask, torch.ones_like(target)], 1)
    places = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
    return model(input_ids=whole, attention_mask=mask, position_ids=places).logits[:, -1]


@torch.no_grad()
def loop(model, ids, mask, choose=lambda scores: scores.argmax(-1), weakly=weakly):
    """(tokens (B, STEPS), scores (STEPS, B, V)) by the paper's formula."""
    start = model.config.decoder_start_token_id if model.config.is_encoder_decoder else 0
    target = torch.full((len(ids), int(model.config.is_encoder_decoder)), start)
    every = []
    for _ in range(STEPS):
        strong = last_logits(model, ids, mask, target)
        with weakly(model):
            weak = last_logits(model, ids, mask, target)
        scores = torch.full_like(strong, -math.inf)
        for row, token in (strong >= strong.amax(1, keepdim=True) + math.log(ALPHA)).nonzero().tolist():
            scores[row, token] = (1 + STRENGTH) * strong[row, token] - STRENGTH * weak[row, token]
        every.append(scores)
        target = torch.cat([target, choose(scores)[:, None]], 1)
    return target[:, -STEPS:], torch.stack(every)


def prompt(model):
    """Two sequences, the shorter one padded where its model expects that."""
    ids, mask = token_ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    places = slice(4, 6) if model.config.is_encoder_decoder else slice(0, 2)
    ids[1, places], mask[1, places] = 0, 0
    return ids, mask


def assert_is_the_loop(model, loop, **options) -> None:
    ids, mask = prompt(model)
    tokens, scores = loop
    found = model.generate(
        ids, attention_mask=mask, self_contrast=STRENGTH, do_sample=False, **OPTIONS, **options
    )
    assert torch.equal(found.sequences[:, -STEPS:], tokens)
    torch.testing.assert_close(torch.stack(found.scores), scores, rtol=1e-4, atol=1e-4)
    plain = model.generate(ids, attention_mask=mask, do_sample=False, **OPTIONS)
    before, contrasted = plain.scores[0], found.scores[0]
    assert ((before - contrasted).abs()[contrasted.isfinite()] > 0.01).any()  # there is something to see


CACHES = ({}, {"use_cache": False}, {"cache_implementation": "static"})


@pytest.mark.parametrize("model_type", ["gpt2", "t5", "qwen2_vl"])  # the last has positions (4, B, T)
def test_every_token_is_that_of_the_formula(model_type, load):
    model = load(model_type)
    expected = loop(model, *prompt(model))
    for options in CACHES:
        assert_is_the_loop(model, expected, **options)


RECIPES = {
    "one of two experts": {"experts": 2, "top_k": 1},
    "top-p": {"select": "top-p", "threshold": 0.6},
    "top-any": {"select": "top-any"},
    "shared experts": {"shared_experts": 1},
    "parts": {"kind": "split", "experts": 4, "top_k": 3},
}


@pytest.mark.parametrize("name", RECIPES)
def test_of_every_selection(name, load):
    model = load("gpt2", **RECIPES[name])
    assert_is_the_loop(model, loop(model, *prompt(model)))


# ---------------------------------------------------------------------------------------------------
# Mixtures as sources, whose routers stay


def weak_weights(model_type: str, router, logits: torch.Tensor, expert: int) -> float:
    """Of two choices that are both this expert, by the formulas of the stock routers; logits (E,)."""
    if model_type == "mixtral":  # normalised
        return 1.0
    if model_type == "qwen3_moe":  # not normalised
        return 2 * float(logits.exp()[expert] / logits.exp().sum())
    return router.routed_scaling_factor  # deepseek_v3, normalised


@contextmanager
def stock_weakly(model_type, model):
    """Inside, the experts of a stock mixture get every token with its third best expert alone."""

    def choose(block, tokens):
        router = block.gate
        logits = tokens @ router.weight.T
        scores = logits
        if model_type == "deepseek_v3":
            scores = 1 / (1 + (-logits).exp()) + router.e_score_correction_bias
        experts = [sorted(range(EXPERTS), key=lambda e, row=row: -row[e].item())[2] for row in scores]
        pairs = zip(logits, experts, strict=True)
        weights = [weak_weights(model_type, router, row, expert) for row, expert in pairs]
        return tokens, torch.tensor(experts)[:, None], torch.tensor(weights)[:, None]

    hooks = [
        block.experts.register_forward_pre_hook(lambda _, args, block=block: choose(block, args[0]))
        for block in (layer.mlp for layer in model.model.layers)
        if hasattr(block, "experts")
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """(stock model, converted model) of a type; whatever else it has, normalised weights or not."""

    def mixture(model_type: str):
        root = tmp_path_factory.mktemp(model_type)
        more = {"norm_topk_prob": False} if model_type == "qwen3_moe" else {}
        source = save_mixture(model_type, root / "source", **more)
        convert(Recipe(str(source)), root / "out")
        stock, model = load_pair(source, root / "out", "AutoModelForCausalLM")
        model.generation_config.eos_token_id = None
        return stock, model

    return mixture


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_stock_routers_choose_weakly(model_type, mixture):
    stock, model = mixture(model_type)
    expected = loop(stock, *prompt(model), weakly=functools.partial(stock_weakly, model_type))
    assert_is_the_loop(model, expected)


def test_stock_routers_that_choose_in_another_way_are_refused(mixture):
    """PhiMoE takes one maximum after the other. Nothing stays of the call."""
    _, model = mixture("phimoe")
    ids = token_ids(2, 6)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 2, "do_sample": False}
    before = model.generate(ids, **options)
    with pytest.raises(ValueError, match="one of this model chooses in another way"):
        model.generate(ids, self_contrast=STRENGTH, **options)
    assert torch.equal(model.generate(ids, **options), before)
    assert not torch.overrides._get_current_function_mode_stack()


def test_sampling_draws_from_the_contrasted_distribution(load):
    model = load("gpt2")
    ids, mask = (each.repeat_interleave(2, 0) for each in prompt(model))
    torch.manual_seed(0)
    expected, _ = loop(model, ids, mask, lambda scores: torch.multinomial(scores.softmax(-1), 1).squeeze(1))
    options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "num_return_sequences": 2}
    ids, mask = prompt(model)
    torch.manual_seed(0)
    found = model.generate(ids, attention_mask=mask, self_contrast=STRENGTH, max_new_tokens=STEPS, **options)
    assert torch.equal(found[:, -STEPS:], expected)


@pytest.mark.parametrize("model_type", ["gpt2", "t5"])
def test_tasks_go_with_their_sequences(model_type, artifact):
    _, out = artifact(model_type, experts=5, noise=0.75)
    auto = getattr(transformers, generative(model_type))
    torch.manual_seed(0)
    model = auto.from_pretrained(out, trust_remote_code=True, router_tasks=["a", "b"])
    options = {
        "self_contrast": STRENGTH,
        "max_new_tokens": STEPS,
        "do_sample": False,
        "min_new_tokens": STEPS,
    }
    ids = token_ids(2, 6)
    together = model.generate(ids, attention_mask=torch.ones_like(ids), task_ids=["b", "a"], **options)
    model.route_by(["b", "a"])
    assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **options), together)
    for row, task in enumerate(["b", "a"]):
        one = ids[row : row + 1]
        alone = model.generate(one, attention_mask=torch.ones_like(one), task_ids=task, **options)
        assert torch.equal(alone[0], together[row])


def test_nothing_stays(load):
    """Of a call that ends, and of one that fails; and 0 is the stock method."""
    model = load("gpt2")
    ids, _ = prompt(model)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, **OPTIONS}
    before = model.generate(ids, **options)
    rules = [ffn.router.select for _, ffn in model.mixtures()]

    def fail(ids, scores):
        raise KeyError("a processor")

    model.generate(ids, self_contrast=STRENGTH, **options)
    with pytest.raises(KeyError, match="a processor"):
        model.generate(ids, self_contrast=STRENGTH, logits_processor=[fail], **options)
    assert [ffn.router.select for _, ffn in model.mixtures()] == rules
    after = model.generate(ids, self_contrast=0.0, **options)
    assert torch.equal(after.sequences, before.sequences)
    assert torch.equal(torch.stack(after.scores), torch.stack(before.scores))


def test_contrasted_passes_are_not_compiled(load, monkeypatch):
    """A static cache lets transformers compile; compiled code may keep the hook of an earlier strength."""

    def backend(*args, **kwargs):
        raise AssertionError("something is compiled")

    model = load("gpt2")
    monkeypatch.setattr(transformers.CompileConfig, "_compile_all_devices", True)
    monkeypatch.setattr(model, "_compiled_call", None, raising=False)
    ids, mask = prompt(model)
    options = {"attention_mask": mask, "do_sample": False, **OPTIONS}
    compiling = {"compile_config": transformers.CompileConfig(backend=backend)}
    compiling |= {"cache_implementation": "static"}
    for strength in (0.5, 2.0):
        expected = model.generate(ids, self_contrast=strength, **options)
        found = model.generate(ids, self_contrast=strength, **compiling, **options)
        scores = (torch.stack(each.scores) for each in (found, expected))
        torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)


def test_a_config_may_say_it(load):
    """That of the call before that of the model, and an argument before both."""
    model = load("gpt2")
    ids, mask = prompt(model)
    options = {"attention_mask": mask}

    def config(**more):
        return transformers.GenerationConfig(max_new_tokens=STEPS, do_sample=False, **more)

    def scores(found):
        return torch.stack(found.scores)

    plain, expected, other = (
        scores(model.generate(ids, self_contrast=b, do_sample=False, **options, **OPTIONS))
        for b in (0.0, STRENGTH, 2.0)
    )
    returning = {"return_dict_in_generate": True, "output_scores": True}
    given = config(self_contrast=STRENGTH, **returning)
    assert torch.equal(scores(model.generate(ids, given, **options)), expected)
    before = model.generation_config
    try:
        model.generation_config = config(self_contrast=2.0, eos_token_id=None, **returning)
        assert torch.equal(scores(model.generate(ids, **options)), other)
        assert torch.equal(scores(model.generate(ids, generation_config=given, **options)), expected)
        assert torch.equal(scores(model.generate(ids, self_contrast=0.0, **options)), plain)
    finally:
        model.generation_config = before


@pytest.mark.parametrize("model_type", ["gpt2", "t5"])
def test_what_is_returned_is_of_the_strong_pass(model_type, load):
    """States and attention are those without a contrast, at the first step, where the text is the same."""
    model = load(model_type)
    ids, mask = prompt(model)
    options = {"attention_mask": mask, "do_sample": False, "output_hidden_states": True, **OPTIONS}
    options |= {"output_attentions": True, "output_logits": True}
    model.set_attn_implementation("eager")
    plain = model.generate(ids, **options)
    found = model.generate(ids, self_contrast=STRENGTH, **options)
    assert type(found) is type(plain)
    states = {name for name in plain if name.endswith(("_states", "attentions"))}
    contrasted = {"sequences", "scores", "logits"}
    assert set(found) == states | contrasted
    assert set(plain) - set(found) in ({"cache"}, {"past_key_values"})  # it would be of both passes
    for name in states:  # an encoder has no steps
        one, other = (each[name] if name.startswith("encoder") else each[name][0] for each in (found, plain))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    for name in contrasted:
        assert [each.shape for each in found[name]] == [each.shape for each in plain[name]]


def test_router_stats_count_the_strong_pass_alone(load):
    """Of a single step, that of the prompt, whose padding does not count."""
    model = load("gpt2")
    ids, mask = prompt(model)
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 1}
    with router_stats(model, similarity_tokens=20) as expected:
        model.generate(ids, **options)
    with router_stats(model, similarity_tokens=20) as found:
        model.generate(ids, self_contrast=STRENGTH, **options)
    assert len(expected) == 2
    for path, stats in expected.items():
        assert found[path].num_tokens == stats.num_tokens == mask.sum()
        assert torch.equal(found[path].load, stats.load)
        torch.testing.assert_close(found[path].entropy, stats.entropy)
        torch.testing.assert_close(found[path].similarity, stats.similarity)


# ---------------------------------------------------------------------------------------------------
# Choice and formula


@pytest.mark.parametrize("combine", ["renormalised", "raw"])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("number", [2, 3, 6])
def test_the_weak_choice_is_the_third_best(number, has_bias, combine):
    router = fill(Router(8, number, 2))
    router.combine = combine
    generator = torch.Generator().manual_seed(number)
    logits = torch.randn(20, number, generator=generator)
    bias = torch.randn(number, generator=generator) if has_bias else None
    choices = choose_weakly(router, logits, bias)
    assert choices.tokens.tolist() == list(range(20)) and choices.per_token == 1
    for token, row in enumerate(logits):
        probability = row.exp() / row.exp().sum()
        scores = row if bias is None else probability + bias
        expert = sorted(range(number), key=lambda e: -scores[e].item())[: min(3, number)][-1]
        assert choices.experts[token] == expert
        weight = probability[expert] if combine == "raw" else torch.tensor(1.0)
        torch.testing.assert_close(choices.weights[token], weight)


def test_unlikely_tokens_are_out_whatever_the_weak_pass_says():
    strong = torch.tensor([[0.0, math.log(0.11), math.log(0.09)]])
    weak = torch.tensor([[3.0, -1.0, -100.0]])
    expected = [-1.5, 1.5 * math.log(0.11) + 0.5, -math.inf]
    torch.testing.assert_close(contrast(strong, weak, 0.5), torch.tensor([expected]))
    assert contrast(strong.bfloat16(), weak.bfloat16(), 0.5).dtype == torch.float32


# ---------------------------------------------------------------------------------------------------
# What it does not go with


def filled_cache(model, ids) -> dict:
    return {"past_key_values": model(ids[:, :-1], use_cache=True).past_key_values}


REFUSED = {
    "strength": (
        lambda model, ids: {"self_contrast": -1.0},
        "self_contrast is -1.0: expected 0, which is off",
    ),
    "not finite": (lambda model, ids: {"self_contrast": math.nan}, "self_contrast is nan: expected 0"),
    "text": (lambda model, ids: {"self_contrast": "0.5"}, "self_contrast is '0.5': expected 0, which is off"),
    "beams": (lambda model, ids: {"num_beams": 2}, "found beam search, which has no cache for a weak pass"),
    "drafts": (lambda model, ids: {"prompt_lookup_num_tokens": 2}, "found assisted generation, which has no"),
    "paged": (
        lambda model, ids: {"cache_implementation": "paged"},
        "found continuous batching, which has no",
    ),
    "chunks": (
        lambda model, ids: {"prefill_chunk_size": 2, "cache_implementation": "static"},
        "found prefill_chunk_size with a static one",
    ),
    "cache": (filled_cache, "needs a cache of both passes, found one that another call has filled"),
    "images": (lambda model, ids: {"pixel_values": ids}, "runs its weak pass on text, found pixel_values"),
    "states": (lambda model, ids: {"encoder_outputs": (ids,)}, "on text, found encoder_outputs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name, load):
    model = load("gpt2")
    ids = token_ids(1, 5)
    arguments, told = REFUSED[name]
    with torch.no_grad():
        options = {"self_contrast": STRENGTH, "max_new_tokens": 2} | arguments(model, ids)
    with pytest.raises(ValueError, match=told):
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)


def test_one_expert_is_refused(load):
    model = load("gpt2", **RECIPES["one of two experts"])
    ids = token_ids(1, 5)
    router = model.mixtures()[0][1].router
    router.num_experts = 1
    try:
        with pytest.raises(ValueError, match="needs a second expert"):
            model.generate(ids, self_contrast=STRENGTH)
    finally:
        router.num_experts = 2


# ---------------------------------------------------------------------------------------------------
# transformers' custom generation


def test_an_artifact_holds_custom_generation(load, artifact, tmp_path):
    folder, out = artifact("gpt2", experts=5, noise=0.75)
    assert (out / GENERATE_FILE).read_bytes() == GENERATE_PATH.read_bytes()
    assert GENERATE_FILE in files_in_folders(out)  # so that finetune's output has it too
    model = load("gpt2")
    assert "generate" not in vars(model)  # transformers put nothing over the method
    ids = token_ids(1, 5)
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    options |= {"self_contrast": STRENGTH}
    expected = model.generate(ids, **options)
    custom = {"custom_generate": str(out), "trust_remote_code": True}
    assert torch.equal(model.generate(ids, **options, **custom), expected)
    model.save_pretrained(tmp_path)  # without the folder
    saved = type(model).from_pretrained(tmp_path)
    saved.generation_config.eos_token_id = None
    assert torch.equal(saved.generate(ids, **options), expected)
    dense = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no routers that can choose weak experts"):
        dense.generate(ids, **options, **custom)


def test_an_encoder_holds_none(artifact):
    assert not (artifact("bert", "AutoModelForMaskedLM")[1] / GENERATE_FILE).exists()
