"""Adapter experts: the dense FFN once, and a bottleneck per expert behind it."""

import pytest
import torch
import transformers
from click.testing import CliRunner
from helpers.models import load, logits
from helpers.tiny import make_inputs
from torch.nn import functional as F

from mpoe_convert import Recipe, convert
from mpoe_convert.artifact.layout import CARD_FILE, REPORT_FILE
from mpoe_convert.cli import main
from mpoe_convert.errors import RecipeError
from mpoe_convert.source.json_files import read_json_object
from mpoe_convert.training.roles import role_of

SIZE, EXPERTS = 3, 3


@pytest.fixture
def converted(artifact):
    return lambda model_type: artifact(model_type, kind="adapter", bond_dim=SIZE, noise=0.5, experts=EXPERTS)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "phi3", "opt", "bloom", "t5", "bert"])
def test_it_starts_as_the_dense_model_whatever_the_noise(model_type, converted):
    dense, out = converted(model_type)
    model, stock = load(out, model_type), load(dense, model_type)
    torch.testing.assert_close(logits(model, model_type), logits(stock, model_type), rtol=0, atol=1e-5)
    report = read_json_object(out / REPORT_FILE)
    assert report["exact"] and report["max_clone_drift"] == 0 == report["max_relative_error"]
    _, mixture = model.mixtures()[0]
    numbers = 2 * SIZE * EXPERTS * mixture.adapter.hidden_size
    totals = report["totals"]["ffn"]
    routers = sum(ffn.router.weight.numel() for _, ffn in model.mixtures())
    adapters = numbers * len(model.mixtures())
    assert totals["stored_params"] == totals["dense_params"] + adapters + routers
    assert totals["active_params"] == totals["dense_params"] + adapters * 2 // EXPERTS + routers
    assert sum(p.numel() for _, ffn in model.mixtures() for p in ffn.parameters()) == totals["stored_params"]


@pytest.mark.parametrize("num_tokens", [1, 7, 4000])
def test_its_output_is_that_of_the_paper(num_tokens, converted):
    """y = sum over the chosen of R_i A_i(E(x)), A(u) = u + gelu(u W_down) W_up (PESC, equations 4-6)."""
    dense, out = converted("gpt2")
    _, mixture = load(out, "gpt2").mixtures()[0]
    stock = load(dense, "gpt2").transformer.h[0].mlp
    adapter = mixture.adapter
    torch.nn.init.normal_(adapter.aux_1, std=0.3, generator=torch.Generator().manual_seed(0))
    tokens = torch.randn(num_tokens, adapter.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        choices = mixture.router(tokens).choices
        shared = stock(tokens)
        expected = torch.zeros_like(shared)
        for e in range(EXPERTS):
            own = shared + F.gelu(shared @ adapter.aux_0[e]) @ adapter.aux_1[e]
            mine = choices.take((choices.experts == e).nonzero().squeeze(1))
            expected[mine.tokens] += mine.weights.unsqueeze(-1) * own[mine.tokens]
        torch.testing.assert_close(mixture(tokens), expected, rtol=1e-5, atol=1e-5)


def test_training_separates_the_experts(converted):
    _, out = converted("llama")
    model = load(out, "llama").train()
    adapter = model.model.layers[0].mlp.adapter
    ids = torch.arange(3, 33).reshape(3, 10)
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    changed = [adapter.aux_1[e].norm() for e in range(EXPERTS)]
    assert (
        all(norm > 0 for norm in changed) and (adapter.aux_1[0] - adapter.aux_1[1]).norm() > 0.1 * changed[0]
    )
    roles = {name: role_of(name) for name, _ in model.named_parameters() if ".mlp." in name}
    assert roles["model.layers.0.mlp.adapter.aux_0"] == "auxiliary"
    assert roles["model.layers.0.mlp.up.terms.0.central_0"] == "central"


def test_it_is_inspected_and_described(converted):
    _, out = converted("gpt2")
    done = CliRunner().invoke(main, ["inspect", str(out)])
    assert done.exit_code == 0 and "width 3" in done.output
    assert "adapter experts, noise" in done.output  # which have no layout
    card = (out / CARD_FILE).read_text()
    assert "Every expert starts as the dense FFN" in card and "perturbed" not in card


def test_float16_of_a_model_that_overflows_in_it(converted, tmp_path):
    """T5's output projection is kept in float32; what the adapter makes of its output is as large."""
    dense, out = converted("t5")
    models = [
        transformers.AutoModelForSeq2SeqLM.from_pretrained(
            folder, dtype=torch.float16, trust_remote_code=True
        )
        for folder in (dense, out)
    ]
    assert models[1].encoder.block[0].layer[1].DenseReluDense.adapter.aux_0.dtype == torch.float32
    inputs = make_inputs(models[0], "AutoModelForSeq2SeqLM")
    with torch.no_grad():
        for model in models:
            for name, parameter in model.named_parameters():
                if name.endswith(("wo.weight", "down.terms.0.central_0")):
                    parameter *= 1e6
        stock, found = (model(**inputs).logits for model in models)
    torch.testing.assert_close(found.isfinite(), stock.isfinite())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"bond_dim": (2, 2)}, "the width of kind adapter"), ({"bias": "per-expert"}, "shares the whole")],
)
def test_options_that_do_not_fit(wrong, message, tiny_gpt2, tmp_path):
    with pytest.raises(RecipeError, match=message):
        convert(Recipe(str(tiny_gpt2), kind="adapter", **wrong), tmp_path / "out")
