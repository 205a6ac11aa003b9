"""Experts of different sizes (HMoE): one bond dimension per expert."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers.child import run_child
from helpers.models import load, load_pair, logits, stored, token_ids
from helpers.tiny import make_inputs
from transformers import AutoModelForCausalLM

from mpoe_convert import Export, Recipe, convert, experts, export, plan, router_stats
from mpoe_convert.artifact.layout import REPORT_FILE
from mpoe_convert.artifact.reader import open_artifact
from mpoe_convert.decomposition.blocks import fit_blocks
from mpoe_convert.decomposition.mpo import fit
from mpoe_convert.decomposition.sites import Sites
from mpoe_convert.decomposition.sizes import common_sites, widened
from mpoe_convert.errors import RecipeError, SitesError
from mpoe_convert.experts.ffn import FFNShape, MatrixShape, Target
from mpoe_convert.exports.targets import onnx
from mpoe_convert.runtime.modeling_mpoe import (
    Chain,
    Choices,
    FeedForward,
    MatrixCache,
    Routing,
    contract_chain,
    load_balancing_loss,
)
from mpoe_convert.source.json_files import read_json_object

H, INNER = 8, 24
SIZES = {"low-rank": (1, 2, 2, 5), "adapter": (3, 1, 3, 2), "blocks": (8, 2, 4, 2), "one-sided": (4, 2, 8, 4)}
KINDS = list(SIZES)


def recipe(kind: str) -> dict:
    layout = {} if kind in experts.KINDS else {"layout": kind}
    own = "/".join(map(str, SIZES[kind]))
    return {"kind": "mpo" if layout else kind, "experts": 4, "bond_dim": own, **layout}


def feed_forward(kind: str, **selection) -> FeedForward:
    """A mixture of such experts with random numbers in float64."""
    roles = {"gate": (H, INNER), "up": (H, INNER), "down": (INNER, H)}
    shapes = {role: MatrixShape(*size, has_bias=False) for role, size in roles.items()}
    options = Recipe("gpt2", **recipe(kind)).own_options
    form = experts.load(recipe(kind)["kind"]).describe(FFNShape("h.0.mlp", shapes), options)
    ffn = FeedForward(form.parts, 4, **{"top_k": 2} | selection).double()
    ffn.act = torch.nn.SiLU()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in ffn.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return ffn


# ---------------------------------------------------------------------------------------------------
# An independent account of what an expert computes


def pieces(flat: torch.Tensor, shapes: list[tuple[int, int]]) -> list[torch.Tensor]:
    """Matrices that lie one after the other in a vector."""
    ends = list(itertools.accumulate(rows * cols for rows, cols in shapes))
    assert len(flat) == ends[-1]
    starts = [0, *ends[:-1]]
    return [flat[a:b].reshape(shape) for a, b, shape in zip(starts, ends, shapes, strict=True)]


def block_matrix(blocks: torch.Tensor, side: int, size: int, *, strided: bool) -> torch.Tensor:
    """(side, side) of (P size, size): block p on every P-th feature, or on neighbouring ones."""
    made = blocks.new_zeros(side, side)
    for p, block in enumerate(blocks.reshape(side // size, size, size)):
        own = torch.arange(p, side, side // size) if strided else torch.arange(p * size, (p + 1) * size)
        made = made.index_put((own[:, None], own[None, :]), block)
    return made


def matrix_of(kind: str, projection, role: str, expert: int, sizes: tuple[int, ...]) -> torch.Tensor:
    rows, cols = (INNER, H) if role == "down" else (H, INNER)
    size, term = sizes[expert], projection.terms[-1]
    if kind == "adapter":
        return projection.terms[0].central_0
    if kind == "low-rank":
        first = pieces(term.aux_0, [(rows, rank) for rank in sizes])[expert]
        second = pieces(term.aux_1, [(rank, cols) for rank in sizes])[expert]
        return projection.terms[0].central_0 + first @ second
    if kind == "blocks" and role == "down":
        own = pieces(term.aux_1, [(H, each) for each in sizes])[expert]
        return term.central_0 @ block_matrix(own, H, size, strided=False) * term.aux_2[expert].T
    if kind == "blocks":
        own = pieces(term.aux_1, [(H, each) for each in sizes])[expert]
        return term.aux_0[expert] * (block_matrix(own, H, size, strided=True) @ term.central_2)
    first = pieces(term.aux_0, [(each, each) for each in sizes])[expert]
    last = pieces(term.aux_2, [(each, each) for each in sizes])[expert]
    ones = {side: torch.eye(side // size, dtype=first.dtype) for side in (rows, cols)}
    return torch.kron(first, ones[rows]) @ term.central_1 @ torch.kron(ones[cols], last)


def reference(kind: str, ffn: FeedForward, tokens: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """What the mixture computes of its router's choices, one after the other."""
    choices = ffn.router(tokens).choices
    rows = [torch.zeros_like(token) for token in tokens]
    for n, expert, weight in zip(
        choices.tokens.tolist(), choices.experts.tolist(), choices.weights, strict=True
    ):
        names = ("gate", "up", "down")
        gate, up, down = (matrix_of(kind, getattr(ffn, name), name, expert, sizes) for name in names)
        y = (F.silu(tokens[n] @ gate) * (tokens[n] @ up)) @ down
        if kind == "adapter":
            first = pieces(ffn.adapter.aux_0, [(H, width) for width in sizes])[expert]
            second = pieces(ffn.adapter.aux_1, [(width, H) for width in sizes])[expert]
            y = y + F.gelu(y @ first) @ second
        rows[n] = rows[n] + weight.double() * y
    return torch.stack(rows)


SELECTIONS = (
    {"top_k": 2},
    {"top_k": 1},
    {"top_k": 4, "rule": "top-p", "threshold": 0.7},
    {"top_k": 4, "rule": "top-any"},
)


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_the_formula(kind, selection):
    ffn = feed_forward(kind, **selection)
    tokens = torch.randn(9, H, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    direction = torch.randn(9, H, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = reference(kind, ffn, tokens, SIZES[kind])
    names, parameters = zip(*ffn.named_parameters(), strict=True)
    wanted = torch.autograd.grad((expected * direction).sum(), parameters)
    for schedule in ("apply", "rebuild", "cached", "auto"):
        ffn.schedule, ffn.cache = schedule, MatrixCache("all") if schedule == "cached" else None
        found = ffn(tokens)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # weights are float32
        grads = torch.autograd.grad((found * direction).sum(), parameters)
        for name, grad, own in zip(names, grads, wanted, strict=True):
            torch.testing.assert_close(grad, own, rtol=1e-5, atol=1e-5, msg=f"{schedule}: {name}")
        with torch.no_grad():
            one = torch.stack([ffn(token[None])[0] for token in tokens])
        torch.testing.assert_close(one, expected, rtol=1e-6, atol=5e-6)  # sums have another order


@pytest.mark.parametrize(
    "kind", ["blocks", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k != "blocks")]
)
def test_compiled_code_computes_the_same(kind):
    ffn = feed_forward(kind).eval()
    tokens = torch.randn(5, H, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    compiled = torch.compile(ffn, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens), ffn(tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_every_expert(kind):
    """By an account of their own: parameters, and operations of tokens that go to every expert equally."""
    ffn, sizes = feed_forward(kind), SIZES[kind]
    sides = {"gate": (H, INNER), "up": (H, INNER), "down": (INNER, H)}.values()
    own = {
        "low-rank": [sum(size * (rows + cols) for rows, cols in sides) for size in sizes],
        "adapter": [2 * H * size for size in sizes],
        "blocks": [3 * (H * size + H) for size in sizes],
        "one-sided": [3 * 2 * size**2 for size in sizes],
    }[kind]
    products = {
        "low-rank": own,
        "adapter": own,
        "blocks": [3 * H * size for size in sizes],
        "one-sided": [size * sum(rows + cols for rows, cols in sides) for size in sizes],
    }[kind]
    shared = sum(rows * cols for rows, cols in sides)
    assert ffn.own_by_expert == tuple(own) and ffn.own_params == sum(own) / 4
    router = ffn.router.weight.numel()
    assert ffn.stored_params == sum(p.numel() for p in ffn.parameters()) == shared + router + sum(own)
    mean = sum(products) / 4
    per_choice = 2 * (mean + (shared if kind in ("blocks", "one-sided") else 0))
    per_token = 2 * router
    if kind in (
        "low-rank",
        "adapter",
    ):  # a shared matrix works once per token
        per_token += 2 * shared
    assert ffn.flops(10) == 10 * (per_token + 2 * per_choice)


# ---------------------------------------------------------------------------------------------------
# One centre for several sizes


@pytest.mark.parametrize(("rows", "cols"), [(12, 20), (20, 12), (12, 12)])
@pytest.mark.parametrize("gauge", ["canonical", "identity"])
@pytest.mark.parametrize("layout", ["blocks", "one-sided"])
def test_larger_outer_cores_leave_the_chain_as_it_is(layout, gauge, rows, cols):
    matrix = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = {"kind": "mpo", "layout": layout, "gauge": gauge, "bond_dim": "2/4/2", "experts": 3}
    kind = experts.load("mpo")
    recipes = [Recipe("gpt2", **options | {"bond_dim": size}).own_options for size in (2, 4)]
    each = [kind.terms(rows, cols, own, False)[1] for own in recipes]
    small = common_sites(each)
    assert small == each[0]
    decompose = fit_blocks if layout == "blocks" else lambda *a, **k: fit(*a, **k).cores
    cores = decompose(matrix, small, gauge=gauge)
    for sites in each:
        wide = [core if k == sites.centre else widened(core, k, small, sites) for k, core in enumerate(cores)]
        shapes = zip(sites.copies, sites.core_shapes, strict=True)
        for core, (copies, (left, *others)) in zip(wide, shapes, strict=True):
            assert core.numel() == copies * left * torch.Size(others).numel()
        wide[sites.centre] = wide[sites.centre].reshape(sites.core_shapes[sites.centre])
        torch.testing.assert_close(contract_chain(wide, sites.copies), matrix)


def test_what_several_sizes_have_in_common():
    first = Sites((1, 4, 3), (1, 1, 24), (1, 4), (True, True, False))
    second = Sites((1, 6, 2), (1, 1, 24), (1, 6), (True, True, False))
    common = common_sites([first, second])
    assert (common.in_dims, common.bonds, common.untied) == ((1, 2, 6), (1, 2), first.untied)


# ---------------------------------------------------------------------------------------------------
# Whole models


@pytest.mark.parametrize("model_type", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_the_dense_model(kind, model_type, artifact):
    dense, out = artifact(model_type, **recipe(kind), noise=0.0)
    model, stock = load(out, model_type), load(dense, model_type)
    torch.testing.assert_close(logits(model, model_type), logits(stock, model_type), rtol=0, atol=1e-5)
    report = read_json_object(out / REPORT_FILE)
    assert report["exact"] and report["max_relative_error"] < 1e-6
    assert report["totals"]["ffn"]["stored_params"] == sum(ffn.stored_params for _, ffn in model.mixtures())
    of_mixtures = [t for name, t in stored(out).items() if any(path in name for path, _ in model.mixtures())]
    assert sum(t.numel() for t in of_mixtures) == report["totals"]["ffn"]["stored_params"]


def test_noise_separates_the_experts_within_its_share(artifact):
    _, out = artifact("llama", **recipe("blocks"), noise=0.1)
    source = open_artifact(str(out))
    matrices = [source.matrix(source.mixtures[0], "up", {expert: 1.0}) for expert in range(4)]
    for other in matrices[1:]:
        assert 0.01 < (other - matrices[0]).norm() / matrices[0].norm() < 0.5


@pytest.mark.parametrize(
    ("layout", "sizes"),
    [
        ("one-sided", "2/4/4/2"),
        ("one-sided", "8/2/4/2"),
        ("one-sided", "4/8/2/2"),
        ("one-sided", "3/8/2/4"),
        ("blocks", "2/8/4/4"),
    ],
)
def test_the_report_measures_experts_of_sizes_in_any_order(layout, sizes, artifact):
    dense, out = artifact("llama", kind="mpo", layout=layout, experts=4, bond_dim=sizes, noise=0.1)
    source, weights = open_artifact(str(out)), stored(dense)
    matrices = {matrix["name"]: matrix for matrix in read_json_object(out / REPORT_FILE)["matrices"]}
    for mixture in source.mixtures:
        for role in ("gate", "up", "down"):
            first, second = (source.matrix(mixture, role, {expert: 1.0}) for expert in (0, 1))
            target = weights[f"{mixture.key}.{role}_proj.weight"].T
            assert (first - target).norm() <= 1e-6 * target.norm()
            found = matrices[f"{mixture.key}.{role}"]
            assert found["relative_error"] < 1e-6
            drift = float((second - first).norm() / first.norm())
            assert found["clone_drift"] == pytest.approx(drift, rel=0.5)  # of a part of the matrix


@pytest.fixture(scope="module")
def trained(artifact, tmp_path_factory):
    """{kind: (dense folder, folder of a saved model whose experts differ)}"""
    found = {}
    for kind in KINDS:
        dense, out = artifact("llama", **recipe(kind), noise=0.0)
        model = load(out, "llama")
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".aux_" in name:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder)
        for file in out.iterdir():
            if file.is_file() and not (folder / file.name).exists():
                (folder / file.name).write_bytes(file.read_bytes())
        found[kind] = dense, folder, logits(model, "llama")
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_loads(kind, trained):
    dense, folder, expected = trained[kind]
    _, model = load_pair(dense, folder, "AutoModelForCausalLM")
    torch.testing.assert_close(logits(model, "llama"), expected)


@pytest.mark.slow
def test_it_loads_without_this_package(trained, tmp_path):
    cases = {}
    for kind, (_, folder, _) in trained.items():
        inputs = make_inputs(load(folder, "llama"), "AutoModelForCausalLM")
        cases[kind] = {
            "auto_class": "AutoModelForCausalLM",
            "folder": str(folder),
            "inputs": inputs,
            "text": None,
        }
    for kind, found in run_child(cases, tmp_path).items():
        torch.testing.assert_close(found["logits"], trained[kind][2])


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_a_cache_is_that_without(kind, trained):
    model = load(trained[kind][1], "llama")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids = token_ids(2, 5)
    with torch.no_grad():
        found = [model.generate(ids, use_cache=use, **options) for use in (True, False)]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reader_knows_every_expert(kind, trained):
    """An export of one expert has its matrices."""
    folder = trained[kind][1]
    source, model = open_artifact(str(folder)), load(folder, "llama")
    ffn, mixture = model.mixtures()[0][1], source.mixtures[0]
    for expert in range(4):
        with torch.no_grad():
            chains = [
                chain.matrix([getattr(chain, n) for n in chain.core_names], expert) for chain in ffn.up.terms
            ]
        torch.testing.assert_close(source.matrix(mixture, "up", {expert: 1.0}), sum(chains[1:], chains[0]))
    if kind == "adapter":
        assert not source.adapters_add_nothing(mixture, {1: 1.0})


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_needs_no_sorting(kind, trained, tmp_path):
    """The ONNX exporter has no function for it."""
    source = open_artifact(str(trained[kind][1]))
    assert onnx.plan(source, Export(to="onnx"), None, tmp_path).library == "onnx"


def test_low_rank_experts_become_adapters_of_their_own_ranks(trained, tmp_path):
    export(trained["low-rank"][1], tmp_path / "out", Export("lora", check=False))
    for expert, rank in enumerate(SIZES["low-rank"]):
        folder = tmp_path / "out" / f"expert-{expert}"
        assert read_json_object(folder / "adapter_config.json")["r"] == rank
        assert {t.shape[0] for n, t in stored(folder).items() if "lora_A" in n} == {rank}


# ---------------------------------------------------------------------------------------------------
# The loss that favours small experts


def some_routing(sizes: tuple[float, ...] | None, logits: torch.Tensor) -> Routing:
    ranked, chosen = logits.topk(2, dim=-1)
    return Routing(logits, Choices.of_table(chosen, ranked.softmax(-1)), sizes=sizes)


def test_the_penalty_is_that_of_the_paper_in_means():
    sizes = (16, 16, 32, 64)
    scores = torch.randn(40, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mask = torch.arange(40) % 5 > 0
    mean = sum(sizes) / 4
    kept = scores[mask]
    active = torch.zeros(len(kept), 4)
    for row, chosen in zip(active, kept.topk(2).indices.tolist(), strict=True):
        for expert in chosen:
            row[expert] = sizes[expert] / mean
    probabilities = kept.exp() / kept.exp().sum(-1, keepdim=True)
    expected = 4 * (active.mean(0) * probabilities.mean(0)).sum()  # N sum_i M_i P_i
    found = load_balancing_loss(some_routing(tuple(size / mean for size in sizes), scores), mask)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, scores)[0] for loss in (found, expected)))
    alike = load_balancing_loss(some_routing((1.0,) * 4, scores), mask)
    torch.testing.assert_close(alike, load_balancing_loss(some_routing(None, scores), mask))


def test_sizes_are_counted_unless_they_are_alike_or_the_config_says_no(artifact):
    _, out = artifact("llama", **recipe("low-rank"), noise=0.0)
    model = load(out, "llama")
    assert model.config.router_size_penalty is True
    assert model.mixtures()[0][1].router.sizes == pytest.approx([0.4, 0.8, 0.8, 2.0])
    plain = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, router_size_penalty=False)
    assert plain.mixtures()[0][1].router.sizes is None


@pytest.mark.parametrize("kind", KINDS)
def test_equal_sizes_are_one_size(kind):
    """The same form, and the same numbers."""
    shape = FFNShape("h.0.mlp", {"up": MatrixShape(H, INNER, has_bias=False)})
    module, target = experts.load(recipe(kind)["kind"]), Target(torch.randn(H, INNER, dtype=torch.float64))
    found = []
    for bond_dim in ("4/4/4/4", 4):
        options = Recipe("gpt2", **recipe(kind) | {"bond_dim": bond_dim, "noise": 0.0}).own_options
        form = module.describe(shape, options)
        cores = module.fit(target, form.sites.get("up"), options, torch.Generator().manual_seed(0)).terms[-1]
        firsts = [core[0] if isinstance(core, list) else core for core in cores]
        found.append((form.parts, firsts))
    assert found[0][0] == found[1][0]
    for core, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(core, other, rtol=0, atol=0)


@pytest.mark.parametrize("shows", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_comes_to_prefer_small_experts(shows, artifact):
    """With the penalty, and not without it; in either way in which the loss reaches a training loop."""
    _, out = artifact("gpt2", kind="low-rank", experts=4, bond_dim="1/6/6/1", noise=0.0)
    shares = {}
    for penalty in (True, False):
        options = {"router_size_penalty": penalty, "router_aux_loss_coef": 1.0, "output_router_logits": shows}
        model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, **options).train()
        routers = [p for n, p in model.named_parameters() if n.endswith("router.weight")]
        for block in model.transformer.h:  # what all tokens have in common, as in a trained model
            torch.nn.init.ones_(block.ln_2.bias)
        optimizer = torch.optim.Adam(routers, lr=0.02)
        for step in range(30):
            ids = token_ids(4, 16, seed=step)
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad(), router_stats(model.eval()) as stats:
            model(token_ids(8, 16, seed=99))
        load_ = torch.stack([each.load for each in stats.values()]).mean(0)
        shares[penalty] = float(load_[0] + load_[3])
    assert shares[True] > 0.8 and 0.3 < shares[False] < 0.7, shares


# ---------------------------------------------------------------------------------------------------
# What has no meaning


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"kind": "dense"},
            "bond_dim='2/4/8', a size for every expert, given with kind='dense', whose experts are whole",
        ),
        (
            {"kind": "split"},
            "with kind='split', whose experts have equal parts of the neurons; expected kind=",
        ),
        ({"layout": "two-sided"}, "with layout='two-sided', by which the centre depends on the bonds"),
        ({"layout": "balanced"}, "expected layout='blocks' or 'one-sided'"),
        ({"layout": "one-sided", "sites": 5}, "with sites=5; expected sites=3"),
        (
            {"keep": 0.9},
            "with keep or max_error, which factor the centre .* expected kind='adapter' or 'low-rank'",
        ),
        ({"shared_experts": 1}, "shared_experts given with bond_dim='2/4/8', sizes of the routed experts"),
        ({"experts": 4}, "bond_dim='2/4/8' has 3 sizes for 4 experts; expected one for each, or one number"),
        ({"bond_dim": "2//8"}, "bond_dim is '2//8'; expected a whole number .* such as 4/4/8/8"),
        ({"bond_dim": "0/4/8"}, "bond_dim is '0/4/8'; expected"),
        ({"bond_dim": "2/4/99999999999"}, "bond_dim is '2/4/99999999999'; expected"),
        ({"bond_dim": "2,4/8"}, "bond_dim is '2,4/8'; expected"),
        ({"kind": "low-rank", "bond_dim": "2/"}, "bond_dim is '2/'; expected a whole number .* 4/4/8/8"),
    ],
)
def test_what_has_no_meaning_is_refused(given, said):
    with pytest.raises(RecipeError, match=said):
        Recipe("gpt2", **{"experts": 3, "bond_dim": "2/4/8"} | given)


def test_sizes_that_the_model_does_not_have(tiny_gpt2, tmp_path):
    with pytest.raises(SitesError, match=r"the rank \(bond_dim\) is 17; expected at most 16"):
        convert(Recipe(str(tiny_gpt2), kind="low-rank", experts=3, bond_dim="2/17/3"), tmp_path / "out")
    said = r"bond_dim='5/6/7' gives all experts the bonds \(1, 4\), since .*; expected numbers with different"
    with pytest.raises(SitesError, match=said):
        convert(Recipe(str(tiny_gpt2), experts=3, bond_dim="5/6/7"), tmp_path / "out")
    with pytest.raises(RecipeError, match="bond_dim='2/4' has 2 sizes for 8 experts"):
        convert(Recipe(str(tiny_gpt2), kind="low-rank", bond_dim="2/4"), tmp_path / "out")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [3, 5])
def test_a_config_with_sizes_of_other_experts_is_refused(kind, number):
    shapes = {"up": MatrixShape(H, INNER, has_bias=False), "down": MatrixShape(INNER, H, has_bias=False)}
    own = Recipe("gpt2", **recipe(kind)).own_options
    form = experts.load(recipe(kind)["kind"]).describe(FFNShape("h.0.mlp", shapes), own).parts
    said = f"of 4 experts, and there are {number}; expected one value for each: take config.json as it came"
    with pytest.raises(ValueError, match=said):
        FeedForward(form, number, 2)


@pytest.mark.parametrize("size", [2, 16])
def test_a_random_expert_has_the_scale_of_its_own_size(size):
    kind, options = experts.load("mpo"), {"kind": "mpo", "layout": "one-sided", "experts": 2}
    term = kind.terms(16, 16, Recipe("gpt2", bond_dim="2/16", **options).own_options, False)[0][0]
    chain, expert = Chain(term, 2), (2, 16).index(size)
    torch.manual_seed(0)
    squares = []
    for _ in range(30):
        chain.reset_parameters(0.02)
        with torch.no_grad():
            matrix = chain.matrix([getattr(chain, name) for name in chain.core_names], expert)
        squares.append(float(matrix.square().mean()))
    assert (sum(squares) / 30) ** 0.5 == pytest.approx(0.02, rel=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_per_token_are_a_bound_or_a_mean_and_say_so(kind, artifact):
    dense, _ = artifact("llama", **recipe(kind), noise=0.0)
    means = plan(Recipe(str(dense), **recipe(kind))).ffn_totals
    bound = plan(Recipe(str(dense), **recipe(kind), select="top-p", top_k=2)).ffn_totals
    ffns = [ffn for _, ffn in load(artifact("llama", **recipe(kind), noise=0.0)[1], "llama").mixtures()]
    most = sum(ffn.shared_params + sum(sorted(ffn.own_by_expert)[-2:]) for ffn in ffns)
    assert bound.active_params == most > means.active_params
    largest = recipe(kind) | {"bond_dim": max(SIZES[kind])}
    alike = plan(Recipe(str(dense), **largest)).ffn_totals
    assert means.flops_per_token < bound.flops_per_token
    is_one = sorted(SIZES[kind])[-2] == max(SIZES[kind])
    assert (bound.flops_per_token == alike.flops_per_token) == is_one
    assert bound.flops_per_token <= alike.flops_per_token
    rows = [[row[""] for row in totals.rows("FFNs")] for totals in (means, bound, alike)]
    assert [row[1].removeprefix("FFNs: parameters used per token") for row in rows] == [
        ", in the mean",
        ", at most",
        "",
    ]
