"""Kind split and shared experts: against the definition of the papers, by the dense model's neurons.

MoEfication (arXiv 2110.01786), section 3: of parts S_e of the hidden neurons, a token's chosen ones C give
F_C(x) = sum over e in C of act(x W1[:, S_e] + b1[S_e]) W2[S_e] + b2. DeepSeekMoE (arXiv 2401.06066),
equation 9: shared experts are added for every token.
"""

import pytest
import torch
import transformers
from helpers.calibration import batches_for
from helpers.models import assert_same_outputs, generative, load, load_pair
from helpers.tiny import INNER, LAYERS, make_inputs, save_tiny
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mpoe_convert import Export, Recipe, convert, export, plan, router_stats, verify
from mpoe_convert.decomposition.partition import clusters, fitted_rows, lost
from mpoe_convert.errors import ExportError, RecipeError, RequestError, SitesError
from mpoe_convert.experts.ffn import Activations, FFNShape, MatrixShape, Target
from mpoe_convert.experts.kinds import split
from mpoe_convert.experts.kinds.split import closest, divisors
from mpoe_convert.runtime.modeling_mpoe import FeedForward

# Recipes whose chosen parts cover every neuron once, whatever the router decides.
EXACT = {
    "all parts": {"experts": 4, "top_k": 4},
    "one shared": {"experts": 3, "top_k": 3, "shared_experts": 1},
    "a copy of all parts": {"experts": 8, "parts": 4, "top_k": 4},
    "two copies": {"experts": 8, "parts": 2, "top_k": 4},
    "two copies, one shared": {"experts": 9, "parts": 3, "top_k": 6, "shared_experts": 1},
}
PARTIAL = {"experts": 4, "top_k": 2}


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt", "t5", "bert", "phi3", "falcon", "modernbert"])
def test_all_parts_compute_the_dense_model(model_type, artifact):
    auto = generative(model_type)
    folder, out = artifact(model_type, kind="split", **EXACT["one shared"])
    dense, model = load_pair(folder, out, auto)
    assert_same_outputs(dense, model, make_inputs(dense, auto))


@pytest.mark.parametrize("name", EXACT)
def test_the_first_choices_cover_every_neuron_once(name, artifact):
    folder, out = artifact("gpt2", kind="split", **EXACT[name])
    dense, model = load_pair(folder, out, generative("gpt2"))
    inputs = make_inputs(dense, generative("gpt2"))
    assert_same_outputs(dense, model, inputs)
    with torch.no_grad():  # the oracle would see a part that is missing
        model.mixtures()[0][1].down.terms[0].aux_0[-1].zero_()
    with pytest.raises(AssertionError):
        assert_same_outputs(dense, model, inputs)


def neurons_of(columns: torch.Tensor, of_experts: torch.Tensor) -> list[list[int]]:
    """Per expert the dense neurons (inner, H) that equal its own: (E, H, n)."""
    return [
        [next(i for i, other in enumerate(columns) if torch.equal(own, other)) for own in expert.T]
        for expert in of_experts
    ]


def definition(dense, up, down, logits, parts, shared, top_k):
    """The papers' sum, token by token; the weight of a chosen part is one, with the gradient of log p.

    `logits` have no gradient to the tokens, on which a weight of one does not depend.
    """
    w1, b1 = up
    w2, b2 = down
    rows = []
    for token, row in zip(dense, logits, strict=True):
        total = b2
        for number, part in enumerate([*parts, *shared]):
            weight = 1.0
            if number < len(parts):
                if row[number] < row.sort(descending=True).values[top_k - 1]:
                    continue
                log_p = row[number] - row.exp().sum().log()
                weight = 1 + log_p - log_p.detach()
            total = total + weight * nn.functional.gelu(token @ w1[:, part] + b1[part]) @ w2[part]
        rows.append(total)
    return torch.stack(rows)


def test_a_partial_choice_is_the_papers_sum(artifact):
    """Forward and gradients, with biases."""
    folder, out = artifact("gpt2", kind="split", experts=3, shared_experts=1, top_k=2)
    dense, model = load_pair(folder, out, generative("gpt2"))
    mlp, [_, ffn] = dense.transformer.h[1].mlp.double(), model.mixtures()[1]
    ffn.double().act = nn.GELU()
    x = torch.randn(7, ffn.router.weight.shape[1], dtype=torch.float64, requires_grad=True)
    neurons = neurons_of(mlp.c_fc.weight.T, ffn.up.terms[0].aux_0)
    assert sorted(sum(neurons, [])) == list(range(INNER))
    up, down = (mlp.c_fc.weight, mlp.c_fc.bias), (mlp.c_proj.weight, mlp.c_proj.bias)
    router = ffn.router.weight.detach().double().requires_grad_()
    expected = definition(x, up, down, x.detach() @ router.T, neurons[:3], neurons[3:], 2)
    found = ffn(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    direction = torch.randn_like(found)
    wanted = torch.autograd.grad((expected * direction).sum(), [x, router, *up, *down])
    got = torch.autograd.grad(
        (found * direction).sum(),
        [x, ffn.router.weight, ffn.up.terms[0].aux_0, ffn.up.bias, ffn.down.terms[0].aux_0, ffn.down.bias],
    )
    places = torch.tensor(neurons)
    for one, other in zip(got[:2] + got[5:], wanted[:2] + wanted[5:], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-5)
    torch.testing.assert_close(got[2], wanted[2].T[places].mT, rtol=0, atol=1e-5)
    torch.testing.assert_close(got[3], wanted[3][places], rtol=0, atol=1e-5)
    torch.testing.assert_close(got[4], wanted[4][places], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["dense", "mpo"])
def test_whole_shared_experts_are_averaged_with_the_others(kind, artifact):
    folder, out = artifact("llama", kind=kind, shared_experts=2)
    dense, model = load_pair(folder, out, generative("llama"))
    inputs = make_inputs(dense, generative("llama"))
    assert_same_outputs(dense, model, inputs)
    ffn = model.mixtures()[0][1]
    with torch.no_grad():
        for parameter in ffn.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(5, ffn.router.weight.shape[1])
    each, weights = ffn.run_all_experts(x), (x @ ffn.router.weight.T)
    expected = []
    for token, row in enumerate(weights):
        values, chosen = row.topk(2)
        routed = sum(w * each[e, token] for w, e in zip(values.softmax(0), chosen, strict=True))
        expected.append((routed + each[3, token] + each[4, token]) / 3)
    torch.testing.assert_close(ffn(x), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_a_router_of_parts_learns_which_contribute():
    """Trained alone on the dense outputs, it loses less; without the weights' gradient it stays as it is."""
    generator = torch.Generator().manual_seed(0)
    hidden, size, number = 8, 4, 8
    form = {
        "up": {"terms": [term(hidden, size)], "bias": None},
        "down": {"terms": [term(size, hidden)], "bias": None},
    }
    ffn = FeedForward(form, number, 2, parts=number)
    ffn.act = nn.ReLU()
    with torch.no_grad():
        for parameter in ffn.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        ffn.router.weight.mul_(0.1)
    x = torch.randn(512, hidden, generator=generator)
    with torch.no_grad():
        wanted = ffn.run_all_experts(x).sum(0)
    optimizer = torch.optim.Adam([ffn.router.weight], lr=0.02)
    errors = []
    for _ in range(60):
        error = (ffn(x) - wanted).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.8 * errors[0]
    ffn.router.combine, before = "raw", ffn.router.weight.clone()
    ffn.router.weight.grad = None
    ffn.router.select = without_gradient(ffn.router.select)
    (ffn(x) - wanted).square().mean().backward()
    assert ffn.router.weight.grad is None and torch.equal(before, ffn.router.weight)


def term(rows: int, cols: int) -> dict:
    return {"in_dims": [rows], "out_dims": [cols], "bonds": [], "shared": [False]}


def without_gradient(rule):
    def select(*arguments):
        choices = rule(*arguments)
        return choices._replace(weights=choices.weights.detach())

    return select


# ---------------------------------------------------------------------------------------------------
# Which neurons


def test_clusters_are_found_and_equally_large():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(6, 10, generator=generator)
    labels = torch.arange(6).repeat(8)[torch.randperm(48, generator=generator)]
    found = clusters(centres[labels] + 0.05 * torch.randn(48, 10, generator=generator), 6)
    assert found.shape == (6, 8) and sorted(found.flatten().tolist()) == list(range(48))
    assert all(len(set(labels[part].tolist())) == 1 for part in found)


def test_a_part_that_too_many_neurons_want_takes_the_nearest():
    features = torch.tensor([[0.0], [0.1], [0.2], [0.3], [10.0], [0.35]])
    found = clusters(features, 2)
    assert {frozenset(part.tolist()) for part in found} in (
        {frozenset({0, 1, 2}), frozenset({3, 4, 5})},
        {frozenset({0, 1, 3}), frozenset({2, 4, 5})},
    )


def test_a_router_is_fitted_by_least_squares():
    generator = torch.Generator().manual_seed(0)
    inputs, rows = torch.randn(400, 5, generator=generator), torch.randn(3, 5, generator=generator)
    found = fitted_rows(inputs, inputs @ rows.T)
    torch.testing.assert_close(found, rows, rtol=0, atol=0.05)


def test_what_is_lost_is_the_other_parts():
    generator = torch.Generator().manual_seed(0)
    inner, down = torch.randn(9, 6, generator=generator), torch.randn(6, 4, generator=generator)
    parts, logits = torch.tensor([[5, 0], [1, 3], [2, 4]]), torch.randn(9, 3, generator=generator)
    expected = 0.0
    for token in range(9):
        worst = logits[token].argmin()
        expected += (inner[token, parts[worst]] @ down[parts[worst]]).square().sum().item()
    left_out = (logits == logits.min(1, keepdim=True).values).float()
    assert lost(left_out, inner, down, parts) == pytest.approx(expected, rel=1e-5)


class Given:
    """An FFN whose matrices are at hand, and its activations on a text."""

    def __init__(self, matrices, activations):
        self.matrices, self.activations = matrices, activations
        shapes = {role: MatrixShape(*matrix.shape, has_bias=False) for role, matrix in matrices.items()}
        self.shape = FFNShape("h.0.mlp", shapes)

    def target(self, role: str, expert: int = 0) -> Target:
        return Target(self.matrices[role])

    def generator(self, part: str) -> torch.Generator:
        return torch.Generator().manual_seed(0)


def neurons_found(up, active) -> list[set]:
    """The two parts that kind split makes of 8 neurons with these weights and activations (tokens, 8)."""
    ffn = Given({"up": up, "down": torch.eye(8)}, None)
    inputs = torch.randn(64, len(up), generator=torch.Generator().manual_seed(1))
    inputs[:, 0] = 6 * active[:, 0] - 3  # says which neurons are active
    ffn.activations = Activations(inputs, active, inputs, active)
    options = Recipe("m", kind="split", experts=2, top_k=1).own_options
    form = split.describe(ffn.shape, options)
    [fitted] = [built for part, built in split.build(ffn, form, options) if part == "up"]
    return [set(part.tolist()) for part in fitted.neurons]


def test_calibration_takes_neurons_that_are_active_together():
    """Weights group 0-3 and 4-7; on the text even neurons are active together, and odd ones."""
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(6, 2, generator=generator).repeat_interleave(4, 1)
    up += 0.01 * torch.randn(6, 8, generator=generator)
    evens = torch.rand(64, 1, generator=generator) > 0.5
    active = torch.where(evens, torch.arange(8) % 2 == 0, torch.arange(8) % 2 == 1).float()
    assert sorted(neurons_found(up, active), key=min) == [{0, 2, 4, 6}, {1, 3, 5, 7}]
    together = torch.where(evens, torch.arange(8) < 4, torch.arange(8) >= 4).float()
    assert sorted(neurons_found(up, together), key=min) == [{0, 1, 2, 3}, {4, 5, 6, 7}]


def test_activations_are_those_of_the_stock_model(tmp_path):
    from mpoe_convert.compression.prepare import prepare
    from mpoe_convert.source.checkpoint import open_checkpoint

    folder = save_tiny("llama", generative("llama"), tmp_path / "dense")
    stock = load(folder, "llama")
    batches = batches_for(stock, generative("llama"), 3)
    checkpoint = open_checkpoint(str(folder))
    prepared = prepare(Recipe(str(folder), kind="split", **PARTIAL), checkpoint, batches)
    found = prepared.activations("layers.1")
    seen: list[torch.Tensor] = []
    stock.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for batch in batches:
        stock(**batch)
    kept = [x[batch["attention_mask"] > 0] for x, batch in zip(seen, batches, strict=True)]
    rows = [*found.inner, *found.held_inner]
    assert len(rows) == sum(map(len, kept))
    torch.testing.assert_close(
        torch.stack(rows).sum(0), torch.cat(kept).bfloat16().float().sum(0), rtol=1e-3, atol=1e-4
    )
    assert prepared.activations("layers.0").inputs.shape[1] == found.inputs.shape[1]


# ---------------------------------------------------------------------------------------------------
# A whole model


def test_it_trains_generates_and_counts(artifact, tmp_path):
    _, out = artifact("gpt2", kind="split", experts=3, shared_experts=1, top_k=2)
    model = load(out, "gpt2")
    ids = torch.arange(2, 14)[None]
    cached, plain = (model.generate(ids, max_new_tokens=5, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)
    with router_stats(model, similarity_tokens=4) as stats:
        model(ids)
    found = stats["h.0.mlp"]
    assert found.load.shape == (3,) and found.load.sum() == pytest.approx(1)
    assert found.similarity.shape == (3, 3)
    model.train()(ids, labels=ids).loss.backward()
    for _, ffn in model.mixtures():
        assert ffn.router.weight.grad.any() and ffn.up.terms[0].aux_0.grad[-1].any()
        assert ffn.down.bias.grad.any()
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again", "gpt2")
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)


def test_compiled_it_computes_the_same(artifact):
    _, out = artifact("gpt2", kind="split", experts=6, parts=3, shared_experts=1, top_k=3)
    ffn = load(out, "gpt2").mixtures()[0][1]
    x = torch.randn(9, ffn.router.weight.shape[1])
    with torch.no_grad():
        found = torch.compile(ffn, fullgraph=True, backend="eager")(x)
        torch.testing.assert_close(found, ffn(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recipe", [PARTIAL, EXACT["two copies, one shared"], {"shared_experts": 2}], ids=str)
def test_the_plan_counts_what_torch_counts(recipe, tiny_gpt2, tmp_path):
    given = Recipe(str(tiny_gpt2), kind="dense" if "experts" not in recipe else "split", **recipe)
    planned = plan(given)
    convert(given, tmp_path / "out")
    model = load(tmp_path / "out", "gpt2")
    total = 0
    for _, ffn in model.mixtures():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            ffn(torch.randn(1, ffn.router.weight.shape[1]))
        total += counter.get_total_flops()
    assert planned.ffn_totals.flops_per_token == total
    stored = sum(p.numel() for _, ffn in model.mixtures() for p in ffn.parameters())
    assert planned.ffn_totals.stored_params == stored


def test_exported_the_parts_are_the_dense_model(artifact, tmp_path):
    for name in ("one shared", "two copies"):
        folder, out = artifact("phi3" if name == "two copies" else "gpt2", kind="split", **EXACT[name])
        exported = export(out, tmp_path / name, Export(to="dense"))
        assert exported.comparison.relative_difference < 1e-5
        auto = getattr(transformers, generative("phi3" if name == "two copies" else "gpt2"))
        dense, back = (auto.from_pretrained(each).eval() for each in (folder, tmp_path / name))
        assert_same_outputs(dense, back, make_inputs(dense, auto.__name__))


def test_what_no_export_holds_is_told(artifact, tmp_path):
    _, parts = artifact("llama", kind="split", **PARTIAL)
    _, shared = artifact("llama", kind="dense", shared_experts=1)
    for out, request, words in (
        (parts, Export(to="moe"), "no experts whose outputs add up instead of being averaged"),
        (
            parts,
            Export(to="dense", calibrate="builtin"),
            "parts of an FFN .kind split., which are put together",
        ),
        (parts, Export(to="dense", expert=1), "has 1 whole copies of its FFNs, expected 0 to 0"),
        (shared, Export(to="moe"), "experts that every token passes, averaged with the others .1."),
        (shared, Export(to="dense"), "passes 2 FFNs or more, 1 of them always"),
    ):
        with pytest.raises((ExportError, RequestError), match=words):
            export(out, tmp_path / "no", request)


def test_verify_and_the_card_say_what_it_is(tiny_gpt2, tmp_path):
    report = convert(Recipe(str(tiny_gpt2), kind="split", **PARTIAL), tmp_path / "out")
    assert report.max_error == 0 and not report.to_json()["exact"]
    assert "a token passes 2 of 4 parts of an FFN" in report.warnings[0] and "gelu" in report.warnings[0]
    card = (tmp_path / "out/README.md").read_text()
    assert "All parts together are the dense FFN; those that are chosen approximate it." in card
    found = verify(tmp_path / "out", against=str(tiny_gpt2))
    assert found.ok and found.tolerance is None and found.relative_difference > 1e-3
    assert found.rows()["  allowed"] == "any, for it leaves out parts of the FFNs"
    convert(Recipe(str(tiny_gpt2), kind="split", **EXACT["one shared"]), tmp_path / "exact")
    card = (tmp_path / "exact/README.md").read_text()
    assert "beside 1 expert that every token passes" in card and "Together the parts are" in card
    found = verify(tmp_path / "exact", against=str(tiny_gpt2))
    assert found.ok and found.tolerance is not None and found.relative_difference < 1e-5


def test_relu_needs_no_warning(tmp_path):
    folder = save_tiny("t5", generative("t5"), tmp_path / "t5")
    assert not plan(Recipe(str(folder), kind="split", **PARTIAL)).warnings


def test_sizes_that_do_not_divide_are_told(tiny_gpt2):
    with pytest.raises(
        SitesError, match=rf"has {INNER} hidden neurons, which 7 parts .* experts of \d+ or \d+"
    ):
        plan(Recipe(str(tiny_gpt2), kind="split", experts=7))
    with pytest.raises(SitesError, match="which 7 parts cannot share equally; expected parts of"):
        plan(Recipe(str(tiny_gpt2), kind="split", experts=12, parts=6, shared_experts=1, top_k=6))
    assert divisors(12) == [1, 2, 3, 4, 6, 12] and closest(5, divisors(12)) == "4 or 6"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bias": "shared"}, "an expert of kind split has the biases of its own neurons"),
        ({"parts": 3}, "parts is 3 with 8 experts, which it does not divide; expected 2 or 4"),
        ({"keep": 0.5}, "whose experts are the dense FFN itself"),
        ({"calibrate": "builtin", "top_k": 8}, "all parts are chosen or have copies; leave it out"),
        ({"calibrate": "builtin", "parts": 4}, "all parts are chosen or have copies; leave it out"),
        (
            {"kind": "low-rank", "shared_experts": 1},
            "experts share the dense FFN: every token passes it",
        ),
        ({"kind": "adapter", "shared_experts": 1}, "experts share the dense FFN: every token passes it"),
        ({"kind": "dense", "parts": 2}, "expected with kind='split' only"),
    ],
)
def test_what_has_no_meaning_is_refused(options, words):
    with pytest.raises(RecipeError, match=words):
        Recipe("m", **{"kind": "split"} | options)


def test_layers_of_the_model_stay_where_they_are(artifact):
    _, out = artifact("gpt2", kind="split", layers="1", **PARTIAL)
    assert [path for path, _ in load(out, "gpt2").mixtures()] == ["h.1.mlp"] and LAYERS == 2
