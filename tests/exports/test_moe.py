"""The export as a mixture that transformers has: the same logits, from stock classes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from helpers.artifacts import converted, perturb, set_options
from helpers.models import generative
from helpers.tiny import make_config, make_inputs, make_model, outputs, save_tiny
from helpers.vocabularies import save_vocabulary
from safetensors.torch import load_file, save_file

from mpoe_convert import Export, Recipe, convert, export
from mpoe_convert.errors import ExportError, VerifyError
from mpoe_convert.exports.moe_architectures import MOE_TARGETS, NEAR_MISSES, TARGET_OF
from mpoe_convert.source.families import FAMILY_OF

MOE = Export(to="moe", check=False)
CASES = [(source, way) for source, row in TARGET_OF.items() for way in row.weighing]


def assert_same(out: Path, back: Path, model_type: str):
    """The exported model, its first router turned round."""
    auto = getattr(transformers, generative(model_type))
    model = auto.from_pretrained(out, trust_remote_code=True).eval()
    found, info = auto.from_pretrained(back, output_loading_info=True)
    assert not any(info.values()), info
    target = TARGET_OF[model_type]
    assert found.config.model_type == target.model_type
    assert json.loads((back / "config.json").read_text())[target.num_experts] == 3
    inputs = make_inputs(model, generative(model_type))
    expected, logits = outputs(model, inputs)["logits"], outputs(found.eval(), inputs)["logits"]
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5 * expected.abs().max())
    with torch.no_grad():  # the routers count
        name = next(
            name for name, _ in found.named_parameters() if "router" in name or ".gate.weight" in name
        )
        found.get_parameter(name).neg_()
    assert (outputs(found, inputs)["logits"] - expected).abs().max() > 1e-3 * expected.abs().max()
    return found


@pytest.mark.parametrize(("model_type", "way"), CASES)
def test_logits_and_names_are_the_same(model_type, way, tmp_path):
    """Names and shapes are those under which transformers saves a model of the target's own class."""
    out = converted(model_type, tmp_path, way)
    export(out, tmp_path / "back", MOE)
    found = assert_same(out, tmp_path / "back", model_type)
    found.save_pretrained(tmp_path / "saved")
    shapes = [
        {name: tensor.shape for name, tensor in load_file(folder / "model.safetensors").items()}
        for folder in (tmp_path / "back", tmp_path / "saved")
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("model_type", TARGET_OF)
def test_the_kernels_of_transformers_compute_the_same(model_type, tmp_path):
    """Of every target that has them; Switch Transformers runs its experts one after the other."""
    way = next(iter(TARGET_OF[model_type].weighing))
    out = converted(model_type, tmp_path, way)
    export(out, tmp_path / "back", MOE)
    auto = getattr(transformers, generative(model_type))
    model = auto.from_pretrained(out, trust_remote_code=True).eval()
    inputs = make_inputs(model, generative(model_type))
    expected = outputs(model, inputs)["logits"]
    found = auto.from_pretrained(tmp_path / "back").eval()
    has_kernels = TARGET_OF[model_type].model_type != "switch_transformers"
    assert found._can_set_experts_implementation() == has_kernels
    for kernel in ("eager", "batched_mm", "grouped_mm") if has_kernels else ():
        found.set_experts_implementation(kernel)
        assert found.config._experts_implementation == kernel
        logits = outputs(found, inputs)["logits"]
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5 * expected.abs().max(), msg=kernel)


def test_a_shared_expert_that_is_idle_has_an_open_gate(tmp_path):
    """llama.cpp computes its sigmoid as silu(x) / x, which is no number where x is zero."""
    out = converted("qwen2", tmp_path)
    export(out, tmp_path / "back", MOE)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    gates = []
    for layer in model.model.layers:
        layer.mlp.shared_expert_gate.register_forward_hook(lambda gate, args, found: gates.append(found))
    outputs(model, make_inputs(model, "AutoModelForCausalLM"))
    quotients = [torch.nn.functional.silu(gate) / gate for gate in gates]
    assert len(quotients) == 2 and all(quotient.isfinite().all() for quotient in quotients)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_layers_that_were_left_dense(model_type, tmp_path):
    out = converted(model_type, tmp_path, layers="1")
    export(out, tmp_path / "back", MOE)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["mlp_only_layers"] == [0]
    assert_same(out, tmp_path / "back", model_type)


# Settings that both architectures have and whose defaults differ, or that change what is computed.
SETTINGS = {
    "llama": {
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
        "rms_norm_eps": 0.01,
        "head_dim": 6,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "mistral": {"sliding_window": 3, "hidden_act": "gelu"},
    "qwen3": {"attention_bias": True, "head_dim": 6},
    "granite": {
        "residual_multiplier": 0.3,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 2.0,
        "logits_scaling": 3.0,
    },
    "olmo2": {"attention_bias": True, "rms_norm_eps": 0.01},
}


@pytest.mark.parametrize("model_type", SETTINGS)
def test_settings_are_carried_over(model_type, tmp_path):
    config = make_config(model_type).to_dict() | SETTINGS[model_type]
    model = transformers.AutoModelForCausalLM.from_config(type(make_config(model_type)).from_dict(config))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(len(parameter)))
    model.save_pretrained(tmp_path / "dense")
    convert(Recipe(str(tmp_path / "dense"), experts=3, bond_dim=4), tmp_path / "out")
    perturb(tmp_path / "out")
    export(tmp_path / "out", tmp_path / "back", MOE)
    assert_same(tmp_path / "out", tmp_path / "back", model_type)


def test_another_head(tmp_path):
    auto = transformers.AutoModelForSequenceClassification
    make_model("llama", "AutoModelForSequenceClassification").save_pretrained(tmp_path / "dense")
    convert(Recipe(str(tmp_path / "dense"), experts=3, bond_dim=4), tmp_path / "out")
    export(tmp_path / "out", tmp_path / "back", MOE)
    model = auto.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    found = auto.from_pretrained(tmp_path / "back").eval()
    assert type(found).__name__ == "MixtralForSequenceClassification"
    inputs = make_inputs(model, "AutoModelForSequenceClassification")
    expected = outputs(model, inputs)["logits"]
    torch.testing.assert_close(outputs(found, inputs)["logits"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "recipe", "message"),
    [
        ({"router_tasks": ["a", "b"]}, {}, "no routers that choose by task"),
        ({"router_combine": "raw"}, {}, r"no combine weights that are raw .*has renormalised"),
        ({}, {"layers": "1"}, r"no layers without experts \(layers.0 were left dense\)"),
        ({"attention_bias": True}, {}, r"no biases in its attention \(attention_bias is True\)"),
        ({"mlp_bias": True, "router_combine": "raw"}, {}, "no combine .*; and no biases in its experts"),
    ],
)
def test_what_a_mixtral_has_not(options, recipe, message, tmp_path):
    out = converted("llama", tmp_path, **recipe)
    set_options(out, **options)
    with pytest.raises(ExportError, match=f"is no mixtral, which has {message}"):
        export(out, tmp_path / "back", MOE)
    assert not (tmp_path / "back").exists()


def test_another_selection_rule(tmp_path):
    out = converted("llama", tmp_path)
    block = json.loads((out / "config.json").read_text())["mpoe"]
    set_options(out, mpoe=block | {"rule": "expert-choice"})
    with pytest.raises(ExportError, match="has no selection rule expert-choice"):
        export(out, tmp_path / "back", MOE)


def test_a_balancing_bias_that_chooses(tmp_path):
    out = converted("qwen3", tmp_path)
    tensors = load_file(out / "model.safetensors")
    for bias, refused in ((torch.zeros(3), False), (torch.tensor([0.1, 0.0, 0.0]), True)):
        tensors["model.layers.0.mlp.balance_bias"] = bias
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        if refused:
            with pytest.raises(ExportError, match="no balancing bias in the choice of experts"):
                export(out, tmp_path / "back", MOE)
        else:
            export(out, tmp_path / "unused", MOE)


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("t5", {}, "no combine weights that are renormalised"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True"),
    ],
)
def test_what_others_have_not(model_type, options, message, tmp_path):
    out = converted(model_type, tmp_path)
    set_options(out, **options)
    with pytest.raises(ExportError, match=message):
        export(out, tmp_path / "back", MOE)


@pytest.mark.parametrize("model_type", ["gpt2", "phi3", "bert"])
def test_families_without_a_mixture(model_type, artifact, tmp_path):
    _, out = artifact(model_type)
    reason = NEAR_MISSES.get(model_type, "transformers has no mixture of that family")
    with pytest.raises(ExportError, match=f"no exact mixture of experts for {model_type}: {reason}.*mixtral"):
        export(out, tmp_path / "back", MOE)


def test_the_table():
    sources = [source for row in MOE_TARGETS for source in row.sources]
    assert len(sources) == len(set(sources)) and set(sources) | set(NEAR_MISSES) <= set(FAMILY_OF)
    assert not set(sources) & set(NEAR_MISSES)


@pytest.mark.parametrize(("model_type", "way"), CASES)
def test_what_llama_cpp_computes_otherwise_is_said(model_type, way, tmp_path):
    """It sums the weights of qwen2_moe's experts as they are and makes those of the others one in all."""
    out = converted(model_type, tmp_path, way)
    said = " ".join(export(out, tmp_path / "back", MOE).warnings)
    differs = (model_type, way) in [("qwen2", "renormalised"), ("qwen3", "raw")]
    assert ("llama.cpp computes other outputs from it" in said) == differs
    assert (f"combine weights of this model are {way}" in said) == differs


def test_half_precision_says_that_routers_are_computed_in_it(tmp_path):
    out = converted("llama", tmp_path, dtype="bfloat16")
    report = export(out, tmp_path / "back", MOE)
    assert (
        "Routers stay float32" in report.warnings[0]
        and "half precision" in (tmp_path / "back/README.md").read_text()
    )
    tensors = load_file(tmp_path / "back" / "model.safetensors")
    assert {str(t.dtype) for n, t in tensors.items() if ".gate." in n} == {"torch.float32"}
    assert {str(t.dtype) for n, t in tensors.items() if ".experts." in n} == {"torch.bfloat16"}


def test_a_trained_llama_as_a_mixtral(test_data, tmp_path):
    """On a real checkpoint, checked by `export` itself."""
    source = test_data / "checkpoints" / "llama-stories260k"
    convert(Recipe(str(source), experts=4, bond_dim=16, noise=0.3), tmp_path / "out")
    report = export(tmp_path / "out", tmp_path / "back", Export(to="moe"))
    assert report.model_type == "mixtral" and report.comparison.relative_difference < 1e-5
    assert report.comparison.top1_agreement == report.comparison.greedy_agreement == 1
    shutil.rmtree(tmp_path / "back")


@pytest.mark.parametrize("kept", [True, False])
def test_its_tokenizer_encodes_as_the_artifacts(kept, tmp_path, monkeypatch):
    """transformers takes another class for a mixtral than the one that its files name."""
    if not kept:
        monkeypatch.setattr("mpoe_convert.exports.export.keep_tokenizer", lambda *_: None)
    source = save_tiny("llama", "AutoModelForCausalLM", tmp_path / "dense")
    save_vocabulary(source, "LlamaTokenizer", "metaspace")
    convert(Recipe(str(source), experts=2, bond_dim=4), tmp_path / "out")
    if not kept:
        with pytest.raises(VerifyError, match="the export's tokenizer encodes .*% of the texts as the artif"):
            export(tmp_path / "out", tmp_path / "back", Export(to="moe"))
        assert not (tmp_path / "back").exists()
        return
    report = export(tmp_path / "out", tmp_path / "back", Export(to="moe"))
    assert report.comparison.tokenizer_agreement == 1
    found, expected = (
        transformers.AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "back", source)
    )
    text = "The fox  and naïve 1984\n</s>"
    assert dict(found(text)) == dict(expected(text))
