"""Core-space experts: the dense matrix and thin outer cores once, and a small square core per expert."""

import shutil

import pytest
import torch
from helpers.artifacts import perturb
from helpers.models import load, logits
from helpers.selection import quick

from mpoe_convert import Recipe, convert
from mpoe_convert.artifact.layout import REPORT_FILE
from mpoe_convert.errors import RecipeError, SitesError
from mpoe_convert.source.json_files import read_json_object

SIDE, EXPERTS = 3, 4
CORE_SPACE = {"kind": "core-space", "bond_dim": SIDE, "experts": EXPERTS}
SEVEN = ["gpt2", "llama", "phi3", "opt", "bloom", "t5", "bert"]


@pytest.mark.parametrize("model_type", quick(SEVEN, lambda name: name in ("gpt2", "llama", "t5")))
def test_it_starts_as_the_dense_model_whatever_the_noise(model_type, artifact):
    dense, out = artifact(model_type, **CORE_SPACE, noise=0.5)
    model, stock = load(out, model_type), load(dense, model_type)
    torch.testing.assert_close(logits(model, model_type), logits(stock, model_type), rtol=0, atol=1e-5)
    report = read_json_object(out / REPORT_FILE)
    assert report["exact"] and report["max_clone_drift"] == 0 and report["max_relative_error"] < 1e-7
    for matrix in report["matrices"]:
        rows, cols = matrix["shape"]
        extra = SIDE * (rows + cols) + EXPERTS * SIDE**2
        assert matrix["stored_params"] == matrix["dense_params"] + extra and matrix["bonds"] == [SIDE, SIDE]


@pytest.fixture
def ffn(artifact, tmp_path):
    """The first FFN of a Llama, with random cores in place of the zeros."""
    _, out = artifact("llama", **CORE_SPACE)
    out = shutil.copytree(out, tmp_path / "out")
    perturb(out)
    return load(out, "llama").model.layers[0].mlp


def by_formula(ffn, x: torch.Tensor) -> torch.Tensor:
    """x (tokens, hidden) -> the mixture's output: every matrix is W + P C_e Q, and experts are whole FFNs."""

    def matrix(part, expert: int) -> torch.Tensor:
        whole, thin = part.terms
        return whole.central_0 + thin.central_0 @ thin.aux_1[expert] @ thin.central_2

    logits, chosen = (x @ ffn.router.weight.T).topk(ffn.top_k)
    output = torch.zeros_like(x)
    for token, (weights, experts) in enumerate(zip(logits.softmax(-1), chosen.tolist(), strict=True)):
        for weight, expert in zip(weights, experts, strict=True):
            gate, up = (x[token] @ matrix(part, expert) for part in (ffn.gate, ffn.up))
            inner = torch.nn.functional.silu(gate) * up
            output[token] = output[token] + weight * (inner @ matrix(ffn.down, expert))
    return output


@pytest.mark.parametrize("schedule", ["apply", "rebuild"])
def test_outputs_and_gradients_are_those_of_the_formula(ffn, schedule):
    ffn.schedule = schedule
    x = torch.randn(7, ffn.up.terms[0].in_features, generator=torch.Generator().manual_seed(0))
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    gradients = []
    for output in (ffn(x), by_formula(ffn, x)):
        ffn.zero_grad()
        (output * target).sum().backward()
        gradients.append([output.detach(), *(own.grad.clone() for own in ffn.parameters())])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_token_passes_the_shared_outer_cores_once(ffn):
    """FLOPs by hand: what is shared per token, what is owned per choice, the router per token."""
    sides = [(part.terms[0].in_features, part.terms[0].out_features) for part in (ffn.gate, ffn.up, ffn.down)]
    (hidden, inner), *_ = sides
    router = EXPERTS * hidden
    shared = 2 * hidden * inner + 2 * SIDE * hidden + SIDE * hidden  # W and P of gate and up, Q of down
    own = 2 * (SIDE**2 + SIDE * inner) + inner * (hidden + SIDE) + SIDE**2
    spared = (ffn.top_k - 1) * inner * hidden  # W of down works on the sum of a token's experts
    expected = 2 * (router + shared + ffn.top_k * own - spared)
    assert ffn.flops(10) == 10 * expected


def test_tokens_of_their_own_make_experts_differ(artifact):
    _, out = artifact("llama", **CORE_SPACE)
    model = load(out, "llama")
    thin = model.model.layers[0].mlp.up.terms[1]
    assert not thin.aux_1.any()
    assert float(thin.central_0.detach().std()) == pytest.approx(thin.central_0.shape[0] ** -0.5, rel=0.3)
    assert float(thin.central_2.detach().std()) == pytest.approx(SIDE**-0.5, rel=0.3)
    ids = torch.arange(3, 33).reshape(3, 10)
    model.train()(ids, labels=ids).loss.backward()
    used = [own for own in thin.aux_1.grad if own.any()]
    assert len(used) > 1 and (used[0] - used[1]).norm() > 0.1 * used[0].norm()


def test_sizes_that_are_none(tiny_gpt2, tmp_path):
    with pytest.raises(
        SitesError, match=r"the side of the square cores \(bond_dim\) is 17; expected at most 16"
    ):
        convert(Recipe(str(tiny_gpt2), kind="core-space", bond_dim=17), tmp_path / "out")
    with pytest.raises(
        RecipeError, match="expected a whole number of at least 1, the side of the square cores"
    ):
        Recipe(str(tiny_gpt2), kind="core-space", bond_dim=(2, 2))
    with pytest.raises(
        RecipeError, match="kind='core-space', whose experts share outer cores, which fit one"
    ):
        Recipe(str(tiny_gpt2), kind="core-space", bond_dim="2/4", experts=2)
    with pytest.raises(RecipeError, match="shared_experts given with kind='core-space'"):
        Recipe(str(tiny_gpt2), kind="core-space", shared_experts=1)
