"""Mixtures with fewer experts: every family against its stock model that cannot choose the others."""

import copy
import json
import re
from contextlib import contextmanager

import pytest
import torch
import transformers
from click.testing import CliRunner
from helpers.data import QUICK, words
from helpers.expert_mixtures import EXPERTS, HIDDEN, TYPES, save_mixture, stock_name, token_ids
from helpers.models import stored
from helpers.selection import every
from helpers.tiny import save_tokenizer
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from mpoe_convert import Export, Finetuning, Recipe, convert, evaluate, export, finetune, plan, verify
from mpoe_convert.cli import main
from mpoe_convert.errors import FamilyError, RecipeError
from mpoe_convert.source.mixtures import locate_experts
from mpoe_convert.source.opening import open_source
from mpoe_convert.source.pruned import with_experts

# Types that are converted; the others are cut and compared.
CONVERTED = (
    *("mixtral", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss", "granitemoe"),
    *("ernie4_5_moe", "gemma4_text"),
)
# Types that keep all their experts; why.
REFUSED = {
    "deepseek_v4": "model.layers.0.mlp.gate.tid2eid assigns experts to tokens by number, and which others "
    "would stand in for those that go is not known: this model keeps all its experts"
}
ROUTER = re.compile(r"layers\.(\d+)\.(?:.*\.)?(?:gate|router)(?:\.(?:wg|gate|proj|layer))?\.weight")


def masked(stock, dropped):
    """The stock model, told that its routers never choose some experts: {layer: their numbers}.

    Their logits are very small wherever a router multiplies with its weight, and so is what corrects them.
    """
    model = copy.deepcopy(stock)
    with torch.no_grad():
        for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
            layer = re.search(r"layers\.(\d+)\.", name)
            if layer and tensor.shape[-1:] == (EXPERTS,) and re.search("(correction|expert)_bias", name):
                tensor[..., dropped[int(layer[1])]] = -1e9
    rows = {
        weight.data_ptr(): dropped[int(found[1])]
        for name, weight in model.named_parameters()
        if (found := ROUTER.search(name)) and weight.shape[-1] == HIDDEN and len(weight) >= EXPERTS
    }
    return model, rows


@contextmanager
def routed(rows):
    """Products with these weights give some of their outputs -10,000: {address of a weight: which}."""
    linear = functional.linear

    def masking(inputs, weight, bias=None):
        outputs = linear(inputs, weight, bias)
        if weight.data_ptr() in rows:
            outputs[..., rows[weight.data_ptr()]] = -1e4
        return outputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "linear", masking)
        yield


def logits(model, rows=()):
    with torch.no_grad(), routed(rows):
        return model(input_ids=token_ids()).logits.float()


def difference(found, expected) -> float:
    return float((found - expected).norm() / expected.norm())


def check(model, stock, dropped) -> None:
    """A smaller model computes what its stock model does without the experts that it lacks."""
    without, rows = masked(stock, dropped)
    assert len(rows) == len(dropped)
    expected = logits(without, rows)
    assert difference(logits(model), expected) < 5e-6
    assert difference(logits(stock), expected) > 1e-3  # it matters
    others = {layer: [(each[0] + 1) % EXPERTS] for layer, each in dropped.items()}
    without, rows = masked(stock, others)
    assert difference(logits(without, rows), expected) > 1e-3  # and which


def cut(source, number):
    """(its checkpoint with one expert less per layer, {layer: the expert})"""
    checkpoint = open_source(str(source))
    located = locate_experts(checkpoint)
    dropped = {ffn.index: [(number + ffn.index) % EXPERTS] for ffn in located.ffns}
    kept = {f.path: [e for e in range(EXPERTS) if e not in dropped[f.index]] for f in located.ffns}
    return with_experts(checkpoint, located, kept), dropped


OTHERS = every(4, sorted({*TYPES} - {*CONVERTED} - {*REFUSED}))


@pytest.mark.parametrize("model_type", OTHERS)
def test_routers_without_some_rows_choose_among_the_others(model_type, tmp_path):
    source = save_mixture(model_type, tmp_path / "source")
    stock = getattr(transformers, stock_name(model_type)[1]).from_pretrained(source).eval()
    small, dropped = cut(source, 1)
    model = type(stock)(small.architecture.make_config()).eval()
    state = model.state_dict() | {name: small.read(name) for name in small.tensors}
    model.load_state_dict(state)
    check(model, stock, dropped)


@pytest.mark.parametrize("model_type", REFUSED)
def test_types_that_keep_their_experts_say_why(model_type, tmp_path):
    source = save_mixture(model_type, tmp_path / "source")
    with pytest.raises(FamilyError) as caught:
        plan(Recipe(str(source), experts=EXPERTS - 1))
    assert str(caught.value) == REFUSED[model_type]


def batches(count: int = 4):
    return [{"input_ids": token_ids((2, 16), seed=seed)} for seed in range(count)]


@pytest.mark.parametrize("model_type", CONVERTED)
def test_converted_models_compute_what_the_source_does_without_the_others(model_type, tmp_path):
    source = save_mixture(model_type, tmp_path / "source")
    recipe = Recipe(str(source), experts=EXPERTS - 1)
    report = convert(recipe, tmp_path / "out", calibration=batches())
    told = json.loads((tmp_path / "out/conversion_report.json").read_text())["fewer_experts"]
    assert told["source_experts"] == EXPERTS and [each["path"] for each in told["layers"]] == [
        ffn.ffn.path for ffn in report.plan.ffns
    ]
    for layer in told["layers"]:
        assert sorted(layer["kept"] + layer["dropped"]) == [*range(EXPERTS)]
        assert max(layer["scores"][e] for e in layer["dropped"]) <= min(
            layer["scores"][e] for e in layer["kept"]
        )
        assert sum(layer["shares"]) == pytest.approx(1)
    assert report.max_error == 0 and not report.plan.is_exact
    stock = AutoModelForCausalLM.from_pretrained(source).eval()
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    check(model.eval(), stock, {int(e["path"].split(".")[-1]): e["dropped"] for e in told["layers"]})
    exported = export(tmp_path / "out", tmp_path / "again", Export(to="moe"))
    assert exported.model_type == model_type and exported.comparison.relative_difference < 2e-6
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert type(again) is type(stock) and difference(logits(again), logits(model)) < 2e-6


def test_groups_keep_as_many(tmp_path):
    sizes = {"n_routed_experts": 8, "num_local_experts": 8, "n_group": 2, "topk_group": 1}
    source = save_mixture("deepseek_v3", tmp_path / "source", **sizes)
    for asked in (5, 7, 2):
        with pytest.raises(RecipeError) as caught:
            plan(Recipe(str(source), experts=asked))
        assert str(caught.value) == (
            f"experts is {asked}, and the source's routers choose 1 of 2 groups of experts; expected as many "
            "in each group, and at least 2: a multiple of 2 from 4 to 8"
        )
    report = convert(Recipe(str(source), experts=6), tmp_path / "out", calibration=batches())
    [layer] = report.fewer.layers
    assert [sum(expert // 4 == group for expert in layer.kept) for group in (0, 1)] == [3, 3]
    assert verify(tmp_path / "out").relative_difference < 2e-6


# ------------------------------------------------------------------------------------- what users do


@pytest.fixture(scope="module")
def readable(tmp_path_factory):
    """(source with a tokenizer, text)"""
    root = tmp_path_factory.mktemp("readable")
    source = save_mixture("qwen3_moe", root / "source")
    save_tokenizer(source)
    (root / "text.txt").write_text(words(4000))
    return source, str(root / "text.txt")


@pytest.fixture(scope="module")
def fewer(readable, tmp_path_factory):
    """(report, artifact) of whole experts."""
    source, text = readable
    out = tmp_path_factory.mktemp("fewer") / "out"
    recipe = Recipe(str(source), experts=3, calibrate=(text,), calibration_tokens=1024)
    return convert(recipe, out), out


def test_what_is_told_of_experts_that_go(fewer):
    report, out = fewer
    card = (out / "README.md").read_text()
    assert (
        "are stored whole. Of 4 per layer 3 are left, of which a token takes 2. Routers keep the rows" in card
    )
    assert (
        "## Experts that are left out" in card and "REAP (" in card and "Experts were scored on calib" in card
    )
    assert "nats of divergence from the source" in card
    totals = report.plan.ffn_totals
    assert totals.stored_params * 4 == totals.dense_params * 3
    whole = sum(tensor.numel() for tensor in load_file(out.parents[0] / "out/model.safetensors").values())
    assert report.plan.totals.stored_params == whole
    config = json.loads((out / "config.json").read_text())
    assert AutoConfig.from_pretrained(out, trust_remote_code=True).num_experts == 3
    assert config["num_local_experts"] == config["mpoe"]["num_experts"] == 3
    told = CliRunner().invoke(main, ["inspect", str(out)]).output
    assert "Of 4 experts per layer 3 are left" in told and "all numbers of these experts" in told
    found = json.loads(CliRunner().invoke(main, ["inspect", str(out), "--json"]).output)
    assert found["fewer_experts"]["source_experts"] == 4


def test_sizes_of_the_source_are_those_of_its_file(fewer, readable):
    whole = sum(tensor.numel() for tensor in load_file(readable[0] / "model.safetensors").values())
    assert fewer[0].plan.totals.dense_params == whole


def test_it_is_verified_against_the_source_without_the_others(fewer, tmp_path):
    _, out = fewer
    found = verify(out)
    assert found.ok and found.relative_difference < 2e-6 and found.tolerance < 1e-3
    assert found.inputs.endswith("the source without the experts that were left out")
    weights = load_file(out / "model.safetensors")
    gate = weights["model.layers.1.mlp.gate.weight"]
    gate[:2] = gate[:2].flip(0).clone()  # as if experts 0 and 1 had each other's tokens
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    try:
        assert not verify(out).ok
    finally:
        gate[:2] = gate[:2].flip(0).clone()
        save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_it_is_scored_and_trained(fewer, readable, tmp_path):
    text = readable[1]
    scores = evaluate(str(fewer[1]), data=text, limit=4, against=str(readable[0]))
    assert scores.metrics["perplexity"].value > 1 and scores.differences
    finetune(Finetuning(model=str(fewer[1]), data=text, **QUICK), tmp_path / "tuned")
    assert verify(tmp_path / "tuned").problems() == []


def test_what_is_cut_is_read_whole(readable):
    """As many bytes as without a cut, of every tensor that is read."""
    whole, cut = (plan(Recipe(str(readable[0]), **options)).reads for options in ({}, {"experts": 3}))
    assert whole == cut and sum(whole.values()) > 0


def test_a_plan_from_headers_has_the_sizes(fewer, readable):
    report, _ = fewer
    recipe = Recipe(str(readable[0]), experts=3)
    planned = plan(recipe)
    assert planned.ffn_totals == report.plan.ffn_totals and planned.totals == report.plan.totals
    assert [tensor.shape for tensor in planned.tensors] == [tensor.shape for tensor in report.plan.tensors]
    assert planned.warnings == ["no text was read: calibrate shows which experts stay; sizes are the same."]
    text = plan(recipe.replace(calibrate=(readable[1],), calibration_tokens=1024))
    assert text.fewer == report.plan.fewer and text.warnings == []
    assert text.to_json()["fewer_experts"]["layers"][1]["kept"] == report.plan.fewer.layers[1].kept


def test_layers_that_are_left_out_have_fewer_experts_too(readable, tmp_path):
    source, text = readable
    recipe = Recipe(str(source), experts=3, layers="1", calibrate=(text,), calibration_tokens=1024)
    report = convert(recipe, tmp_path / "out")
    assert stored(tmp_path / "out")["model.layers.0.mlp.experts.down_proj"].shape[0] == 3
    assert verify(tmp_path / "out").relative_difference < 2e-6
    whole = sum(tensor.numel() for tensor in load_file(source / "model.safetensors").values())
    assert report.plan.totals.dense_params == whole


def test_the_rest_of_a_budget_is_met_by_ranks(readable, tmp_path):
    source, text = readable
    recipe = Recipe(str(source), experts=3, keep=0.7, calibrate=(text,), calibration_tokens=1024)
    report = convert(recipe, tmp_path / "out")
    numbers = sum(EXPERTS * m.shape[0] * m.shape[1] for m in report.matrices)
    assert 0.6 * numbers < report.plan.ffn_totals.stored_params <= 0.7 * numbers
    assert {matrix.experts for matrix in report.matrices} == {3}
    assert all(matrix.output_error is not None for matrix in report.matrices)
    found = verify(tmp_path / "out")
    assert found.ok and found.relative_difference > 0.01
    same = plan(recipe.replace(keep=0.75))  # three of four experts
    assert {matrix.form for matrix in same.matrices} == {"whole"}
    with pytest.raises(RecipeError) as caught:
        plan(recipe.replace(keep=0.001))
    # 24 + 3 + 32 numbers, bases of one column, of 4 x 24 x 32
    assert str(caught.value) == (
        "keep is 0.001; the smallest that can be met with share auto is 0.0193, by "
        "model.layers.0.mlp.mixture.gate"
    )


def test_as_many_experts_as_the_source_has_are_the_source(readable, tmp_path):
    source, text = readable
    report = convert(Recipe(str(source), experts=EXPERTS), tmp_path / "out")
    assert report.plan.is_exact and report.fewer is None and verify(tmp_path / "out").ok
    with pytest.raises(RecipeError, match="^calibrate given without keep, and experts is not below"):
        convert(Recipe(str(source), experts=EXPERTS, calibrate=(text,)), tmp_path / "again")


def test_a_recipe_file_says_how_many_even_if_that_is_the_default(tmp_path):
    source = save_mixture("qwen3_moe", tmp_path / "source", num_experts=12)
    (tmp_path / "recipe.json").write_text(json.dumps({"model": str(source), "experts": 8}))
    found = CliRunner().invoke(main, ["plan", "--config", str(tmp_path / "recipe.json"), "--json"])
    assert json.loads(found.stdout)["recipe"]["experts"] == 8
    assert {matrix["experts"] for matrix in json.loads(found.stdout)["matrices"]} == {8}


def test_experts_are_chosen_on_text(readable, tmp_path):
    with pytest.raises(RecipeError) as caught:
        convert(Recipe(str(readable[0]), experts=3), tmp_path / "out")
    assert str(caught.value) == (
        "experts is 3 of 4; expected calibrate with it (from Python also: calibration): text shows which "
        "experts stay"
    )


def test_text_for_a_dense_source_without_a_budget_is_refused(tiny_gpt2, readable, tmp_path):
    recipe = Recipe(str(tiny_gpt2), experts=4, calibrate=(readable[1],))
    with pytest.raises(
        RecipeError, match="^calibrate given without keep or max_error; nothing is compressed"
    ):
        convert(recipe, tmp_path / "out")
