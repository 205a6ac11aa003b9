"""Plans: floating-point operations against the calls of the stock model, and requests that do not fit."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from helpers.models import MODEL_TYPES, generative
from helpers.tiny import VARIANTS, make_config, make_inputs, save_tiny
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from mpoe_convert import MpoeError, Recipe, plan
from mpoe_convert.errors import FamilyError, RecipeError
from mpoe_convert.request import normalised
from mpoe_convert.source.architecture import Architecture
from mpoe_convert.source.families import FAMILY_OF
from mpoe_convert.source.locate import resolve
from mpoe_convert.source.probe import describe_slot

CASES = [(t, v) for t in MODEL_TYPES for v in range(len(VARIANTS.get(t, [{}])))]
# Layers that see fewer positions than there are tokens: they count as if they saw every one.
NOT_PER_TOKEN = {"classifier", "vit.embeddings.patch_embeddings.projection"}
OF_RELATIVE_POSITIONS = ("pos_key_proj", "pos_query_proj")  # DeBERTa's


def planned(folder, **options):
    return plan(Recipe(folder, **{"experts": 3, "bond_dim": 4} | options))


# ------------------------------------------------------------------------------------------------- FLOPs


def flops_of_calls(folder: Path, auto_class: str, ffn_weights: set[str]) -> tuple[int, int]:
    """(all, those of `ffn_weights`) per token: hooks on one forward pass, 2 per multiply-add."""
    model = getattr(transformers, auto_class).from_pretrained(folder).eval()
    inputs = make_inputs(model, auto_class)
    if getattr(model.config, "add_cross_attention", False):  # GPT-2 as a decoder calls it only then
        inputs["encoder_hidden_states"] = torch.randn(2, 9, model.config.hidden_size)
    tokens = 2 * 5 if "pixel_values" in inputs else inputs["input_ids"].numel()
    flops = {True: 0, False: 0}

    def hook_for(name):
        def hook(module, args, output):
            rows = args[0].numel() // args[0].shape[-1]
            assert rows == tokens or name in NOT_PER_TOKEN or name.endswith(OF_RELATIVE_POSITIONS), name
            flops[f"{name}.weight" in ffn_weights] += 2 * module.weight.numel()

        return hook

    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D, torch.nn.Conv2d)):
            module.register_forward_hook(hook_for(name))
    with torch.no_grad():
        model(**inputs)
    return flops[True] + flops[False], flops[True]


@pytest.mark.parametrize(("model_type", "variant"), CASES)
def test_dense_flops_are_those_of_the_calls(model_type, variant, tmp_path):
    auto_class = generative(model_type)
    folder = save_tiny(model_type, auto_class, tmp_path / "tiny", variant)
    found = planned(folder)
    sources = {s.weight for ffn in found.ffns for s in ffn.ffn.projections.values()}
    if model_type == "vit":  # the checkpoint's names are those of earlier releases
        sources = {f"vit.layers.{i}.mlp.{name}.weight" for i in range(2) for name in ("fc1", "fc2")}
    every, ffns = flops_of_calls(folder, auto_class, sources)
    assert found.totals.dense_flops_per_token == every
    assert found.ffn_totals.dense_flops_per_token == ffns > 0


def test_an_ffn_that_layers_share_works_once_for_each(tmp_path):
    """ALBERT with 5 layers in 2 groups: the first group runs three times, the second twice."""
    config = make_config("albert", 1)
    config.num_hidden_layers = 5
    folder = tmp_path / "albert"
    transformers.AlbertForMaskedLM(config).save_pretrained(folder)
    found = planned(folder, layout="balanced")
    assert [ffn.runs_per_token for ffn in found.ffns] == [3, 2]
    one = planned(folder, layout="balanced", layers="1").ffn_totals
    both = found.ffn_totals
    for name in ("dense_flops_per_token", "plain_moe_flops_per_token", "flops_per_token"):
        assert 2 * getattr(both, name) == 5 * getattr(one, name) > 0
    assert 2 * both.rebuild_flops_per_forward == 5 * one.rebuild_flops_per_forward > 0
    assert flops_of_calls(folder, "AutoModelForMaskedLM", set())[0] == found.totals.dense_flops_per_token


# ------------------------------------------------------------------------------------------------ recipes


def test_layers_are_ranges_and_not_lists(tiny_gpt2):
    with pytest.raises(
        RecipeError, match="0-9999999999 ends behind the last FFN, in layer 1; this model has 2"
    ):
        planned(tiny_gpt2, layers="0-9999999999")
    assert len(planned(tiny_gpt2, layers="0-1").ffns) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": "0,99"}, "layers is '0,99', and 99 matches no FFN; this model has 2 FFNs: h.0, h.1"),
        ({"layers": "1,5-8"}, "and 5-8 matches no FFN"),
        (
            {"layers": "0,1-2"},
            "and 1-2 ends behind the last FFN, in layer 1; this model has 2 FFNs: h.0, h.1",
        ),
        ({"include": ("h.*", "x.*")}, "include 'x.*' matches no FFN; this model has 2 FFNs: h.0, h.1"),
        ({"exclude": "h.7"}, "exclude 'h.7' matches no FFN"),
        ({"exclude": "h.?"}, "leave no FFN to convert; this model has 2 FFNs: h.0, h.1"),
    ],
    ids=str,
)
def test_a_choice_that_matches_nothing_is_told(options, said, tiny_gpt2):
    with pytest.raises(RecipeError) as error:
        planned(tiny_gpt2, **options)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seed": -1}, "seed is -1; expected a whole number from 0 to 2**63 - 1"),
        ({"seed": 2**63}, "expected a whole number from 0 to 2**63 - 1"),
        ({"noise": True}, "noise is True; expected a number"),
        (
            {"keep": 60, "experts": 8},
            "keep is 60 with 8 experts; expected a share of the dense FFNs' parameters, such as 0.6",
        ),
        ({"factors": "2,2x2,2"}, "factors is '2,2x2,2': 2 sites have no central one"),
        ({"factors": "2,2,2"}, "factors is '2,2,2': the factors '2,2,2' have 0 x instead of one"),
        ({"kind": "dense", "sites": 3}, "sites given with kind='dense'; expected with kind='mpo' only"),
        ({"kind": "dense", "factors": "2,2,2x2,2,2"}, "factors given with kind='dense'"),
        ({"kind": "low-rank", "sites": 3}, "sites given with kind='low-rank'"),
        ({"sites": 5, "factors": "2,2,2x2,2,2"}, "sites is 5 but factors '2,2,2x2,2,2' has 3; give one"),
    ],
    ids=str,
)
def test_a_recipe_that_contradicts_itself_is_told(options, said):
    with pytest.raises(RecipeError) as error:
        Recipe("gpt2", **options)
    assert said in str(error.value)


def test_the_largest_seed_is_a_seed():
    largest = Recipe("gpt2", seed=2**63 - 1).seed
    assert torch.Generator().manual_seed(largest).initial_seed() == largest


def test_a_model_may_be_a_path(tiny_gpt2):
    assert Recipe(tiny_gpt2) == Recipe(str(tiny_gpt2))


def test_a_name_in_two_spellings_is_told():
    assert normalised({"bond-dim": 3, "top_k": 1}) == {"bond_dim": 3, "top_k": 1}
    said = "the recipe gives bond_dim twice, as 'bond-dim' and 'bond_dim'; keep one"
    with pytest.raises(RecipeError, match=said):
        Recipe.from_mapping({"model": "gpt2", "bond-dim": 3, "bond_dim": 4})


@pytest.mark.parametrize(
    ("options", "sites", "bias"),
    [
        ({}, 3, "shared"),
        ({"layout": "balanced", "bias": "per-expert"}, 5, "per-expert"),
        ({"factors": "2,4,2x2,6,2"}, 3, "shared"),
        ({"kind": "dense"}, None, "per-expert"),
    ],
    ids=str,
)
def test_the_recipe_of_a_plan_holds_no_defaults_that_may_change(options, sites, bias, tiny_gpt2):
    recipe = planned(tiny_gpt2, **options).recipe
    assert (recipe.sites, recipe.bias) == (sites, bias)
    again = plan(Recipe.from_mapping(recipe.to_mapping()))
    assert again == planned(tiny_gpt2, **options)


# ------------------------------------------------------------------------------------------- checkpoints


def edit(folder: Path, drop: str = "\0", **config) -> None:
    """Remove the tensors whose names hold `drop`, and change the config."""
    path, state = folder / "model.safetensors", load_file(folder / "model.safetensors")
    save_file({n: t for n, t in state.items() if drop not in n}, path, metadata={"format": "pt"})
    old = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(old | config))


@pytest.mark.parametrize(
    ("model_type", "drop", "config", "said"),
    [
        ("gpt2", "h.1.mlp.", {}, "transformer.h.1.mlp.c_fc.weight missing; found 1 FFN, expected 2"),
        ("gpt2", "h.1.mlp.", {"n_layer": None}, "expected 2 by the layers that have tensors"),
        ("gpt2", "h.0.", {"n_layer": None}, "transformer.h.0.mlp.c_fc.weight missing"),
        ("gpt2", "h.1.", {}, "expected 2 by config.json"),
        ("gpt2", "\0", {"n_layer": 1}, "found 2 FFNs up to transformer.h.1, expected 1 by config.json"),
        ("bart", "decoder.layers.1.fc", {}, "model.decoder.layers.1.fc1.weight missing"),
        ("bart", "decoder.layers.0.fc", {}, "model.decoder.layers.0.fc1.weight missing"),
        ("t5", "decoder.block.1.layer.2", {}, "decoder.block.1.layer.2.DenseReluDense.wi.weight missing"),
        ("bert", "layer.1.", {}, "bert.encoder.layer.1.intermediate.dense.weight missing"),
        (
            "albert",
            "\0",
            {"num_hidden_groups": 2},
            "albert_layer_groups.1.albert_layers.0.ffn.weight missing",
        ),
    ],
)
def test_a_layer_without_its_ffn_is_told(model_type, drop, config, said, tmp_path):
    folder = save_tiny(model_type, generative(model_type), tmp_path / "tiny")
    assert planned(folder).ffns
    edit(folder, drop, **config)
    with pytest.raises(FamilyError) as error:
        planned(folder)
    assert said in str(error.value)


@pytest.mark.parametrize(("model_type", "auto"), [("bart", "AutoModelForCausalLM")])
def test_a_head_may_lack_a_stack(model_type, auto, tmp_path):
    found = planned(save_tiny(model_type, auto, tmp_path / "tiny"))
    assert [ffn.ffn.path for ffn in found.ffns] == ["decoder.layers.0", "decoder.layers.1"]


# -------------------------------------------------------------------------- families outside the table

FALCON = {f"transformer.h.0.mlp.dense_{way}.weight" for way in ("h_to_4h", "4h_to_h")}


def test_a_type_that_transformers_lacks_is_to_be_renamed():
    with pytest.raises(FamilyError) as error:
        resolve(Architecture({"model_type": "RefinedWebModel"}), FALCON)
    assert (
        "transformers does not have it either; nearest is falcon: if the architecture is the same, set "
        in (said := str(error.value))
    )
    assert '"model_type": "falcon" in a copy of config.json' in said and 'ffn "' not in said
    with pytest.raises(FamilyError, match="no code lies beside it: it cannot be built"):
        resolve(Architecture({"model_type": "unheard-of"}), {"a.0.b.weight"})


def test_the_layers_decide_between_rows_with_the_same_projections():
    with pytest.raises(FamilyError) as error:
        resolve(Architecture({"model_type": "mpt"}), FALCON)
    assert "; nearest is falcon; no module" in str(error.value)


@pytest.mark.parametrize(
    ("model_type", "hint"),
    [
        ("gpt_neox_japanese", "layers.{}.mlp:dense_h_to_4h,dense_4h_to_h"),
        ("ctrl", "h.{}.ffn:0,2"),
        ("dinov2", "encoder.layer.{}.mlp:fc1,fc2"),
    ],
)
def test_what_is_proposed_is_accepted(model_type, hint):
    assert model_type not in FAMILY_OF, "choose another type for this test"
    architecture = Architecture(make_config(model_type).to_dict())
    names = list(architecture.base.state_dict())
    with pytest.raises(FamilyError, match=f'to name the FFNs by hand: ffn "{re.escape(hint)}"$'):
        resolve(architecture, names)
    family, found = resolve(architecture, names, hint)
    assert len(found) == 2 and family.by_hand == hint


@pytest.mark.parametrize("model_type", ["roformer", "biogpt", "led", "rwkv", "xlm"])
def test_nothing_is_proposed_that_would_be_refused(model_type):
    """Their FFNs are spread over the layer's own code, have other parts, or are not there."""
    assert model_type not in FAMILY_OF, "choose another type for this test"
    architecture = Architecture(make_config(model_type).to_dict())
    with pytest.raises(FamilyError, match="there is none that ffn could name") as error:
        resolve(architecture, list(architecture.base.state_dict()))
    assert 'ffn "' not in str(error.value)


def test_a_proposal_needs_its_tensors():
    """The module would do, and the checkpoint has other names."""
    architecture = Architecture(make_config("ctrl").to_dict())
    names = {name.replace("ffn", "feed") for name in architecture.base.state_dict()}
    with pytest.raises(FamilyError, match="there is none that ffn could name"):
        resolve(architecture, names)


def stock_base(model_type: str, **changes):
    return Architecture(make_config(model_type).to_dict() | changes).base


@pytest.mark.parametrize(
    ("model_type", "projections", "changes", "said"),
    [
        ("llama", ("up_proj", "gate_proj", "down_proj"), {}, "does not compute down(act(gate(x)) * up(x))"),
        ("llama", ("gate_proj", "down_proj", "up_proj"), {}, "does not compute"),
        ("llama", ("up_proj", "down_proj"), {}, "expected one activation"),
        ("arcee", ("down_proj", "up_proj"), {}, "does not compute down(act(up(x)))"),
        (
            "falcon_h1",
            ("gate_proj", "up_proj", "down_proj"),
            {"mlp_multipliers": [1.0, 0.5]},
            "does not compute",
        ),
        ("apertus", ("up_proj", "down_proj"), {}, "act_fn.alpha_p"),
    ],
)
def test_a_module_that_is_no_ffn_of_these_names_is_told(model_type, projections, changes, said):
    slot = "feed_forward" if model_type == "falcon_h1" else "mlp"
    with pytest.raises(MpoeError) as error:
        describe_slot(stock_base(model_type, **changes), "layers.0", slot, projections)
    assert said in str(error.value)


@pytest.mark.parametrize("model_type", ["llama", "granite"])
def test_a_module_that_is_an_ffn_is_described(model_type):
    """Granite scales what its layers add, outside the FFN."""
    changes = {"residual_multiplier": 0.5} if model_type == "granite" else {}
    names = ("gate_proj", "up_proj", "down_proj")
    row = describe_slot(stock_base(model_type, **changes), "layers.0", "mlp", names)
    assert row == {"activation": "act_fn", "transposed": False, "adds_residual": False}


def test_other_stock_ffns_are_described():
    row = describe_slot(stock_base("gpt2"), "h.0", "mlp", ("c_fc", "c_proj"))
    assert row["transposed"] and row["outer_dropout"] == "dropout"
    row = describe_slot(stock_base("bloom"), "h.0", "mlp", ("dense_h_to_4h", "dense_4h_to_h"))
    assert row["adds_residual"]
