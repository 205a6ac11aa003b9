"""The dense export: the inverse of a conversion, for every family, kind and layout."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner
from helpers.artifacts import perturb
from helpers.data import words
from helpers.models import VARIANT_CASES, generative
from helpers.tiny import make_inputs, outputs, save_tiny, save_tokenizer
from safetensors.torch import load_file, save_file

from mpoe_convert import Export, Recipe, convert, export
from mpoe_convert.artifact.reader import open_artifact
from mpoe_convert.cli import main
from mpoe_convert.compression.batches import make_batches
from mpoe_convert.errors import CheckpointError, ExportError, FamilyError, OutputError, RequestError
from mpoe_convert.runtime.modeling_mpoe import FORMAT_VERSION
from mpoe_convert.source.families import FAMILY_OF

UNCHECKED = Export(check=False)
EXACT = {"gauge": "identity", "noise": 0.0, "experts": 3, "bond_dim": 4}
KINDS = {
    "one-sided": {},
    "blocks": {"layout": "blocks"},
    "blocks, compressed": {"layout": "blocks", "keep": 0.95, "bond_dim": 2},
    "two-sided": {"layout": "two-sided"},
    "five sites": {"sites": 5},
    "truncated": {"layout": "balanced", "bond_dim": 6},
    "compressed": {"keep": 0.9},
    "dense": {"kind": "dense"},
    "low-rank": {"kind": "low-rank"},
    "core-space": {"kind": "core-space"},
    "low-rank, compressed": {
        "kind": "low-rank",
        "keep": 0.9,
        "bond_dim": 1,
        "bias": "per-expert",
    },
    "own biases": {"bias": "per-expert"},
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def through_one_expert(model, expert: int) -> None:
    """Route every token to one expert, whatever the router says."""

    def choose(router, args, routing):
        tokens = torch.arange(len(routing.logits))
        experts, weights = torch.full_like(tokens, expert), torch.ones(len(tokens))
        return routing._replace(choices=type(routing.choices)(tokens, experts, weights, per_token=1))

    for _, ffn in model.mixtures():
        ffn.router.register_forward_hook(choose)


@pytest.mark.parametrize("model_type", FAMILY_OF)
def test_identity_gauge_gives_the_dense_checkpoint_back_to_the_bit(model_type, tmp_path):
    dense = save_tiny(model_type, generative(model_type), tmp_path / "dense")
    convert(Recipe(str(dense), **EXACT), tmp_path / "out")
    export(tmp_path / "out", tmp_path / "back", UNCHECKED)
    before, after = weights(dense), weights(tmp_path / "back")
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (dense, tmp_path / "back")]
    assert configs[0] == configs[1]
    assert not list((tmp_path / "back").glob("*.py"))


@pytest.mark.parametrize(("model_type", "variant"), [case for case in VARIANT_CASES if case[1]])
def test_variants_come_back_to_rounding(model_type, variant, tmp_path):
    dense = save_tiny(model_type, generative(model_type), tmp_path / "dense", variant)
    convert(Recipe(str(dense), noise=0.0, experts=3, bond_dim=4), tmp_path / "out")
    export(tmp_path / "out", tmp_path / "back", UNCHECKED)
    before, after = weights(dense), weights(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=2e-6, msg=name)


@pytest.mark.parametrize(
    ("model_type", "kind"), [*(("gpt2", kind) for kind in KINDS), ("phi3", "one-sided"), ("phi3", "low-rank")]
)
def test_an_expert_computes_what_it_does_in_the_mixture(model_type, kind, tmp_path):
    """Of trained experts, no two of them alike."""
    auto = getattr(transformers, generative(model_type))
    dense = save_tiny(model_type, generative(model_type), tmp_path / "dense")
    convert(Recipe(str(dense), **{"experts": 3, "bond_dim": 4} | KINDS[kind]), tmp_path / "out")
    perturb(tmp_path / "out")
    export(tmp_path / "out", tmp_path / "back", Export(expert=2, check=False))
    model = auto.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    found = auto.from_pretrained(tmp_path / "back").eval()
    inputs = make_inputs(found, generative(model_type))
    through_one_expert(model, 2)
    expected = outputs(model, inputs)["logits"]
    torch.testing.assert_close(
        outputs(found, inputs)["logits"], expected, rtol=0, atol=2e-5 * expected.abs().max()
    )
    other = auto.from_pretrained(dense).eval()
    assert (outputs(other, inputs)["logits"] - expected).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_rounded_once(dtype, tmp_path):
    """The matrix is the product of the stored cores in float32, rounded to the stored dtype."""
    dense = save_tiny("gpt2", "AutoModelForCausalLM", tmp_path / "dense")
    convert(Recipe(str(dense), experts=3, bond_dim=4, dtype=dtype, layout="one-sided"), tmp_path / "out")
    export(tmp_path / "out", tmp_path / "back", Export(expert=1, check=False))
    cores, found = weights(tmp_path / "out"), weights(tmp_path / "back")
    left, centre, right = (
        cores[f"transformer.h.0.mlp.up.terms.0.{core}"] for core in ("aux_0", "central_1", "aux_2")
    )
    left, right = left[1].double(), right[1].double()
    bond = left.shape[-1]
    # W[(i j), (o q)] = sum L[i, a] C[(a j), (o b)] R[b, q]
    centre = centre.double().reshape(bond, 16 // bond, 24 // bond, bond)
    expected = torch.einsum("ia,ajob,bq->ijoq", left, centre, right).reshape(16, 24)
    weight = found["transformer.h.0.mlp.c_fc.weight"]
    assert weight.dtype == getattr(torch, dtype)
    spacing = torch.finfo(weight.dtype).eps * expected.abs()
    assert ((weight.double() - expected).abs() <= 0.51 * spacing + 1e-6).all()


def test_the_average_is_that_of_the_matrices(tmp_path, artifact):
    _, source = artifact("llama")
    out = shutil.copytree(source, tmp_path / "out")
    perturb(out)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{3 + i * i % 30}" for i in range(600)))
    request = Export(calibrate=(str(text),), calibration_tokens=400, check=False)
    report = export(out, tmp_path / "average", request)
    singles = []
    for expert in range(3):
        export(out, tmp_path / str(expert), Export(expert=expert, check=False))
        singles.append(weights(tmp_path / str(expert)))
    found = weights(tmp_path / "average")
    for layer, shares in report.expert_shares.items():
        assert sum(shares.values()) == pytest.approx(1) and max(shares.values()) > 0.4
        for name in ("gate_proj", "up_proj", "down_proj"):
            key = f"model.{layer}.mlp.{name}.weight"
            expected = sum(shares[e] * singles[e][key] for e in range(3))
            torch.testing.assert_close(found[key], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("model_type", "way"), [("llama", "renormalised"), ("t5", "raw")])
def test_experts_count_as_much_in_the_average_as_routers_let_them(model_type, way, artifact, tmp_path):
    """From the router logits that the model itself returns; padding is no token."""
    _, source = artifact(model_type)
    out = shutil.copytree(source, tmp_path / "out")
    perturb(out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"router_combine": way}))
    rows = [{"text": words(5 + seed % 40, seed), "target": words(4 + seed % 7, seed)} for seed in range(120)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    request = Export(calibrate=(str(tmp_path / "rows.jsonl"),), calibration_tokens=1800, check=False)
    shares = export(out, tmp_path / "average", request).expert_shares

    model = getattr(transformers, generative(model_type)).from_pretrained(out, trust_remote_code=True).eval()
    opened = open_artifact(str(out))
    totals = dict.fromkeys(shares, 0.0)
    paths = [path.removesuffix(f".{opened.family.slot}") for path, _ in model.mixtures()]
    batches = make_batches(request, replace(opened.checkpoint, config=opened.config))
    assert model_type == "llama" or any((batch["attention_mask"] == 0).any() for batch in batches)
    for batch in batches:
        with torch.no_grad():
            found = model(**batch, output_router_logits=True).router_logits
        for path, logits in zip(paths, found, strict=True):
            odds = logits.double().softmax(-1)
            odds[odds < odds.topk(2).values[:, 1:]] = 0
            odds = odds if way == "raw" else odds / odds.sum(-1, keepdim=True)
            real = torch.ones(len(odds), dtype=torch.bool)
            if "labels" in batch:
                mask = batch["labels"] != -100 if path.startswith("decoder") else batch["attention_mask"] == 1
                real = mask.flatten()
            totals[path] += odds[real].sum(0)
    assert shares.keys() == set(paths) and max(max(each.values()) for each in shares.values()) > 0.36
    for path, total in totals.items():
        expected = total / total.sum()
        assert list(shares[path].values()) == pytest.approx(expected.tolist(), abs=1e-6), path


def test_a_partly_converted_model_keeps_the_rest(tmp_path):
    dense = save_tiny("gpt2", "AutoModelForCausalLM", tmp_path / "dense")
    convert(Recipe(str(dense), **EXACT, layers="1"), tmp_path / "out")
    assert open_artifact(str(tmp_path / "out")).kept_dense == ("h.0",)
    export(tmp_path / "out", tmp_path / "back", UNCHECKED)
    before, after = weights(dense), weights(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def test_a_model_saved_by_transformers_is_an_artifact_too(tmp_path, artifact):
    """Other shards, other names of nothing, no conversion report; another head."""
    dense, out = artifact("bert", auto_class="AutoModelForMaskedLM")
    head = transformers.AutoModelForSequenceClassification
    model = head.from_pretrained(out, trust_remote_code=True)
    model.save_pretrained(tmp_path / "saved", max_shard_size="3kB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    export(tmp_path / "saved", tmp_path / "back", Export(check=False, max_shard_size="2kB"))
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    found, info = head.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert type(found).__name__ == "BertForSequenceClassification" and not any(info.values())
    inputs = make_inputs(found, "AutoModelForSequenceClassification")
    expected, logits = outputs(model.eval(), inputs)["logits"], outputs(found.eval(), inputs)["logits"]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_an_architecture_given_by_hand(tmp_path):
    dense = save_tiny("seed_oss", "AutoModelForCausalLM", tmp_path / "dense")
    by_hand = "layers.{}.mlp:gate_proj,up_proj,down_proj"
    convert(Recipe(str(dense), **EXACT, ffn=by_hand), tmp_path / "out")
    export(tmp_path / "out", tmp_path / "back", UNCHECKED)
    before, after = weights(dense), weights(tmp_path / "back")
    assert all(torch.equal(before[name], after[name]) for name in before)
    (tmp_path / "out" / "conversion_report.json").unlink()
    with pytest.raises(FamilyError, match="seed_oss is not in the table of families.*report"):
        export(tmp_path / "out", tmp_path / "again", UNCHECKED)


def test_adapters_that_add_nothing_are_left_out_and_others_refused(tmp_path):
    dense = save_tiny("gpt2", "AutoModelForCausalLM", tmp_path / "dense")
    convert(Recipe(str(dense), kind="adapter", experts=3, bond_dim=4), tmp_path / "out")
    export(tmp_path / "out", tmp_path / "back", Export(expert=1, check=False))
    before, after = weights(dense), weights(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["transformer.h.1.mlp.adapter.aux_1"][1, 0, 0] = 1
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    export(tmp_path / "out", tmp_path / "expert-0", UNCHECKED)
    with pytest.raises(
        ExportError, match=r"transformer.h.1.mlp are adapters that have been trained: .* no matrix"
    ):
        export(tmp_path / "out", tmp_path / "expert-1", Export(expert=1, check=False))
    assert not (tmp_path / "expert-1").exists()


def test_companions_and_card(tmp_path):
    dense = save_tiny("gpt2", "AutoModelForCausalLM", tmp_path / "dense")
    save_tokenizer(dense)
    (dense / "LICENSE").write_text("words")
    (dense / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# dense\n")
    convert(Recipe(str(dense), experts=2, bond_dim=4), tmp_path / "out")
    report = export(tmp_path / "out", tmp_path / "back", UNCHECKED)
    back = tmp_path / "back"
    for name in ("LICENSE", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (back / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    card = (back / "README.md").read_text()
    assert "license: mit" in card and "language: en" in card and "expert 0" in card
    assert "trust_remote_code" not in card
    assert set(report.files) == {p.name for p in back.iterdir()}
    assert json.loads((back / "export_report.json").read_text()) == json.loads(json.dumps(report.to_json()))
    transformers.AutoTokenizer.from_pretrained(back)


def test_what_is_there_is_replaced_only_if_it_is_ours_and_only_when_asked(tmp_path, artifact):
    _, out = artifact("gpt2")
    back = tmp_path / "back"
    export(out, back, UNCHECKED)
    with pytest.raises(OutputError, match="already holds an export; pass overwrite=True"):
        export(out, back, UNCHECKED)
    export(out, back, Export(expert=1, check=False), overwrite=True)
    assert "expert 1" in (back / "README.md").read_text()
    (back / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="also holds 'notes.txt'"):
        export(out, back, UNCHECKED, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty and not an artifact"):
        export(out, tmp_path / "mine", UNCHECKED, overwrite=True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"expert": 3}, "expert is 3; .* has 3, expected 0 to 2"),
        ({"expert": 1, "calibrate": "builtin"}, "expert and calibrate given"),
        ({"base": "gpt2"}, "base given with to='dense'; expected with to='lora' only"),
        ({"calibrate": "builtin", "calibration_tokens": 0}, "calibration_tokens is 0; expected a whole"),
        ({"calibration_tokens": 10}, "calibration_tokens given without calibrate"),
        ({"to": "gguf"}, "to is 'gguf'; expected one of dense"),
    ],
)
def test_requests_that_contradict_themselves(wrong, message, artifact, tmp_path):
    _, out = artifact("gpt2")
    with pytest.raises(RequestError, match=message):
        export(out, tmp_path / "back", Export(**wrong, check=False))


def test_what_is_no_artifact(tiny_gpt2, artifact, tmp_path):
    with pytest.raises(CheckpointError, match="describes no converted model .*'gpt2', no mpoe block"):
        export(tiny_gpt2, tmp_path / "back", UNCHECKED)
    _, source = artifact("gpt2")
    out = shutil.copytree(source, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    config["mpoe"]["format"] = FORMAT_VERSION + 1
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="format 2 of the mpoe block, expected 1"):
        export(out, tmp_path / "back", UNCHECKED)
    tensors = load_file(out / "model.safetensors")
    core = tensors.pop("transformer.h.1.mlp.down.terms.0.aux_2")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config["mpoe"] |= {"format": FORMAT_VERSION}
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"mlp.down.terms.0.aux_2 is missing, expected \[3, 16, 1\]"):
        export(out, tmp_path / "back", UNCHECKED)
    tensors["transformer.h.1.mlp.down.terms.0.aux_2"] = core[:2].clone()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"aux_2 has the shape \[2, 16, 1\], expected \[3, 16, 1\]"):
        export(out, tmp_path / "back", UNCHECKED)
    config["mpoe"]["ffns"] |= {"h.2": 0}
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"no tensors of the mixtures .*\(h.2\)"):
        export(out, tmp_path / "back", UNCHECKED)


def test_what_computes_something_else_is_not_kept(artifact, tmp_path, monkeypatch):
    """A fresh process loads both; the one that is right runs in README.md."""
    from mpoe_convert.exports.targets import dense

    right = dense.weight
    monkeypatch.setattr(dense, "weight", lambda *arguments: 1.01 * right(*arguments))
    _, out = artifact("gpt2")
    done = CliRunner().invoke(main, ["export", str(out), "-o", str(tmp_path / "wrong")])
    assert done.exit_code == 1 and not (tmp_path / "wrong").exists()
    assert "does not compute what the artifact does: the outputs differ by a relative 0.0" in done.stderr
