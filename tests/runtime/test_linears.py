"""Large cores as linear layers, which is what libraries round."""

import copy
import math
import pickle

import pytest
import torch
from helpers.mixtures import NUM_EXPERTS, SCHEDULES, TERMS, fill, make_ffn, mirrored, randn, schedule
from helpers.models import stored
from helpers.rounding import Eighths, rounded
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mpoe_convert import Recipe, convert
from mpoe_convert.runtime import modeling_mpoe
from mpoe_convert.runtime.modeling_mpoe import Chain, FeedForward, MatrixCache

SIZES = {
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
KINDS = {
    "mpo": {"experts": 3, "bond_dim": 8, "noise": 0.1},
    "one-sided": {"experts": 3, "bond_dim": 8, "noise": 0.1, "layout": "one-sided"},
    "balanced": {"experts": 3, "bond_dim": 64, "noise": 0.1, "layout": "balanced"},
    "compressed": {"experts": 3, "bond_dim": 8, "noise": 0.1, "keep": 0.8},
    "low-rank": {"experts": 3, "kind": "low-rank", "bond_dim": 8, "noise": 0.1},
    "core-space": {"experts": 3, "kind": "core-space", "bond_dim": 8},
    "low-rank of sizes": {"experts": 3, "kind": "low-rank", "bond_dim": "8/32/40", "noise": 0.1},
    "dense": {"experts": 3, "kind": "dense", "noise": 0.1},
    "adapter": {"experts": 3, "kind": "adapter", "noise": 0.1},
    "mixture": {},
    "compressed mixture": {"keep": 0.8},
}
# Of a layer's tensors, those that are rounded; worked out by hand from shapes of 64 x 128 (64 x 96).
LARGE = {
    "mpo": {"central_0", "central_2"},
    "one-sided": {"central_1"},
    "low-rank": {"central_0"},
    "low-rank of sizes": {"central_0", "aux_0", "aux_1"},
    "dense": {"aux_0"},
    "adapter": {"central_0"},
    "mixture": {"aux_0"},
}


def with_linears(ffn):
    """A copy whose tied cores are all linear layers of the same weights."""
    made = copy.deepcopy(ffn)
    for name, chain in made.named_modules():
        if isinstance(chain, Chain):
            chain.large = [copies == 1 for copies in chain.copies]
            chain.use_linears()
            put_weights(chain, ffn.get_submodule(name))
    return made.to(next(ffn.parameters()).dtype)


@torch.no_grad()
def put_weights(chain, source):
    for name in chain.core_names:
        core, layer = getattr(source, name), getattr(chain, name)
        if not isinstance(layer, nn.Module):
            continue
        layers = layer if isinstance(layer, nn.ModuleList) else [layer]
        sizes = [own.weight.numel() for own in layers]
        for own, part in zip(layers, core.flatten().split(sizes), strict=True):
            own.weight.copy_(part.view(own.in_features, own.out_features).T)


def make_sizes():
    """The mixture of `make_ffn`, whose experts have the ranks 1, 3, 2, 3."""
    up = TERMS["low rank"] | {"bonds": [3], "by_expert": {"bonds": [[1], [3], [2], [3]]}}
    gate, down = {"terms": [up], "bias": None}, mirrored(up) | {"by_expert": up["by_expert"]}
    ffn = FeedForward({"gate": gate, "up": gate, "down": {"terms": [down], "bias": None}}, NUM_EXPERTS, 2)
    ffn.act = nn.SiLU()
    return fill(ffn)


@pytest.mark.parametrize("how", SCHEDULES)
@pytest.mark.parametrize("name", [*TERMS, "lora", "sizes"])
def test_layers_compute_what_cores_do(name, how):
    ffn = (make_sizes() if name == "sizes" else make_ffn(name, bias="per-expert")).double()
    x = randn(7, 12)
    with torch.no_grad():
        expected = ffn(x)
        linear = with_linears(ffn)
        assert any(isinstance(module, nn.Linear) for module in linear.modules())
        with schedule(how, linear):
            found = linear(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["dense", "low rank", "one-sided"])
def test_rows_of_another_dtype_are_cast_as_for_cores(name):
    """As T5 does, which keeps its down-projections in float32 while the model is in float16."""
    ffn, x = make_ffn(name).double(), randn(7, 12).float()
    with torch.no_grad():
        expected, found = ffn(x), with_linears(ffn)(x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["dense", "balanced", "sizes"])
def test_layers_compile_whole(name):
    """No shape of the graph depends on what was routed."""
    made = make_sizes() if name == "sizes" else make_ffn(name)
    ffn, x = with_linears(made.double()).eval(), randn(7, 12)
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(ffn, fullgraph=True, backend="eager")(x)
        torch.testing.assert_close(found, ffn(x), rtol=1e-9, atol=1e-9)


def test_no_rows_pass_no_expert():
    ffn = with_linears(make_ffn("dense").double())
    assert ffn(torch.empty(0, 12, dtype=torch.float64)).shape == (0, 12)


def test_matrices_of_layers_are_paid_for():
    """To have the matrix of a layer of 12 x 10, the identity of 12 passes through it."""
    plain, linear = (make(make_ffn("one-sided")).up._chains[0] for make in (lambda ffn: ffn, with_linears))
    rows_and_cols = [(math.prod(s[:2]), math.prod(s[2:])) for s in plain.shapes]
    assert linear.rebuild_flops - plain.rebuild_flops == sum(2 * r * r * c for r, c in rows_and_cols)
    for how in ("apply", "cached"):
        assert linear.cost(5, 2, how) == plain.cost(5, 2, how)


def test_matrices_of_layers_of_experts_that_differ_cost_their_mean():
    """Identities of 12 and of the rank pass through the two layers of each."""
    plain, linear = (make(make_sizes()).up._chains[0] for make in (lambda ffn: ffn, with_linears))
    each = [2 * 12 * 12 * rank + 2 * rank * rank * 10 for rank in (1, 3, 2, 3)]
    assert linear.rebuild_flops - plain.rebuild_flops == sum(each) / 4


def test_packed_layers_cost_the_bytes_that_they_hold():
    """One expert of four, 12 x 2 and 2 x 10: words of 4 bytes per row, and a scale; no parameter."""
    chain = with_linears(make_ffn("low rank").double()).up._chains[0]
    for layer in (*chain.aux_0, *chain.aux_1):
        del layer.weight
        layer.register_buffer("weight_packed", torch.zeros(layer.out_features, 2, dtype=torch.int32))
        layer.register_buffer("weight_scale", torch.zeros(layer.out_features, 1, dtype=torch.float32))
    assert chain.cost(5, 1, "apply").nbytes == (2 + 10) * (2 * 4 + 4)
    assert chain.cost(5, 1, "cached").nbytes == 12 * 10 * 4
    for layer in chain.aux_0:
        del layer.weight_scale
    assert chain.cost(5, 1, "cached").nbytes == 12 * 10 * 2


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The artifact of a kind, made once."""
    root, made = tmp_path_factory.mktemp("linears"), {}

    def make(kind):
        if kind not in made:
            source = root / ("mixtral" if "mixture" in kind else "llama")
            if not source.exists():
                torch.manual_seed(0)
                if source.name == "llama":
                    model = LlamaForCausalLM(LlamaConfig(**SIZES))
                else:
                    sizes = SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
                    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))
                model.save_pretrained(source)
            convert(Recipe(str(source), **KINDS[kind]), root / kind)
            made[kind] = root / kind
        return made[kind]

    return make


def load(folder, **options):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 33)[None]).logits


@torch.no_grad()
def round_cores(model, tensors) -> set[str]:
    """Round the large cores of a model as linear layers of their transposed would be; their names."""
    found = set()
    for name, parameter in model.named_parameters():
        chain = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(chain, nn.Module) or ".terms." not in name or not hasattr(chain, "core_names"):
            continue
        core = name.rpartition(".")[2]
        if core in chain.core_names and chain.large[chain.core_names.index(core)]:
            parameter.copy_(rounded(tensors[name]))
            found.add(name)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantiser_of_linear_layers_rounds_the_large_cores(kind, out):
    folder = out(kind)
    plain, tensors = load(folder), stored(folder)
    exact = logits(plain)
    names = round_cores(plain, tensors)
    assert {name.rpartition(".")[2] for name in names} == LARGE.get(
        kind, {n.rpartition(".")[2] for n in names}
    )
    expected, model = logits(plain), load(folder, quantization_config=Eighths())
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".terms." in n]
    assert layers and {n if "central" in n else n.rpartition(".")[0] for n in layers} == names
    assert (expected - exact).norm() > 0.01 * exact.norm()
    for how in ("apply", "rebuild", "cached", "auto"):
        for _, ffn in model._mixings():
            ffn.schedule, ffn.cache = how, MatrixCache("all")
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_what_is_no_large_core_stays(out):
    """Routers, outer cores, norms, attention: bit for bit."""
    folder = out("mpo")
    model, tensors = load(folder, quantization_config=Eighths()), stored(folder)
    state = model.state_dict()
    large = {name for name in tensors if name.rpartition(".")[2] in LARGE["mpo"]}
    assert len(large) == 6
    for name in tensors.keys() - large:
        torch.testing.assert_close(state[name], tensors[name], rtol=0, atol=0, msg=name)


def test_models_without_a_quantiser_load_as_before_after_one_with(out):
    folder = out("dense")
    load(folder, quantization_config=Eighths())
    model, tensors = load(folder), stored(folder)
    assert model.state_dict().keys() >= tensors.keys()


def test_a_rounded_model_is_saved_and_loaded(out, tmp_path):
    """Under the names of layers: what a library makes of them is its own matter."""
    for kind in ("mpo", "compressed mixture"):
        model = load(out(kind), quantization_config=Eighths())
        model.save_pretrained(tmp_path / kind)
        again = load(tmp_path / kind)
        torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


def test_the_backbone_alone_is_rounded_alike(out):
    from transformers import AutoModel

    folder = out("compressed mixture")
    whole = load(folder, quantization_config=Eighths())
    alone = AutoModel.from_pretrained(folder, trust_remote_code=True, quantization_config=Eighths()).eval()
    ids = torch.arange(3, 33)[None]
    with torch.no_grad():
        expected, found = whole.model(ids).last_hidden_state, alone(ids).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_share_below_a_64th_is_small():
    assert modeling_mpoe.is_large(32, 32, 64 * 1024) and not modeling_mpoe.is_large(32, 32, 64 * 1024 + 1)
    assert not modeling_mpoe.is_large(31, 4096, 31 * 4096)


def test_a_rounded_mixture_is_pickled(out):
    model = load(out("mpo"), quantization_config=Eighths())
    torch.testing.assert_close(logits(pickle.loads(pickle.dumps(model))), logits(model), rtol=0, atol=0)
