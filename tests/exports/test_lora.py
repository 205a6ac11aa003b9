"""Low-rank experts as PEFT adapters: base and adapter compute what the expert's own dense export does."""

import json
import shutil

import peft
import pytest
import torch
import transformers
from helpers.artifacts import perturb
from helpers.models import generative
from helpers.models import stored as weights
from helpers.tiny import make_inputs, outputs, save_tiny

from mpoe_convert import Export, Recipe, convert, export
from mpoe_convert.artifact.reader import open_artifact
from mpoe_convert.errors import ExportError

# PEFT asks transformers under an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LORA = Export(to="lora", check=False)
LOW_RANK = {"kind": "low-rank", "experts": 3, "bond_dim": 4}
CASES = {
    "gpt2": {},
    "gpt2, own biases": {"bias": "per-expert"},
    "gpt2, compressed": {"keep": 0.9, "bond_dim": 1},
    "gpt2, one layer": {"layers": "1"},
    "llama": {},
    "phi3": {},
    "t5": {},
    "bert": {},
    "vit": {},
    "albert": {},
    "gpt2, core-space": {"kind": "core-space"},
    "phi3, core-space": {"kind": "core-space"},
}


def converted(case: str, folder):
    model_type = case.split(",")[0]
    dense = save_tiny(model_type, generative(model_type), folder / "dense")
    convert(Recipe(str(dense), **LOW_RANK | CASES[case]), folder / "out")
    return getattr(transformers, generative(model_type)), dense, folder / "out"


@pytest.mark.parametrize("case", CASES)
def test_base_and_adapter_compute_what_the_expert_does(case, tmp_path):
    auto, dense, out = converted(case, tmp_path)
    perturb(out)
    export(out, tmp_path / "lora", LORA)
    inputs = make_inputs(auto.from_pretrained(dense), generative(case.split(",")[0]))
    model = auto.from_pretrained(tmp_path / "lora" / "base").eval()
    shared = outputs(model, inputs)["logits"]
    for expert in (0, 2):
        export(out, tmp_path / str(expert), Export(expert=expert, check=False))
        expected = outputs(auto.from_pretrained(tmp_path / str(expert)).eval(), inputs)["logits"]
        folder, name = str(tmp_path / "lora" / f"expert-{expert}"), f"expert-{expert}"
        if expert == 0:
            model = peft.PeftModel.from_pretrained(model, folder, adapter_name=name)
        else:
            model.load_adapter(folder, adapter_name=name)
        model.set_adapter(name)
        scale = expected.abs().max()
        torch.testing.assert_close(outputs(model, inputs)["logits"], expected, rtol=0, atol=2e-5 * scale)
        assert (expected - shared).abs().max() > 1e-3 * scale
    if case != "albert":  # whose layers share their modules
        merged = outputs(model.eval().merge_and_unload(), inputs)["logits"]
        torch.testing.assert_close(merged, expected, rtol=0, atol=2e-5 * scale)


def test_the_adapter_touches_the_converted_layers_alone(tmp_path):
    """BERT's attention has an output.dense as well, GPT-2's a c_proj."""
    for case, count in (("bert", 4), ("gpt2, one layer", 2)):
        auto, _, out = converted(case, tmp_path / case)
        export(out, tmp_path / case / "lora", LORA)
        model = auto.from_pretrained(tmp_path / case / "lora" / "base")
        model = peft.PeftModel.from_pretrained(model, str(tmp_path / case / "lora" / "expert-0"))
        touched = {name for name, _ in model.named_parameters() if "lora_A" in name}
        assert len(touched) == count and not any(
            ".attention." in name or ".attn." in name for name in touched
        )


def test_a_base_that_is_still_right_is_named(tmp_path):
    _, dense, out = converted("gpt2", tmp_path)
    report = export(out, tmp_path / "lora", Export(to="lora", base=str(dense), check=False))
    assert not (tmp_path / "lora" / "base").exists() and "expert-2/adapter_model.safetensors" in report.files
    config = json.loads((tmp_path / "lora" / "expert-1" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(dense)
    peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora" / "expert-1")
    saved = transformers.AutoModel.from_pretrained(dense)  # names without "transformer."
    saved.save_pretrained(tmp_path / "headless")
    export(out, tmp_path / "again", Export(to="lora", base=str(tmp_path / "headless"), check=False))
    perturb(out)
    with pytest.raises(ExportError, match="mlp.c_fc.weight differs from that of '.*dense': .* omit base"):
        export(out, tmp_path / "wrong", Export(to="lora", base=str(dense), check=False))


def test_the_base_is_what_the_experts_share(tmp_path):
    _, dense, out = converted("llama", tmp_path)
    export(out, tmp_path / "lora", LORA)
    before, after = weights(dense), weights(tmp_path / "lora" / "base")
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize("kind", ["mpo", "dense", "adapter"])
def test_experts_that_are_no_low_rank_additions(kind, artifact, tmp_path):
    _, out = artifact("gpt2", kind=kind)
    with pytest.raises(ExportError, match=f"of kind {kind}, not low-rank additions .* to='dense' writes one"):
        export(out, tmp_path / "lora", LORA)


def test_an_export_is_replaced_as_a_whole(tmp_path):
    _, _, out = converted("gpt2", tmp_path)
    export(out, tmp_path / "lora", LORA)
    export(out, tmp_path / "lora", Export(check=False), overwrite=True)
    assert not (tmp_path / "lora" / "base").exists()
    assert open_artifact(str(out)).num_experts == 3
    shutil.rmtree(tmp_path / "lora")
