"""Verification: inputs for every head, what `compare` sees, and which dense model is meant."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from helpers.artifacts import perturb
from helpers.models import HEADS
from helpers.tiny import make_config, make_model, save_tiny, save_tokenizer
from helpers.vocabularies import save_vocabulary
from safetensors.torch import load_file, save_file

from mpoe_convert import Export, Recipe, convert, export
from mpoe_convert.artifact import verify as verification
from mpoe_convert.artifact.fingerprint import weights_of
from mpoe_convert.artifact.layout import move_base_path
from mpoe_convert.artifact.verify import Verification, verify
from mpoe_convert.artifact.verify_child import (
    compare,
    damaged_outputs,
    encode,
    lacking,
    make_inputs,
    make_texts,
    run,
    worst,
)
from mpoe_convert.errors import HubError, VerifyError
from mpoe_convert.source.architecture import heads, main_auto_class
from mpoe_convert.source.families import FAMILY_OF


@pytest.mark.parametrize(("model_type", "auto_class"), HEADS)
def test_every_head_runs_and_a_change_of_any_output_shows(model_type, auto_class):
    model = make_model(model_type, auto_class)
    inputs, _ = make_inputs(model)
    outputs, tokens = run(model, inputs)
    assert outputs and (tokens is not None) == (model.can_generate() and "input_ids" in inputs)
    same = compare(outputs, outputs, tokens, tokens)
    assert same["relative_difference"] == same["max_difference"] == 0
    assert same["top1_agreement"] == (1 if any("logits" in name for name in outputs) else None)
    for name, tensor in outputs.items():
        changed = tensor.clone(memory_format=torch.contiguous_format)
        changed.view(-1)[-1] += tensor.norm()
        found = compare(outputs | {name: changed}, outputs, tokens, tokens)
        assert found["relative_difference"] == pytest.approx(1, rel=1e-4), name


def test_question_answering_compares_starts_and_ends():
    model = make_model("bert", "AutoModelForQuestionAnswering")
    assert run(model, make_inputs(model)[0])[0].keys() == {"start_logits", "end_logits"}


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_a_sequence_classifier_without_a_pad_token_takes_one_row(model_type):
    config = make_config(model_type)
    config.pad_token_id = None
    stock = getattr(transformers, heads(model_type)["AutoModelForSequenceClassification"])
    inputs, text = make_inputs(model := stock(config).eval())
    assert text == "1 x 48 random tokens"
    assert run(model, inputs)[0]["logits"].shape == (1, 2)


def test_rows_hold_one_end_token_each_at_their_end():
    inputs, _ = make_inputs(make_model("bart", "AutoModelForSequenceClassification"))
    assert ((inputs["input_ids"] == 2).nonzero()[:, 1] == 47).all()
    assert (inputs["input_ids"] == 2).sum() == 2


def test_nan_has_no_difference():
    expected = {"logits": torch.ones(2, 3)}
    found = compare({"logits": torch.full((2, 3), torch.nan)}, expected, None, None)
    assert found["relative_difference"] is found["max_difference"] is None
    fine = compare(expected, expected, None, None)
    assert worst([fine, found])["relative_difference"] is None and worst([fine])["relative_difference"] == 0


def test_infinities_at_the_same_places_are_equal():
    logits = torch.tensor([1.0, -torch.inf, 2.0])
    found = compare({"logits": logits}, {"logits": logits}, None, None)
    assert found["relative_difference"] == found["max_difference"] == 0
    assert damaged_outputs([({"logits": logits}, None)], [({"logits": logits}, None)]) == {}
    finite = torch.ones(3)
    assert damaged_outputs([({"logits": logits}, None)], [({"logits": finite}, None)])["logits"] == (
        pytest.approx(1 / 3)
    )


@pytest.mark.parametrize("model_type", FAMILY_OF)
def test_the_auto_class_of_the_card_loads_the_head_of_the_source(model_type):
    known = heads(model_type)
    for stock in known.values():
        assert known[main_auto_class({"architectures": [stock]}, model_type)] == stock


def test_among_several_auto_classes_the_plainest_is_named():
    for model_type, stock, auto in (
        ("bart", "BartForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        ("mbart", "MBartForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        ("t5", "T5ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        ("gpt2", "GPT2LMHeadModel", "AutoModelForCausalLM"),
        ("roberta", "RobertaForMaskedLM", "AutoModelForMaskedLM"),
        ("bert", "BertForPreTraining", "AutoModelForPreTraining"),
        ("bert", "BertModel", "AutoModel"),
    ):
        assert main_auto_class({"architectures": [stock]}, model_type) == auto


@pytest.fixture
def artifact(tmp_path, monkeypatch) -> Path:
    """An artifact whose report says that its base was downloaded as `dense`, beside a folder `dense`."""
    monkeypatch.chdir(tmp_path)
    save_tiny("gpt2", "AutoModelForCausalLM", Path("dense"))
    convert(Recipe("dense", experts=2, bond_dim=4, noise=0.0), "done")
    path = Path("done/conversion_report.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"revision": "0" * 40}))
    return Path("done")


def test_a_hub_id_is_not_looked_up_in_the_current_folder(artifact):
    with pytest.raises(HubError, match="^'dense' at revision 0* ?.*is not complete in the local cache"):
        verify(artifact)  # the Hub is offline in tests; the folder would have loaded


def test_against_takes_the_folder(artifact, monkeypatch):
    asked = []
    monkeypatch.setattr(verification, "_run_child", lambda request: asked.append(request) or STUB)
    monkeypatch.setattr(verification, "check_available", lambda model_id, revision: None)
    verify(artifact, against="dense")
    verify(artifact)
    assert [(r.against, r.revision) for r in asked] == [
        (str(Path("dense").resolve()), None),
        ("dense", "0" * 40),
    ]


def test_the_code_that_is_verified_cannot_import_this_package(artifact, own_process):
    with (artifact / "modeling_mpoe.py").open("a") as file:
        file.write("\nimport mpoe_convert\n")
    with pytest.raises(VerifyError, match="the artifact does not load or run: .*mpoe_convert"):
        verify(artifact, against="./dense")


# ---------------------------------------------------------------------------------------------------
# Checkpoints that lack what their class has


def save_without(model_type: str, folder: Path) -> Path:
    """A checkpoint that AutoModel loads with weights that it makes up, or without its decoder."""
    if model_type == "t5":
        transformers.T5EncoderModel(make_config("t5")).save_pretrained(folder)
        return folder
    stock = getattr(transformers, heads(model_type)["AutoModel"])
    torch.manual_seed(0)
    stock(make_config(model_type), add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model_type", ["bert", "roberta", "vit", "t5"])
def test_a_checkpoint_without_a_pooler_is_whole(model_type, tmp_path):
    """Both loads make a pooler up; the artifact is given the dense model's, so that all outputs compare."""
    source = save_without(model_type, tmp_path / "dense")
    convert(Recipe(str(source), experts=2, bond_dim=4, noise=0.0), tmp_path / "out")
    found = verify(tmp_path / "out")
    assert found.ok and found.relative_difference < 1e-5
    exported = export(tmp_path / "out", tmp_path / "dense-again", Export(to="dense"))
    assert exported.comparison is not None and exported.comparison.relative_difference < 1e-5
    with pytest.raises(VerifyError, match="missing or mismatched weights"):
        cut = tmp_path / "out/model.safetensors"
        tensors = load_file(cut)
        tensors.pop(next(name for name in tensors if "embed" in name or "shared" in name))
        save_file(tensors, cut, metadata={"format": "pt"})
        verify(tmp_path / "out")


def test_the_backbone_of_a_checkpoint_for_masked_tokens(tmp_path):
    folder = save_tiny("bert", "AutoModelForMaskedLM", tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]  # so that AutoModel is what loads it
    (folder / "config.json").write_text(json.dumps(config))
    convert(Recipe(str(folder), experts=2, bond_dim=4, noise=0.0), tmp_path / "out")
    found = verify(tmp_path / "out")
    assert found.ok and found.auto_class == "AutoModel"


def test_without_a_reference_layers_may_not_be_missing():
    missing = ["encoder.layer.0.mlp.up.bias", "pooler.dense.weight"]
    assert lacking(missing, None) == ["encoder.layer.0.mlp.up.bias"]
    assert lacking(missing, {}) == missing
    made_up = {name: torch.ones(1) for name in missing}  # a source that lacks layers is no model
    assert lacking(missing, made_up) == ["encoder.layer.0.mlp.up.bias"]


# ---------------------------------------------------------------------------------------------------
# Trained artifacts


@pytest.fixture
def trained(tmp_path) -> Path:
    """An artifact as `finetune` leaves it."""
    source = save_tiny("gpt2", "AutoModelForCausalLM", tmp_path / "dense")
    convert(Recipe(str(source), experts=2, bond_dim=4, noise=0.0), tmp_path / "out")
    perturb(tmp_path / "out")
    mark_trained(tmp_path / "out")
    return tmp_path / "out"


def mark_trained(folder: Path) -> None:
    (folder / "training_report.json").write_text(json.dumps({"steps": 3} | weights_of(folder)))


def test_of_a_trained_artifact_the_difference_is_information(trained):
    found = verify(trained)
    assert found.ok and found.trained and found.generates and found.problems() == []
    assert found.relative_difference > 0.01 and found.tolerance is None
    strict = verify(trained, tolerance=1e-4)
    assert not strict.ok and strict.problems() == ["the outputs do not agree."]
    (trained / "training_report.json").unlink()
    assert not verify(trained).ok  # nothing says that it was trained


def test_a_trained_artifact_outlives_its_dense_model(trained):
    shutil.rmtree(trained.parent / "dense")
    found = verify(trained)
    assert found.ok and found.relative_difference is None
    assert found.reference_error.startswith("the dense model ")  # in our words: no class of Python's
    assert "is not a folder here" in found.reference_error
    with pytest.raises(VerifyError, match="is not a folder here"):
        verify(trained, against=str(trained.parent / "dense"))
    assert "it could not be compared with" in verify(trained, tolerance=0.1).problems()[0]


def test_a_new_head_is_not_compared(trained):
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(trained, num_labels=3, trust_remote_code=True)
    model.save_pretrained(trained)
    mark_trained(trained)
    found = verify(trained)
    assert found.ok and found.auto_class == auto.__name__ and "score.weight" in found.reference_error
    with pytest.raises(VerifyError, match="cannot be compared with .*: its checkpoint lacks .*score.weight"):
        verify(trained, against=str(trained.parent / "dense"))


def test_training_may_bring_another_tokenizer(trained):
    save_vocabulary(trained.parent / "dense", "GPT2Tokenizer")
    save_tokenizer(trained)
    found = verify(trained)
    assert found.ok and found.tokenizer_agreement < 1


@pytest.mark.parametrize("was_trained", [True, False])
def test_nan_is_told_as_such(was_trained, trained):
    path = trained / "model.safetensors"
    tensors = load_file(path)
    tensors["transformer.h.1.mlp.router.weight"][0, 0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    mark_trained(trained) if was_trained else (trained / "training_report.json").unlink()
    found = verify(trained)
    assert not found.ok and found.relative_difference is None
    told = "\n".join(found.problems())
    assert "'transformer.h.1.mlp.router.weight' hold NaN or infinities." in told
    assert "it computes NaN or infinities: 100.0% of logits." in told and "agree" not in told
    page = printed(found).partition("in float32:")[2]
    assert "DAMAGED" in page and "nan" not in page and "e+308" not in page


def test_a_report_on_other_weights_or_experts_is_told(trained):
    path = trained / "model.safetensors"
    tensors = load_file(path)
    tensors["transformer.ln_f.bias"] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    report = json.loads((trained / "conversion_report.json").read_text())
    report["recipe"]["experts"], report["ffns"] = 5, ["h.0"]
    (trained / "conversion_report.json").write_text(json.dumps(report))
    found = verify(trained)
    assert not found.ok and found.problems() == [
        "config.json names 2 experts, conversion_report.json 5.",
        "config.json names the FFNs 'h.0', 'h.1', conversion_report.json 'h.0'.",
        "training_report.json is about other weights than those in the folder.",
    ]


def printed(result) -> str:
    from rich.console import Console

    from mpoe_convert.cli.tables import print_verification

    out = Console(record=True, width=200, file=io.StringIO())
    print_verification(result, out)
    return out.export_text()


def test_the_verdict_on_one_that_leaves_neurons_out_is_not_that_it_was_trained():
    outputs = dict(relative_difference=0.7, max_difference=5.0, top1_agreement=0.3, greedy_agreement=None)
    result = Verification("a", "b", "AutoModel", "M", "2 x 48", tolerance=None, trained=False, **outputs)
    last = printed(result).splitlines()[-1]
    assert last.endswith("agrees with its reports; it leaves out neurons of the dense model's FFNs.")


def test_the_verdict_on_a_trained_artifact(trained):
    lines = printed(verify(trained)).splitlines()
    assert lines[-1] == "OK: it loads, is finite, and agrees with its reports; it was trained since."
    assert any("allowed" in line and "any, for it was trained" in line for line in lines)


# ---------------------------------------------------------------------------------------------------
# Tokenizers


@pytest.mark.parametrize(
    ("model_type", "named", "kind"),
    [
        ("olmo2", "GPT2Tokenizer", "byte-level"),
        ("mistral", "LlamaTokenizer", "metaspace"),
    ],
)
def test_an_artifact_encodes_as_its_source_and_verification_sees_where_it_does_not(
    model_type, named, kind, tmp_path
):
    source = save_tiny(model_type, "AutoModelForCausalLM", tmp_path / "dense")
    save_vocabulary(source, named, kind)
    convert(Recipe(str(source), experts=2, bond_dim=4, noise=0.0), tmp_path / "out")
    found = verify(tmp_path / "out", tolerance=10.0)
    assert (found.tokenizer_agreement, found.tokenizer_difference, found.ok) == (1, None, True)
    save_vocabulary(tmp_path / "out", named, kind)  # as of the source, which is of another model type
    found = verify(tmp_path / "out", tolerance=10.0)
    assert found.tokenizer_agreement < 1 and found.tokenizer_difference and not found.ok
    ours, theirs = (
        transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        for folder in (tmp_path / "out", source)
    )
    assert encode(ours, found.tokenizer_difference) != encode(theirs, found.tokenizer_difference)


def test_without_a_tokenizer_none_is_compared(artifact):
    found = verify(artifact, against="./dense", tolerance=10.0)
    assert (found.tokenizer_agreement, found.tokenizer_difference, found.ok) == (None, None, True)


@pytest.fixture
def asked(monkeypatch) -> list:
    """What the verifying process is asked; it is not run."""
    found: list = []
    monkeypatch.setattr(verification, "_run_child", lambda request: found.append(request) or STUB)
    return found


def test_a_relative_base_is_found_from_anywhere(tmp_path, monkeypatch, asked):
    monkeypatch.chdir(tmp_path)
    save_tiny("gpt2", "AutoModelForCausalLM", Path("models/dense"))
    convert(Recipe("models/dense", experts=2, bond_dim=4), "out")
    assert str(tmp_path) not in Path("out/README.md").read_text()
    assert json.loads(Path("out/conversion_report.json").read_text())["base_path"] == "../models/dense"
    assert verify("out").against == "models/dense"
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "models/dense").mkdir(parents=True)  # not the one that was converted
    monkeypatch.chdir(elsewhere)
    assert verify("../out").against == str(tmp_path / "models/dense")
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("models", "out"):
        (tmp_path / name).rename(moved / name)
    assert verify(moved / "out").against == str(moved / "models/dense") == asked[-1].against
    (moved / "models/dense").rename(moved / "models/gone")
    monkeypatch.chdir(moved)
    with pytest.raises(VerifyError, match="models/dense' is not a folder here.* against"):
        verify("out")


def test_a_copy_of_a_report_points_to_the_same_base(tmp_path, artifact):
    copy = tmp_path / "deep/er/copy"
    copy.parent.mkdir(parents=True)
    shutil.copytree(artifact, copy)
    move_base_path(copy, artifact, copy)
    report = json.loads((copy / "conversion_report.json").read_text())
    assert (copy / report["base_path"]).samefile("dense")
    move_base_path(copy, tmp_path / "nowhere/else", copy)
    assert json.loads((copy / "conversion_report.json").read_text())["base_path"] is None


def test_a_tokenizer_that_is_damaged_is_told(artifact):
    save_vocabulary(Path("dense"), "GPT2Tokenizer")
    save_vocabulary(artifact, "GPT2Tokenizer")
    (artifact / "tokenizer.json").write_text("{")
    with pytest.raises(VerifyError, match="the tokenizer of the artifact does not load: .*Error"):
        verify(artifact, against="./dense")


def test_the_texts_are_the_same_ones_every_time_and_hold_the_tokens():
    texts = make_texts(["<x>"])
    assert texts == make_texts(["<x>"]) and 250 < len(texts) < 500
    assert {"<x>", "a<x>b", "<x><x>", "", "12345"} <= set(texts)


STUB = {
    "model_class": "M",
    "inputs": "",
    "relative_difference": 0.0,
    "max_difference": 0.0,
    "top1_agreement": None,
    "greedy_agreement": None,
    "damaged_weights": [],
    "damaged_outputs": {},
}


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [(0.01, "OK: the outputs agree."), (0.3, "OK: the outputs differ, and by no more"), (0.6, "DIFFERENT")],
)
def test_what_is_allowed_to_differ_is_not_said_to_agree(difference, verdict):
    from rich.console import Console

    from mpoe_convert.artifact.verify import Verification
    from mpoe_convert.cli.tables import print_verification

    out = Console(record=True, width=200, file=io.StringIO())
    print_verification(Verification("out", "dense", "A", "B", "ids", difference, 1.0, 0.5, 0.8, None), out)
    assert out.export_text().splitlines()[-1].startswith(verdict)


def test_tokenizers_that_differ_are_told():
    from rich.console import Console

    from mpoe_convert.artifact.verify import Verification
    from mpoe_convert.cli.tables import print_verification

    out = Console(record=True, width=200, file=io.StringIO())
    found = Verification("out", "dense", "A", "B", "ids", 0.0, 0.0, 0.5, 1.0, None, 0.5, "a [b]")
    print_verification(found, out)
    lines = out.export_text().splitlines()
    assert any("texts with the same token ids" in line and "50.0%" in line for line in lines)
    told = (
        "DIFFERENT: the tokenizers do not agree, for example on 'a [b]': convert again, or compare with the"
    )
    assert lines[-1] == f"{told} model that was converted."
    assert not found.ok


def test_a_mixture_without_tensors_is_told(artifact, tmp_path):
    """As many layers as the config says load, and the mixtures that it names are more."""
    folder = shutil.copytree(artifact, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    report = json.loads((folder / "conversion_report.json").read_text())
    assert [*verification._contradictions(folder, config, report, None)] == []
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".h.1." not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 1}))
    (told,) = verification._contradictions(folder, config | {"n_layer": 1}, report, None)
    assert "has no tensors of the mixtures that its config.json names (h.1)" in told
