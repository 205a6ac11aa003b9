"""Checkpoints whose tensors are not those of the model that config.json describes."""

import json
import re

import pytest
import torch
import transformers
from click.testing import CliRunner
from helpers.models import assert_same_outputs, generative, token_ids
from helpers.tiny import make_inputs, save_tiny
from safetensors.torch import load_file, save_file

from mpoe_convert import MpoeError, Recipe, convert, plan, verify
from mpoe_convert.cli import main
from mpoe_convert.errors import CheckpointError
from mpoe_convert.source.architecture import Architecture
from mpoe_convert.source.wrappers import unwrap

SMALL = {"experts": 2, "bond_dim": 4, "noise": 0.0}

# Of a type: the config key that is made wrong, its value, a tensor whose shape shows it, and both shapes.
WRONG = {
    "gpt2": ("vocab_size", 44, "transformer.wte.weight", [40, 16], [44, 16]),
    "llama": ("intermediate_size", 28, "model.layers.0.mlp.down_proj.weight", [16, 24], [16, 28]),
    "bert": ("max_position_embeddings", 32, "bert.embeddings.position_embeddings.weight", [64, 16], [32, 16]),
    "t5": ("d_ff", 28, "decoder.block.0.layer.2.DenseReluDense.wi.weight", [24, 16], [28, 16]),
    "vit": (
        "num_channels",
        1,
        "vit.embeddings.patch_embeddings.projection.weight",
        [16, 3, 4, 4],
        [16, 1, 4, 4],
    ),
}


def save_wrong(model_type: str, folder):
    key, value, *_ = WRONG[model_type]
    save_tiny(model_type, generative(model_type), folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    assert key in config and config[key] != value
    path.write_text(json.dumps(config | {key: value}))
    return folder


@pytest.mark.parametrize("model_type", WRONG)
def test_tensor_shapes_and_config_key_are_named(model_type, tmp_path):
    folder = save_wrong(model_type, tmp_path / "dense")
    key, value, name, shape, expected = WRONG[model_type]
    told = (
        f"{name}.* has the shape {re.escape(str(shape))}, and config.json asks for {re.escape(str(expected))}"
    )
    with pytest.raises(CheckpointError, match=rf"{told} \(.*{key} = {value}.*\); correct config.json"):
        plan(Recipe(str(folder), experts=2, bond_dim=2))


def test_nothing_is_written(tmp_path):
    folder, out = save_wrong("llama", tmp_path / "dense"), tmp_path / "out"
    with pytest.raises(MpoeError):
        convert(Recipe(str(folder), experts=2, bond_dim=2), out)
    done = CliRunner().invoke(main, [str(folder), "--experts", "2", "--bond-dim", "2", "-o", str(out)])
    assert done.exit_code == 1 and "intermediate_size = 28" in done.stderr and not out.exists()


def test_names_of_older_checkpoints_are_compared_too(tmp_path):
    """Without the prefix of the head, as the first GPT-2 checkpoints have it."""
    folder = save_wrong("gpt2", tmp_path / "dense")
    path = folder / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"wte\.weight.*vocab_size = 44"):
        plan(Recipe(str(folder), experts=2, bond_dim=2))


def test_tensors_that_the_model_does_not_have_are_no_matter(tmp_path):
    folder = save_tiny("gpt2", "AutoModelForCausalLM", tmp_path / "dense")
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"h.0.attn.bias": torch.ones(3)}, path, metadata={"format": "pt"})
    assert plan(Recipe(str(folder), experts=2, bond_dim=2)).ffns


# --------------------------------------------------------------------------------------- names


def save_changed(model_type: str, folder, change, auto_class=None, variant=0, **config):
    """A checkpoint whose state dict went through `change`, with other values in config.json."""
    save_tiny(model_type, auto_class or generative(model_type), folder, variant)
    path = folder / "model.safetensors"
    state = {name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}
    save_file(state, path, metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def without(*parts: str):
    def change(state):
        kept = {name: tensor for name, tensor in state.items() if not any(part in name for part in parts)}
        assert len(kept) < len(state)
        return kept

    return change


def unchanged(state):
    return state


def refusal(folder, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        plan(Recipe(str(folder), experts=2, bond_dim=2, **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def warnings(folder) -> list[str]:
    return plan(Recipe(str(folder), experts=2, bond_dim=4)).warnings


@pytest.mark.parametrize("auto_class", ["AutoModelForCausalLM", "AutoModelForSequenceClassification"])
def test_what_is_missing_is_named(auto_class, tmp_path):
    lost = without("layers.1.self_attn.k_proj", "layers.0.input_layernorm")
    said = refusal(save_changed("llama", tmp_path / "dense", lost, auto_class))
    assert (
        "lacks 'model.layers.0.input_layernorm.weight', 'model.layers.1.self_attn.k_proj.weight' of Llama"
        in said
    )
    assert (
        "correct config.json, or fetch the files that belong together" in said
        and "without a head" not in said
    )


def test_what_is_there_instead_is_named(tmp_path):
    def change(state):
        return {name.replace("q_proj", "query"): tensor for name, tensor in state.items()}

    said = refusal(save_changed("llama", tmp_path / "dense", change))
    assert (
        "(it has 'model.layers.0.self_attn.query.weight', 'model.layers.1.self_attn.query.weight' inst"
        in said
    )


def test_all_that_does_not_fit_is_in_one_message(tmp_path):
    def change(state):
        return without("k_proj")(state) | {"lm_head.weight": torch.ones(66, 16)}

    said = refusal(save_changed("llama", tmp_path / "dense", change))
    assert (
        "lm_head.weight has the shape [66, 16], and config.json asks for [40, 16] (vocab_size = 40)" in said
    )
    assert "lacks 'model.layers.0.self_attn.k_proj.weight', 'model.layers.1.self_attn.k_proj.weight'" in said


@pytest.mark.parametrize(
    ("change", "auto_class", "named", "base"),
    [
        (without("lm_head"), "AutoModelForCausalLM", "LlamaForCausalLM", "LlamaModel"),
        (unchanged, "AutoModel", "LlamaForSequenceClassification", "LlamaModel"),
    ],
)
def test_a_missing_head_is_told_and_how_to_do_without(change, auto_class, named, base, tmp_path):
    folder = save_changed("llama", tmp_path / "dense", change, auto_class, architectures=[named])
    assert f'to convert the model without a head, write "architectures": ["{base}"] there' in refusal(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [base]}))
    assert not warnings(folder)


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "t5", "bart", "bert"])
def test_what_is_tied_is_not_missing(model_type, tmp_path):
    folder = save_tiny(model_type, generative(model_type), tmp_path / "dense")
    names = set(load_file(folder / "model.safetensors"))
    assert not any("lm_head.weight" in name or "predictions.decoder.weight" in name for name in names)
    assert not warnings(folder)


def test_what_the_stock_class_computes_itself_is_not_missing(tmp_path):
    """BART's head has a buffer of zeros in its state dict, which old checkpoints lack."""
    assert not warnings(save_changed("bart", tmp_path / "dense", without("final_logits_bias")))


def test_a_table_that_the_stock_class_computes_is_not_missing(tmp_path):
    """The first Pegasus checkpoints were saved without their sinusoidal positions."""
    folder = save_changed("pegasus", tmp_path / "dense", without("embed_positions"))
    report = convert(Recipe(str(folder), **SMALL), tmp_path / "out")
    assert not report.warnings
    dense = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    auto = transformers.AutoModelForSeq2SeqLM
    model = auto.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert_same_outputs(dense, model, make_inputs(dense, "AutoModelForSeq2SeqLM"))


def test_a_missing_pooler_is_a_warning(tmp_path):
    folder = save_changed("bert", tmp_path / "dense", without("pooler"), "AutoModel")
    [said] = warnings(folder)
    assert said.startswith(
        "the checkpoint lacks 'pooler.dense.bias', 'pooler.dense.weight': transformers fills"
    )


def test_tensors_of_another_head_are_no_matter(tmp_path):
    """As in bert-base-uncased: a masked model with a pooler and the head of next-sentence prediction."""
    folder = save_tiny("bert", "AutoModelForPreTraining", tmp_path / "dense")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["BertForMaskedLM"]}))
    assert "bert.pooler.dense.weight" in load_file(folder / "model.safetensors")
    assert not warnings(folder)


def test_a_head_may_lack_a_stack_that_the_checkpoint_has(tmp_path):
    folder = save_changed("t5", tmp_path / "dense", unchanged, architectures=["T5EncoderModel"])
    found = plan(Recipe(str(folder), experts=2, bond_dim=4))
    assert len(found.ffns) == 4 and not found.warnings


def test_a_head_of_one_stack_needs_its_own_embedding(tmp_path):
    """BART's whole checkpoint has one table, under a name that BartForCausalLM does not look for."""
    folder = save_changed("bart", tmp_path / "dense", unchanged, architectures=["BartForCausalLM"])
    _, info = transformers.BartForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert "lm_head.weight" in info["missing_keys"]
    assert "lacks 'lm_head.weight', 'model.decoder.embed_tokens.weight' of BartForCausalLM" in refusal(folder)


def test_tensors_of_no_head_are_told(tmp_path):
    def change(state):
        return state | {"v_head.summary.weight": torch.ones(1, 16)}

    [said] = warnings(save_changed("gpt2", tmp_path / "dense", change))
    assert said == "no gpt2 model with this config.json has 'v_head.summary.weight': copied, and not used."


def test_empty_tensors_are_told_as_those_of_zero3(tmp_path):
    def change(state):
        return {name: torch.empty(0) for name in state}

    said = refusal(save_changed("llama", tmp_path / "dense", change))
    assert "has the shape [0]" in said and "DeepSpeed's ZeRO-3" in said and "zero_to_fp32.py" in said


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_transposed_matrices_are_told(model_type, tmp_path):
    def change(state):
        return {name: t.T if ".mlp." in name and t.ndim == 2 else t for name, t in state.items()}

    said = refusal(save_changed(model_type, tmp_path / "dense", change))
    assert "they are transposed: save the weights as transformers does" in said


# ------------------------------------------------------------------------------------ wrappers


def wrapped(prefix: str, part: str = ""):
    """With a prefix, and a wrapper around each attention."""

    def change(state):
        return {prefix + name.replace("self_attn.", f"self_attn.{part}"): t for name, t in state.items()}

    return change


WRAPPERS = {
    "compiled": wrapped("_orig_mod."),
    "data parallel": wrapped("module."),
    "data parallel and compiled": wrapped("module._orig_mod."),
    "peft": wrapped("base_model.model."),
    "trl": wrapped("pretrained_model."),
    "fsdp": wrapped("_fsdp_wrapped_module.", "_fsdp_wrapped_module._checkpoint_wrapped_module."),
    "layers compiled": wrapped("", "_orig_mod."),
    "compiled twice": lambda state: {
        n.replace("mlp.", "mlp._orig_mod._orig_mod."): t for n, t in state.items()
    },
    "base layers": lambda state: {n.replace("q_proj.", "q_proj.base_layer."): t for n, t in state.items()},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_are_taken_off(wrapper, tmp_path):
    """The artifact is that of the plain checkpoint, to the bit."""
    plain = save_tiny("llama", "AutoModelForCausalLM", tmp_path / "plain")
    dense = save_changed("llama", tmp_path / "dense", WRAPPERS[wrapper])
    assert set(load_file(dense / "model.safetensors")) != set(load_file(plain / "model.safetensors"))
    reports = [convert(Recipe(str(each), **SMALL), tmp_path / f"{each.name}-out") for each in (plain, dense)]
    expected, found = (
        load_file(tmp_path / f"{name}-out" / "model.safetensors") for name in ("plain", "dense")
    )
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not reports[0].warnings
    [said] = reports[1].warnings
    assert "a trainer's wrapper of the model left '" in said and said.endswith("taken off.")


@pytest.mark.parametrize("wrapper", ["fsdp", "data parallel and compiled", "compiled twice"])
def test_a_wrapped_source_is_verified_and_calibrated_by_its_own_numbers(wrapper, tmp_path):
    dense = save_changed("llama", tmp_path / "dense", WRAPPERS[wrapper])
    batches = [{"input_ids": token_ids(2, 9, seed=seed)} for seed in range(4)]
    report = convert(Recipe(str(dense), max_error=1e-6, **SMALL), tmp_path / "out", calibration=batches)
    assert report.divergence.nats < 1e-5
    convert(Recipe(str(dense), **SMALL), tmp_path / "exact")
    assert verify(tmp_path / "exact").ok


def test_names_that_the_model_has_itself_stay(tmp_path):
    """A model whose own module has a wrapper's name."""
    own = {"module.layers.0.weight", "norm.weight"}

    class Architecture:
        is_custom = True
        model_class = None

        def build(self, cls):
            return torch.nn.ModuleDict(
                {"module": torch.nn.ModuleDict({"layers": torch.nn.Sequential(torch.nn.Linear(1, 1, False))})}
                | {"norm": torch.nn.Linear(1, 1, False)}
            )

    assert unwrap("m", Architecture(), own) is None
    assert unwrap("m", Architecture(), {f"_orig_mod.{name}" for name in own}).taken == {
        r"^_orig_mod\.": "_orig_mod."
    }


LORA = {"self_attn.q_proj.lora_A.default.weight": torch.ones(2, 16)}
ADAPTERS = {
    "as PEFT saves it": ("base_model.model.", "base layers", LORA),
    "of an older PEFT": ("base_model.model.", None, LORA),
    "its prefix taken off": ("", None, LORA),
    "of another method": ("", "base layers", {"self_attn.q_proj.hada_w1_a.default": torch.ones(2, 16)}),
    "a module trained whole": ("", None, {"input_layernorm.modules_to_save.default.weight": torch.ones(16)}),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_beside_its_model_is_refused(case, tmp_path):
    prefix, wrapper, adapter = ADAPTERS[case]

    def change(state):
        state = WRAPPERS[wrapper](state) if wrapper else state
        state |= {f"model.layers.0.{name}": tensor for name, tensor in adapter.items()}
        return {f"{prefix}{name}": tensor for name, tensor in state.items()}

    said = refusal(save_changed("llama", tmp_path / "dense", change))
    name = f"{prefix}model.layers.0.{next(iter(adapter))}"
    assert f"holds a model and a PEFT adapter beside it ('{name}'), expected a whole model: merge it" in said


def test_two_models_in_one_file_are_refused(tmp_path):
    def change(state):
        return state | {f"module.{name}": tensor.clone() for name, tensor in state.items()}

    said = refusal(save_changed("llama", tmp_path / "dense", change))
    assert "and 'module.lm_head.weight', two tensors for lm_head.weight; expected one model" in said


# -------------------------------------------------------------------------------------- biases

# Of a type with biases: the variant that stores them, and the config value that switches them off.
SWITCHED_OFF = {
    "llama": (1, {"mlp_bias": False}),
    "opt": (0, {"enable_bias": False}),
    "falcon": (0, {"bias": False}),
    "starcoder2": (0, {"use_bias": False}),
    "modernbert": (1, {"mlp_bias": False}),
}


@pytest.mark.parametrize("model_type", SWITCHED_OFF)
def test_biases_that_the_config_switches_off_are_left_out(model_type, tmp_path):
    """The stock class with that config is the oracle: it does not add them."""
    variant, config = SWITCHED_OFF[model_type]
    auto_class = generative(model_type)
    folder = save_changed(model_type, tmp_path / "dense", unchanged, variant=variant, **config)
    report = convert(Recipe(str(folder), **SMALL), tmp_path / "out")
    auto = getattr(transformers, auto_class)
    dense = auto.from_pretrained(folder).eval()
    model, info = auto.from_pretrained(tmp_path / "out", trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"]
    assert_same_outputs(dense, model.eval(), make_inputs(dense, auto_class))
    assert any(said.endswith(": left out.") and ".bias'" in said for said in report.warnings)
    assert not any(name.endswith(".bias") for ffn in report.plan.ffns for name in ffn.tensors)


def test_biases_that_the_config_asks_for_and_nobody_stored_are_missing(tmp_path):
    said = refusal(save_changed("llama", tmp_path / "dense", unchanged, mlp_bias=True))
    assert "lacks 'model.layers.0.mlp.down_proj.bias'" in said


MIXED = (
    ("module.transformer.wte.weight", "module._orig_mod.transformer.wpe.weight"),
    ("module.transformer.h.0._orig_mod.ln_1.weight", "_orig_mod.module.transformer.wte.weight"),
)


@pytest.mark.parametrize("names", MIXED)
def test_mixed_wrappers_are_taken_off_as_transformers_will(names):
    """Each pattern of the mapping applies once, in its order."""
    found = unwrap("it", Architecture({"model_type": "gpt2"}), names)
    for plain, name in found.stored_names.items():
        assert plain.startswith("transformer.") and "_orig_mod" not in plain
        for pattern in found.taken:
            name = re.sub(pattern, "", name, count=1)
        assert name == plain


def test_names_that_transformers_would_read_otherwise_are_refused():
    names = ("module.h.0.base_layer.weight", "module.base_layer.weight")
    with pytest.raises(
        CheckpointError, match="would load 'module.base_layer.weight' as 'weight'.*mix several"
    ):
        unwrap("it", Architecture({"model_type": "gpt2"}), names)
