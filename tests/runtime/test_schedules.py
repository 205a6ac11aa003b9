"""Which schedule runs, what it costs, and what the cache of built matrices keeps."""

import copy
import pickle
import re

import pytest
import torch
from helpers.mixtures import TERMS, fill, make_ffn, randn
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from mpoe_convert.runtime.modeling_mpoe import CONFIG_OPTIONS, FeedForward, MatrixCache

HIDDEN = 12


def tokens(num: int = 6) -> torch.Tensor:
    return randn(num, HIDDEN, dtype=torch.float32)


def cached(ffn: FeedForward, keep: str = "hit", limit: float | None = None) -> FeedForward:
    ffn.schedule, ffn.cache = "cached", MatrixCache(keep, limit)
    return ffn


def run(ffn: FeedForward, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return ffn(x)


def wide(layout: str = "one-sided") -> FeedForward:
    """64 x 256, bond 16: large enough for the schedules to differ."""
    if layout == "one-sided":
        up = {"in_dims": [16, 4, 1], "out_dims": [1, 16, 16], "bonds": [16, 16], "shared": [0, 1, 0]}
        down = {"in_dims": [16, 16, 1], "out_dims": [1, 4, 16], "bonds": [16, 16], "shared": [0, 1, 0]}
    else:
        up = {"in_dims": [4, 4, 4], "out_dims": [4, 16, 4], "bonds": [16, 16], "shared": [0, 1, 0]}
        down = {"in_dims": [4, 16, 4], "out_dims": [4, 4, 4], "bonds": [16, 16], "shared": [0, 1, 0]}
    form = {name: {"terms": [term], "bias": None} for name, term in (("up", up), ("down", down))}
    return fill(FeedForward(form, 4, 2), scale=0.2)


# ---------------------------------------------------------------------------------------------------
# Cost


@pytest.mark.parametrize("schedule", ["apply", "rebuild", "cached"])
@pytest.mark.parametrize("layout", ["one-sided", "two-sided"])
def test_flops_are_those_that_torch_counts(layout, schedule):
    """With so many tokens that every expert is hit."""
    ffn, x = wide(layout), randn(64, 64, dtype=torch.float32)
    ffn.schedule = schedule
    ffn.cache = MatrixCache("all") if schedule == "cached" else None
    run(ffn, x)  # fills the cache
    with FlopCounterMode(display=False) as counter:
        run(ffn, x)
    assert ffn.flops(64, schedule) == pytest.approx(counter.get_total_flops(), rel=1e-6)


FORMS = {
    "low rank": {"up": (64, 256, 8), "down": (256, 64, 8)},
    "low rank, compressed": {"gate": (64, 256, 8, 24), "up": (64, 256, 8, 24), "down": (256, 64, 8, 24)},
    "adapter": {"up": (64, 256), "down": (256, 64), "adapter": 8},
    "adapter, compressed": {
        "gate": (64, 256, 0, 24),
        "up": (64, 256),
        "down": (256, 64, 0, 24),
        "adapter": 8,
    },
}


def form_of(name: str, bias: str | None = None) -> dict:
    """Every matrix (rows, cols, rank of the experts' own term, rank of the shared one)."""

    def spec(rows, cols, own=0, rank=0):
        shared = {"in_dims": [rows], "out_dims": [cols], "bonds": [], "shared": [True]}
        thin = {"in_dims": [rows, 1], "out_dims": [1, cols]}
        if rank:
            shared = thin | {"bonds": [rank], "shared": [True, True]}
        own_terms = [thin | {"bonds": [own], "shared": [False, False]}] if own else []
        return {"terms": [shared, *own_terms], "bias": bias}

    return {key: spec(*value) if isinstance(value, tuple) else value for key, value in FORMS[name].items()}


@pytest.mark.parametrize("schedule", ["apply", "rebuild", "cached"])
@pytest.mark.parametrize("name", FORMS)
def test_flops_of_parts_that_run_once_per_token(name, schedule):
    """What all experts share works on a token once, in whatever schedule; adapters on every choice."""
    ffn, x = fill(FeedForward(form_of(name), 4, 2), scale=0.2), randn(64, 64, dtype=torch.float32)
    ffn.schedule = schedule
    ffn.cache = MatrixCache("all") if schedule == "cached" else None
    run(ffn, x)
    with FlopCounterMode(display=False) as counter:
        run(ffn, x)
    assert ffn.flops(64, schedule) == pytest.approx(counter.get_total_flops(), rel=1e-6)


@pytest.mark.parametrize("bias", [None, "shared", "per-expert"])
@pytest.mark.parametrize("name", ["low rank", "low rank, compressed"])
def test_parameters_and_bytes_are_those_of_the_tensors(name, bias):
    ffn = FeedForward(form_of(name, bias), 4, 2)
    own = sum(
        p[0].numel()
        for n, p in ffn.named_parameters()
        if ".aux_" in n or (bias == "per-expert" and "bias" in n)
    )
    assert ffn.own_params == own == sum(part.own_params for part in ffn.parts)
    assert ffn.shared_params + 4 * own == sum(p.numel() for p in ffn.parameters())
    assert ffn.bytes_read(10**6) == pytest.approx(sum(p.nbytes for p in ffn.parameters()))
    assert ffn.bytes_read(1) == pytest.approx(sum(p.nbytes for p in ffn.parameters()) - 2 * 4 * own)


def test_bytes_are_those_of_the_weights():
    ffn = wide()
    stored = sum(p.nbytes for p in ffn.parameters())
    assert ffn.bytes_read(10**6, "apply") == pytest.approx(stored)
    matrices = 2 * 4 * 64 * 256 * 4
    assert ffn.bytes_read(10**6, "rebuild") == pytest.approx(stored + 2 * matrices)
    assert ffn.bytes_read(10**6, "cached") == pytest.approx(ffn.router.weight.nbytes + matrices)
    one = ffn.bytes_read(1, "apply")  # two of four experts' auxiliaries
    aux = sum(p.nbytes for name, p in ffn.named_parameters() if ".aux_" in name)
    assert one == pytest.approx(stored - aux / 2)


def test_experts_hit_by_chance():
    ffn = make_ffn(top_k=2)
    hit = [ffn.work(num_tokens).experts for num_tokens in (0, 1, 2, 1000)]
    assert hit == pytest.approx([0, 2, 3, 4])


def test_the_cheapest_schedule_is_chosen():
    ffn = wide()
    assert ffn.choose_schedule(1) == "apply"
    crossover = next(n for n in (2**k for k in range(30)) if ffn.choose_schedule(n) == "rebuild")
    assert ffn.seconds(crossover, "rebuild") <= ffn.seconds(crossover, "apply")
    assert ffn.seconds(crossover // 2, "apply") <= ffn.seconds(crossover // 2, "rebuild")
    ffn.cache = MatrixCache("all")
    assert ffn.choose_schedule(10**6) == "rebuild"  # a gradient is wanted
    with torch.no_grad():
        assert ffn.choose_schedule(10**6) == "cached"
        assert wide("two-sided").choose_schedule(1) == "apply"  # nothing to cache in: built as needed
    ffn.schedule = "rebuild"
    assert ffn.choose_schedule(1) == "rebuild"


# ---------------------------------------------------------------------------------------------------
# Cache


@pytest.mark.parametrize("keep", ["hit", "all"])
@pytest.mark.parametrize("name", ["one-sided", "two-sided", "balanced", "lora"])
def test_cached_matrices_give_the_same(name, keep):
    plain, ffn = make_ffn(name, bias="per-expert"), cached(make_ffn(name, bias="per-expert"), keep)
    for num in (1, 6, 1):
        torch.testing.assert_close(run(ffn, tokens(num)), run(plain, tokens(num)), rtol=1e-4, atol=1e-4)
    assert ffn.cache.nbytes > 0


def entries(ffn: FeedForward) -> dict:
    return {key: matrix for key, (_, matrix) in ffn.cache.entries.items()}


def test_hit_keeps_what_was_used_and_all_everything():
    one = tokens(1)
    hit, everything = cached(make_ffn("two-sided")), cached(make_ffn("two-sided"), "all")
    chosen = hit.router(one).choices.experts.tolist()
    run(hit, one), run(everything, one)
    assert {expert for _, expert in entries(hit)} == set(chosen)
    assert len(entries(everything)) == 3 * 4  # gate, up, down of four experts
    kept = entries(hit)
    run(hit, one)
    assert all(entries(hit)[key] is matrix for key, matrix in kept.items())


def step(ffn):
    for parameter in ffn.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(ffn.parameters(), lr=0.1).step()


def in_place(ffn):
    with torch.no_grad():
        ffn.up.terms[0].central_1.mul_(1.5)


def unseen_in_training(ffn):
    """As FSDP does: the changed cores come to lie in the memory of the old ones, their versions unchanged."""
    ffn.train()
    ffn.up.terms[0].central_1.data.mul_(1.5)
    ffn.eval()


CHANGES = {
    "optimizer step": step,
    "loading": lambda ffn: ffn.load_state_dict({k: 2 * v for k, v in ffn.state_dict().items()}),
    "in place": in_place,
    "unseen, in training": unseen_in_training,
    "dtype": lambda ffn: ffn.to(torch.float64),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_core_is_noticed(change):
    ffn = cached(make_ffn("two-sided"), "all")
    before = run(ffn, tokens())
    CHANGES[change](ffn)
    x = tokens().to(ffn.up.terms[0].aux_0.dtype)
    found = run(ffn, x)
    ffn.schedule = "apply"
    torch.testing.assert_close(found, run(ffn, x), rtol=1e-5, atol=1e-5)
    assert change == "dtype" or not torch.allclose(found, before, rtol=1e-2)


@pytest.mark.parametrize("limit", [0, 12 * 10 * 4, 1000, 3 * 4 * 12 * 10 * 4])
def test_the_limit_is_kept(limit):
    ffn = cached(make_ffn("two-sided"), "all", limit)
    expected = run(make_ffn("two-sided"), tokens())
    for _ in range(2):
        torch.testing.assert_close(run(ffn, tokens()), expected, rtol=1e-4, atol=1e-4)
    assert ffn.cache.nbytes <= limit and ffn.cache.nbytes + 12 * 10 * 4 > min(limit, 3 * 4 * 12 * 10 * 4)


def test_gradients_never_pass_by_the_cache():
    ffn = cached(make_ffn("two-sided"), "all")
    run(ffn, tokens())
    ffn(tokens()).sum().backward()
    assert all(p.grad is not None for p in ffn.parameters())


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda ffn: pickle.loads(pickle.dumps(ffn))])
def test_copies_start_with_an_empty_cache(copy_of):
    ffn = cached(make_ffn("two-sided"), "all", 1e6)
    run(ffn, tokens())
    found = copy_of(ffn)
    assert not found.cache.entries and found.cache.keep == "all" and found.cache.limit == 1e6
    assert torch.equal(run(found, tokens()), run(ffn, tokens()))
    assert all(a is not b for a, b in zip(found.parts, ffn.parts, strict=True))
    assert found.parts == tuple(found.children())[:4]
    assert all(part._chains == tuple(part.terms) for part in found.parts[1:])


def test_autocast_has_matrices_of_its_own():
    ffn = cached(make_ffn("two-sided"), "all")
    with torch.autocast("cpu", torch.bfloat16):
        run(ffn, tokens())
    torch.testing.assert_close(run(ffn, tokens()), run(make_ffn("two-sided"), tokens()))


# ---------------------------------------------------------------------------------------------------
# Options of a loaded model


def mixtures(folder, **options) -> list[FeedForward]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)
    return [ffn for _, ffn in model.mixtures()]


def test_options_come_from_the_config_and_the_environment_comes_first(artifact, monkeypatch):
    out = artifact("gpt2", layout="two-sided")[1]
    assert [(ffn.schedule, ffn.cache) for ffn in mixtures(out)] == [("auto", None)] * 2
    for ffn in mixtures(out, mpoe_schedule="cached", mpoe_cache_bytes=2000):
        assert ffn.schedule == "cached" and ffn.cache.keep == "hit" and ffn.cache.limit == 1000
    monkeypatch.setenv("MPOE_SCHEDULE", "rebuild")
    monkeypatch.setenv("MPOE_CACHE", "all")
    monkeypatch.setenv("MPOE_CACHE_BYTES", "4000")
    for ffn in mixtures(out, mpoe_schedule="cached", mpoe_cache_bytes=2000):
        assert (ffn.schedule, ffn.cache.keep, ffn.cache.limit) == ("rebuild", "all", 2000)
    monkeypatch.setenv("MPOE_CACHE_BYTES", "4GB")
    with pytest.raises(ValueError, match="mpoe_cache_bytes is '4GB': expected a whole number"):
        mixtures(out)
    monkeypatch.setenv("MPOE_SCHEDULE", "quick")
    with pytest.raises(ValueError, match="mpoe_schedule is 'quick': choose one of auto, apply"):
        mixtures(out)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("router_capacity_factor", -1.0, "a number of at least 0 or none"),
        ("router_capacity_factor", "two", "a number of at least 0 or none"),
        ("router_jitter_noise", -0.5, "a number of at least 0"),
        ("router_jitter_noise", "0.1", "a number of at least 0"),
        ("router_aux_loss_coef", float("nan"), "a number of at least 0"),
        ("router_z_loss_coef", None, "a number of at least 0"),
        ("router_bias_update_rate", True, "a number of at least 0"),
        ("router_size_penalty", 1, "true or false"),
        ("router_tasks", "sums", "a list of texts or none"),
        ("mpoe_cache_bytes", -1, "a whole number of at least 0 or none"),
        ("mpoe_cache_bytes", "8G", "a whole number of at least 0 or none"),
    ],
)
def test_a_value_that_an_option_cannot_have_is_refused(name, value, expected, artifact):
    with pytest.raises(ValueError, match=rf"{name} is {re.escape(repr(value))}: expected {expected}$"):
        mixtures(artifact("gpt2")[1], **{name: value})


@pytest.mark.parametrize("option", CONFIG_OPTIONS, ids=lambda option: option.name)
def test_defaults_fit_and_every_number_has_a_least_value(option):
    option.check(option.default)
    kinds = getattr(option.type, "__args__", (option.type,))
    assert (option.least is not None) == bool({int, float} & set(kinds))


@pytest.mark.parametrize("options", [{"mpoe_cache": "all"}, {"mpoe_schedule": "rebuild"}])
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_generation_is_the_same(model_type, options, artifact):
    out = artifact(model_type, layout="two-sided", noise=0.1)[1]
    ids = torch.arange(3, 12).reshape(1, -1)
    found = []
    for chosen in ({}, options):
        model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, **chosen).eval()
        found.append(model.generate(ids, max_new_tokens=6, do_sample=False, min_new_tokens=6))
    assert torch.equal(*found)


def test_thin_factors_are_never_expanded():
    """A centre cut in two and low-rank experts cost what their factors cost."""
    terms = [TERMS["one-sided, shared centre of two"], TERMS["low rank"]]
    spec = {"terms": terms, "bias": None}
    down = {"terms": [{"in_dims": [10], "out_dims": [12], "bonds": [], "shared": [True]}], "bias": None}
    ffn = fill(FeedForward({"up": spec, "down": down}, 4, 2))
    ffn.act = nn.ReLU()
    with FlopCounterMode(display=False) as counter:
        run(ffn, tokens(1))
    assert counter.get_total_flops() == ffn.flops(1, "apply")
