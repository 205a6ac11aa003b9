"""Moments at a mixture's experts, against the stock modules' own answers to one expert at a time."""

from types import SimpleNamespace

import pytest
import torch
from helpers.stock_mixtures import CONFIGS, fill, make_model, neurons_alone, run_alone
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from mpoe_convert.compression.batches import split
from mpoe_convert.compression.expert_moments import (
    BORROWED,
    Borrowing,
    collect,
    expert_outputs,
    hidden_neurons,
    is_experts,
    unseen_experts,
)
from mpoe_convert.decomposition.symmetric import add_gram, packed_length, unpacked
from mpoe_convert.errors import CheckpointError


def pack(matrix):
    packed = torch.zeros(packed_length(len(matrix)), dtype=matrix.dtype)
    add_gram(packed, torch.linalg.cholesky(matrix + 1e-12 * torch.eye(len(matrix))).mT)
    return packed


def make_batches(count=5, examples=3, tokens=7):
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(64, (examples, tokens), generator=generator)} for _ in range(count)]


def calls_of(model, batches):
    """path -> [(hidden states, experts, weights)] of the stock model's own passes, one per batch."""
    found = {}

    def record(path):
        return lambda module, args, kwargs: found.setdefault(path, []).append((*args, *kwargs.values()))

    hooks = [
        module.register_forward_pre_hook(record(path), with_kwargs=True)
        for path, module in model.named_modules()
        if is_experts(module)
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    return found


def moments_of(model, batches, **options):
    found = {}
    collect(model, batches, found.__setitem__, **options)
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_moments_are_those_of_the_calls(name):
    model, batches = make_model(name), make_batches()
    found, calls = moments_of(model, batches), calls_of(model, split(batches)[0])
    assert list(found) == list(calls) and len(found) == 2
    for path, moments in found.items():
        module = model.get_submodule(path)
        x, chosen, weights = (torch.cat(parts) for parts in zip(*calls[path], strict=True))
        assert moments.total == len(x)
        for expert in range(4):
            combine = (weights * (chosen == expert)).sum(1)  # 0 where the token goes elsewhere
            hit = (chosen == expert).any(1)
            assert moments.tokens[expert] == hit.sum()
            for rows, sums in ((x, moments.inputs), (neurons_alone(module, expert, x), moments.inner)):
                expected = (rows * combine.square()[:, None]).mT @ rows
                torch.testing.assert_close(unpacked(sums[expert]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_are_means_of_what_experts_add(name):
    """REAP's S_j, from the stock module's answers to all tokens that go to one expert."""
    model, batches = make_model(name), make_batches()
    full, lean = moments_of(model, batches), moments_of(model, batches, moments=False)
    calls = calls_of(model, split(batches)[0])
    for path, found in full.items():
        module = model.get_submodule(path)
        x, chosen, weights = (torch.cat(parts) for parts in zip(*calls[path], strict=True))
        for expert in range(4):
            norms = run_alone(module, expert, x).norm(dim=1)
            terms = [float(weights[t, k] * norms[t]) for t, k in (chosen == expert).nonzero().tolist()]
            expected = sum(terms) / len(terms) if terms else 0.0
            assert float(found.scores[expert]) == pytest.approx(expected, rel=1e-4)
        assert torch.equal(lean[path].saliency, found.saliency) and lean[path].total == found.total
        assert torch.equal(lean[path].tokens, found.tokens)
    kept = found.of([1, 3])
    assert torch.equal(kept.inputs, found.inputs[[1, 3]]) and torch.equal(kept.tokens, found.tokens[[1, 3]])


@pytest.mark.parametrize("cls", [MixtralExperts, GptOssExperts, NemotronHExperts])
def test_an_expert_by_its_flags(cls):
    config = SimpleNamespace(
        num_local_experts=3,
        n_routed_experts=3,
        hidden_size=8,
        intermediate_size=8,
        moe_intermediate_size=8,
        moe_latent_size=None,
        hidden_act="silu",
        mlp_hidden_act="relu2",
        swiglu_alpha=1.702,
        swiglu_limit=7.0,
        _experts_implementation="eager",
    )
    module = fill(cls(config))
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    assert is_experts(module)
    for expert in range(3):
        inner = hidden_neurons(module, expert, x)
        torch.testing.assert_close(inner, neurons_alone(module, expert, x))
        torch.testing.assert_close(expert_outputs(module, expert, inner), run_alone(module, expert, x))


def test_padding_is_not_counted():
    model, batches = make_model("mixtral"), make_batches()
    for batch in batches:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, 4:] = 0
    padded = moments_of(model, batches)
    calls = calls_of(model, split(batches)[0])
    assert padded
    for path, moments in padded.items():
        rows = [
            x.unflatten(0, (3, 7))[batch["attention_mask"].bool()]
            for (x, *_), batch in zip(calls[path], split(batches)[0], strict=True)
        ]
        assert moments.total == sum(map(len, rows))
        assert int(moments.tokens.sum()) == 2 * moments.total


def test_experts_that_no_token_reaches_are_told():
    model = make_model("mixtral")
    path = next(path for path, module in model.named_modules() if is_experts(module))
    gate = model.get_submodule(path.rpartition(".")[0]).gate
    fixed = torch.tensor([0.0, 5.0, 0.0, 4.0])
    gate.register_forward_hook(lambda module, args, output: _routed_by(fixed, output))
    moments = moments_of(model, make_batches())[path]
    assert unseen_experts(moments.tokens) == [0, 2]
    metric = moments.metric("inputs")
    assert len(metric) == 4 and not moments.inputs[0].any()
    assert torch.linalg.matrix_rank(metric[0]) == 16


def _routed_by(logits, output):
    """The router's output as if all tokens had these logits."""
    scores, weights, index = output
    top = logits.softmax(0).topk(2)
    return scores, (top.values / top.values.sum()).expand_as(weights), top.indices.expand_as(index)


def test_borrowing_shrinks_towards_the_moment_of_the_layer():
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (4, 0, 30)]
    sums = torch.stack([r.mT @ r for r in rows])
    tokens = torch.tensor([4, 0, 30])
    packed = torch.stack([pack(each) for each in sums])
    borrowing = Borrowing(packed, tokens, 17, BORROWED)
    c, every = BORROWED * 6, torch.cat(rows)
    layer = every.mT @ every / 34
    for expert, n in enumerate(tokens.tolist()):
        own = sums[expert] / max(n, 1)
        expected = (n + c) / 17 * (n * own + c * layer) / (n + c)
        torch.testing.assert_close(borrowing[expert], expected)
    torch.testing.assert_close(Borrowing(packed, tokens, 17, 0.0)[2], sums[2] / 17)
    with pytest.raises(IndexError):
        borrowing[3]
    every = torch.stack(list(borrowing))
    torch.testing.assert_close(borrowing.mean(), every.mean(0))
    levels = every.diagonal(dim1=1, dim2=2).mean(1)
    torch.testing.assert_close(torch.tensor(borrowing.levels(), dtype=torch.float64), levels)


def test_the_model_is_left_as_it_was():
    model, batches = make_model("qwen3_moe"), make_batches()
    with torch.no_grad():
        before = model(**batches[0]).logits
        moments_of(model, batches)
        assert torch.equal(model(**batches[0]).logits, before)
    for module in model.modules():
        assert "forward" not in module.__dict__ and not module._forward_pre_hooks


def test_moments_of_some_layers():
    model, batches = make_model("mixtral"), make_batches()
    whole = moments_of(model, batches)
    path = list(whole)[1]
    small = moments_of(model, batches, wanted=path.__eq__)
    assert list(small) == [path] and torch.equal(small[path].inputs, whole[path].inputs)


def test_layers_are_saved_one_after_the_other():
    """Nothing of the second layer is there when the first one is saved, and nothing of the first later."""
    model, batches = make_model("mixtral"), make_batches()
    seen = []
    layers = [path for path, module in model.named_modules() if is_experts(module)]
    second = model.get_submodule(layers[1])
    second.register_forward_hook(lambda *_: seen.append("second"))
    collect(model, batches, lambda path, moments: seen.append(path))
    assert seen[0] == layers[0] and seen[-1] == layers[1] and set(seen[1:-1]) <= {"second"}


def test_weights_that_are_streamed(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, batches = make_model("mixtral"), make_batches()
    whole = moments_of(model, batches)
    names = ("embed_tokens", "norm", "rotary_emb")
    places = {f"model.{name}": "cpu" for name in names} | {"lm_head": "cpu", "model.layers": "disk"}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path))
    for path, moments in moments_of(model, batches).items():
        torch.testing.assert_close(moments.inputs, whole[path].inputs)
        torch.testing.assert_close(moments.inner, whole[path].inner)


def test_a_model_that_computes_nan():
    model = make_model("mixtral")
    path = next(path for path, module in model.named_modules() if is_experts(module))
    model.get_submodule(path).down_proj.data[:] = torch.nan
    with pytest.raises(CheckpointError, match="model's activations at model.layers.0.mlp.experts hold NaN"):
        moments_of(model, make_batches())
