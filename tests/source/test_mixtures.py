"""Mixtures as sources: names and values as in memory, experts located, bad input."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from helpers.expert_mixtures import EXPERTS, TOP_K, TYPES, save_mixture, stock_name
from helpers.models import stored
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from mpoe_convert import Recipe, convert, plan
from mpoe_convert.errors import CheckpointError, FamilyError, RecipeError
from mpoe_convert.options import by_name, default_of
from mpoe_convert.planning.resolve import FOR_MIXTURES
from mpoe_convert.request import read_recipe
from mpoe_convert.source.families import REFUSED
from mpoe_convert.source.mixtures import check_module, locate_experts
from mpoe_convert.source.named_experts import is_marked
from mpoe_convert.source.opening import open_source


def edit(folder, change) -> None:
    """Change the tensors of a folder with one weight file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder, error, **recipe) -> str:
    with pytest.raises(error) as caught:
        convert(Recipe(str(folder), **recipe), folder.parent / "out")
    assert "\n" not in str(caught.value) and not (folder.parent / "out").exists()
    return str(caught.value)


# --------------------------------------------------------------------------------------- names and values


@pytest.mark.parametrize(
    "model_type", ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "ernie4_5_moe", "jamba"]
)
@pytest.mark.parametrize("layout", ["disk", "memory", "bin", "shards"])
def test_tensors_are_those_of_the_loaded_model(model_type, layout, tmp_path):
    folder = save_mixture(model_type, tmp_path / "source")
    stock = getattr(transformers, stock_name(model_type)[1]).from_pretrained(folder)
    expected = stock.state_dict()
    if layout == "memory":  # under the names that older exports and other tools may use
        stored = {name: tensor.clone() for name, tensor in expected.items()}
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    elif layout == "bin":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    elif layout == "shards":
        stock.save_pretrained(folder, max_shard_size="20KB")
        (folder / "model.safetensors").unlink()
    source = open_source(str(folder))
    parameters = {name for name, _ in stock.named_parameters()}
    assert parameters <= source.tensors.keys() <= expected.keys()
    for name, info in source.tensors.items():
        found = source.read(name)
        assert (tuple(found.shape), str(found.dtype)) == (info.shape, f"torch.{info.dtype}")
        assert torch.equal(found, expected[name]), name


def test_experts_are_located(tmp_path):
    located = locate_experts(open_source(str(save_mixture("deepseek_v3", tmp_path / "source"))))
    assert (located.num_experts, located.top_k) == (EXPERTS, TOP_K)
    [ffn] = located.ffns  # the first layer is dense
    assert (ffn.path, ffn.key, ffn.num_experts) == ("layers.1", "model.layers.1.mlp.mixture", EXPERTS)
    assert located.family.runtime() == {"slot": "mlp", "experts": "experts"}


# ------------------------------------------------------------------------------- confirmed by running them


def make_experts(scale: float = 1.0, gating: bool = False, **flags):
    """A class of experts of these flags, and one of it on the meta device."""
    transposed, bias = flags.get("is_transposed", False), flags.get("has_bias", False)
    gated, together = flags.get("has_gate", True), flags.get("is_concatenated", True)

    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts, width = 5, 24 if gated else 12
            name, shapes = ("gate_up_proj" if gated else "up_proj"), [(8, width), (12, 8)]
            for each, shape in zip([name, "down_proj"], shapes, strict=True):
                size = (5, *shape) if transposed else (5, *shape[::-1])
                setattr(self, each, nn.Parameter(torch.empty(size)))
                if bias:
                    setattr(self, f"{each}_bias", nn.Parameter(torch.empty(5, shape[1])))
            self.act_fn = ACT2FN["gelu"]

        def one(self, name, expert, x):
            weight = getattr(self, name)[expert]
            y = x @ (weight if transposed else weight.T)
            return y + getattr(self, f"{name}_bias")[expert] if bias else y

        def forward(self, hidden_states, top_k_index, top_k_weights):
            output = torch.zeros_like(hidden_states)
            for token, x in enumerate(hidden_states):
                for expert, weight in zip(top_k_index[token], top_k_weights[token], strict=True):
                    y = self.one("gate_up_proj" if gated else "up_proj", expert, x)
                    h = self._apply_gate(y) if gated else self.act_fn(y)
                    output[token] += scale * weight * self.one("down_proj", expert, h)
            return output

    if gating or not together:

        def _apply_gate(self, gate_up):
            gate, up = gate_up.chunk(2, -1) if together else (gate_up[..., ::2], gate_up[..., 1::2])
            return (up.clamp(-0.5, 0.5) + 1) * self.act_fn(gate)

        Experts._apply_gate = _apply_gate
    with torch.device("meta"):
        return use_experts_implementation(**flags)(Experts)(None)


FLAGS = {
    "as most": {},
    "transposed": {"is_transposed": True},
    "interleaved": {"is_concatenated": False},
    "transposed, interleaved, biases": {"is_concatenated": False, "is_transposed": True, "has_bias": True},
    "biases": {"has_bias": True},
    "no gate": {"has_gate": False},
    "no gate, biases": {"has_gate": False, "has_bias": True},
}


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("gating", [False, True])
def test_what_the_flags_say_is_confirmed_by_running_it(flags, gating):
    check_module("any", make_experts(gating=gating, **FLAGS[flags]))
    with pytest.raises(
        FamilyError, match=r"Experts computes something else than down\(act\(gate x\) \* up x\)"
    ):
        check_module("any", make_experts(scale=1.01, gating=gating, **FLAGS[flags]))


def test_experts_that_need_more_are_refused():
    module = make_experts()
    module.forward = None
    del module.__dict__["num_experts"]
    type(module).forward = lambda self, states: states
    with pytest.raises(
        FamilyError, match=r"type any cannot be converted: Experts does not run on small numbers"
    ):
        check_module("any", module)


# ---------------------------------------------------------------------------------------------- coverage


# Experts of text towers that transformers has no model of its own for.
TOWERS = {
    "deepseek_ocr2": ("DeepseekOcr2TextExperts", {"n_routed_experts": 4, "mlp_layer_types": ["sparse"]}),
    "diffusion_gemma": ("DiffusionGemmaTextExperts", {"num_experts": 4, "top_k_experts": 2}),
}


@pytest.mark.parametrize("model_type", TOWERS)
def test_experts_of_text_towers_compute_as_ours(model_type):
    name, changes = TOWERS[model_type]
    small = {"hidden_size": 8, "moe_intermediate_size": 12, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.CONFIG_MAPPING[f"{model_type}_text"](**small, **changes)
    modeling = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    with torch.device("meta"):
        module = getattr(modeling, name)(config)
    assert is_marked(module)
    check_module(model_type, module)


# Types with experts that are not converted here; why.
NOT_TRIED = {
    "vision-language models, whose text towers are tried": {
        *("deepseek_ocr2", "ernie4_5_vl_moe", "glm4v_moe", "hy_v4_vl", "qwen3_omni_moe", "qwen3_vl_moe"),
        *("unlimited_ocr", "qwen4_exp", "aria", "gemma4", "inkling", "minimax_m3_vl", "qwen3_5_moe"),
        *("diffusion_gemma", "dots3_note", "inkling2", "inkling2_loop", "llama4", "mistral4", "step3p7"),
    },
    "no model of a few kilobytes": {"mistral_large4", "glm5_next"},
    "refused when it is opened: a norm behind every expert": {"muse_spark"},
    "no language model": {"openai_privacy_filter"},
}


def test_every_family_of_transformers_is_tried_or_refused():
    known = {each for types in NOT_TRIED.values() for each in types}
    folders = {each.removesuffix("_text") for each in (*TYPES, *REFUSED)} | known
    folders |= {each.replace("-", "_") for each in folders}
    files = sorted(Path(transformers.models.__path__[0]).glob("*/modeling_*.py"))
    marks = re.compile(r"use_experts_implementation\b|class \w+Experts\(nn")
    found = {path.parent.name for path in files if marks.search(path.read_text(encoding="utf-8"))}
    assert found - folders == set()


@pytest.mark.parametrize("model_type", REFUSED)
def test_families_that_call_experts_in_another_way_are_refused(model_type, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    message = refused(folder, FamilyError)
    assert message == f"a mixture of type {model_type} cannot be converted: {REFUSED[model_type]}"


# --------------------------------------------------------------------------------------------- bad input

W1 = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


@pytest.fixture
def mixtral(tmp_path):
    return save_mixture("mixtral", tmp_path / "source")


def test_a_damaged_config_of_the_tokenizer_is_told_first(mixtral, tmp_path):
    (mixtral / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=re.escape(str(mixtral / "tokenizer_config.json"))):
        plan(Recipe(str(mixtral)))


def test_a_missing_expert_is_named(mixtral):
    edit(mixtral, lambda tensors: tensors.pop(W1))
    assert f"lacks {W1}, the matrix of expert 2 of {EXPERTS}; fetch the checkpoint" in refused(
        mixtral, CheckpointError
    )


def test_the_last_expert_is_missed_too(mixtral):
    for name in (last := W1.replace(".2.", ".3."), last.replace("w1", "w3"), last.replace("w1", "w2")):
        edit(mixtral, lambda tensors, name=name: tensors.pop(name))
    assert f"lacks {last}, the matrix of expert 3" in refused(mixtral, CheckpointError)


def test_a_projection_without_tensors_is_named(mixtral):
    for expert in range(EXPERTS):
        edit(mixtral, lambda tensors, e=expert: tensors.pop(W1.replace(".2.", f".{e}.")))
    assert "w1.weight are missing, while model.layers.1" in refused(mixtral, CheckpointError)


def test_experts_of_different_shapes_are_named(mixtral):
    edit(mixtral, lambda tensors: tensors.update({W1: torch.ones(41, 32)}))
    assert f"{W1} has the shape [41, 32], those of the other experts [40, 32]" in refused(
        mixtral, CheckpointError
    )


def test_experts_of_different_dtypes_have_the_widest(mixtral, tmp_path):
    first = W1.replace(".2.", ".0.")
    edit(mixtral, lambda tensors: tensors.update({first: tensors[first].bfloat16()}))
    convert(Recipe(str(mixtral)), tmp_path / "out")
    found, expected = stored(tmp_path / "out"), stored(mixtral)
    gate = found["model.layers.1.mlp.mixture.gate.terms.0.aux_0"]
    for expert in range(EXPERTS):
        wanted = expected[W1.replace(".2.", f".{expert}.")].T.float()
        assert torch.equal(gate[expert].view_as(wanted), wanted)


def test_a_router_of_another_number_of_experts_is_named(mixtral):
    gate = "model.layers.0.block_sparse_moe.gate.weight"
    edit(mixtral, lambda tensors: tensors.update({gate: torch.ones(7, 32)}))
    message = refused(mixtral, CheckpointError)
    assert "model.layers.0.mlp.gate.weight has the shape [7, 32], and config.json asks for [4, 32]" in message


def test_an_expert_with_nan_is_named(mixtral):
    edit(mixtral, lambda tensors: tensors[W1].view(-1)[5].fill_(float("nan")))
    assert f"{W1} holds NaN or Inf in 1 of 1280 places; repair the source" in refused(
        mixtral, CheckpointError
    )


def test_an_expert_of_a_fused_tensor_with_nan_is_named(tmp_path):
    folder = save_mixture("granitemoe", tmp_path / "source")
    name = "model.layers.0.block_sparse_moe.output_linear.weight"
    edit(folder, lambda tensors: tensors[name][3].view(-1)[0].fill_(float("inf")))
    message = refused(folder, CheckpointError)
    assert f"{name} (expert 3) holds NaN or Inf in 1 of" in message


def test_a_mixture_whose_layers_are_all_dense_is_told(tmp_path):
    folder = save_mixture("qwen3_moe", tmp_path / "dense", mlp_only_layers=[0, 1])
    assert refused(folder, FamilyError) == (
        "a mixture of type qwen3_moe cannot be converted: by config.json all its layers are dense, and dense "
        "layers of mixtures are not converted"
    )


def test_a_config_that_hides_experts_is_told(tmp_path):
    folder = save_mixture("qwen3_moe", tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mlp_only_layers": [0, 1]}))
    assert refused(folder, FamilyError) == (
        "this qwen3_moe names experts in config.json or in its tensors, and no layer of Qwen3MoeModel has "
        "any; correct config.json"
    )


def test_a_missing_tensor_beside_the_experts_is_named(mixtral):
    edit(mixtral, lambda tensors: tensors.pop("model.norm.weight"))
    assert "lacks 'model.norm.weight' of MixtralForCausalLM" in refused(mixtral, CheckpointError)


def test_a_tensor_that_the_model_does_not_have_is_left_out_and_told(mixtral):
    edit(mixtral, lambda tensors: tensors.update({"mtp.weight": torch.ones(2)}))
    planned = plan(Recipe(str(mixtral)))
    assert planned.warnings == ["MixtralForCausalLM has no place for 'mtp.weight': left out."]
    assert not any("mtp" in tensor.name for tensor in planned.tensors)


# ----------------------------------------------------------------------------------------------- options

REFUSED_OPTIONS = {
    "experts": (
        6,
        "experts is 6, and the source is a mixture of 4 experts, 2 per token; expected 2 to 4",
    ),
    "top_k": (
        3,
        "top_k is 3, and the source is a mixture of 4 experts, 2 per token; expected 2, or leave it out",
    ),
    **{
        name: (
            value,
            f"{name} given with a mixture of experts as the source; it is about dense sources: leave it out",
        )
        for name, value in {
            "kind": "mpo",
            "bond_dim": 8,
            "noise": 0.0,
            "seed": 0,
            "bias": "shared",
            "layout": "two-sided",
            "ffn": "layers.{}.mlp:gate_proj,up_proj,down_proj",
            "max_error": 0.1,
        }.items()
    },
}


@pytest.mark.parametrize("name", REFUSED_OPTIONS)
def test_options_without_a_meaning_are_refused(name, mixtral):
    value, expected = REFUSED_OPTIONS[name]
    assert refused(mixtral, RecipeError, **{name: value}) == expected


OF_DENSE_SOURCES = sorted(set(by_name(Recipe)) - FOR_MIXTURES)


@pytest.mark.parametrize("name", OF_DENSE_SOURCES)
def test_the_value_of_a_default_is_refused_like_any_other(name, mixtral):
    default = default_of(by_name(Recipe)[name])
    if default is None or default is False or default == ():  # which say nothing
        plan(Recipe(str(mixtral), **{name: default}))
        return
    for recipe in (
        Recipe(str(mixtral), **{name: default}),
        Recipe.from_mapping({"model": str(mixtral), name: default}),
    ):
        with pytest.raises(RecipeError, match=f"^{name} given with a mixture of experts as the source"):
            plan(recipe.replace(device="cpu"))


def test_numbers_of_experts_are_those_of_the_source(tmp_path):
    folder = save_mixture("qwen3_moe", tmp_path / "source", num_experts=12, num_experts_per_tok=9)
    assert plan(Recipe(str(folder), top_k=9)).recipe.experts == 12  # though a dense source would get 8
    assert plan(Recipe(str(folder), experts=12)).recipe.top_k == 9
    for name, value, expected in (("experts", 8, "9 to 12"), ("top_k", 2, "9, or leave it out")):
        assert refused(folder, RecipeError, **{name: value}) == (
            f"{name} is {value}, and the source is a mixture of 12 experts, 9 per token; expected {expected}"
        )


def test_a_recipe_file_of_a_mixture_repeats_the_run(mixtral, tmp_path):
    convert(Recipe(str(mixtral), keep=0.6), tmp_path / "out")
    again = Recipe.from_mapping(read_recipe(tmp_path / "out/mpoe_recipe.yaml"))
    convert(again, tmp_path / "again")
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert expected.keys() == found.keys() and all(torch.equal(found[k], v) for k, v in expected.items())


def test_sharing_is_for_mixtures(tiny_gpt2, mixtral):
    assert refused(tiny_gpt2, RecipeError, share="both", keep=0.5).startswith(
        "share given with a dense source"
    )
    with pytest.raises(RecipeError, match="^share given without keep; experts stay whole then"):
        Recipe(str(mixtral), share="both")
    message = refused(mixtral, RecipeError, keep=0.001)
    # 32 + 4 + 40 numbers, bases of one column, of 4 x 32 x 40
    assert message == (
        "keep is 0.001; the smallest that can be met with share auto is 0.0149, by "
        "model.layers.0.mlp.mixture.gate"
    )
    assert plan(Recipe(str(mixtral), keep=0.0149)).ffn_totals.stored_params == 6 * 76
