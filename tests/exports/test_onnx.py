"""The ONNX export: onnxruntime computes from the file what the model does, for sizes that were not traced."""

import json
from dataclasses import replace

import numpy
import pytest
import torch
import transformers
from helpers.artifacts import perturb
from safetensors.torch import load_file

from mpoe_convert import Export, export
from mpoe_convert.artifact.reader import open_artifact
from mpoe_convert.errors import ExportError
from mpoe_convert.exports.targets import onnx


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"bond_dim": 8},
        {"experts": 3, "bond_dim": "8/2/4"},
        {"kind": "split", "experts": 3, "top_k": 2, "shared_experts": 1},
    ],
    ids=str,
)
def test_onnxruntime_computes_what_the_model_does(options, artifact, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    _, out = artifact("llama", noise=0.5, **options)
    perturb(out)
    report = export(out, tmp_path / "graph", Export(to="onnx"))
    assert report.comparison.relative_difference < 1e-5 and report.comparison.top1_agreement == 1
    assert {"model.onnx", "config.json", "tokenizer.json"} <= set(report.files)
    session = onnxruntime.InferenceSession(tmp_path / "graph" / "model.onnx")
    model = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
    for shape in ((1, 1), (3, 33)):
        ids = torch.randint(3, 40, shape, generator=torch.Generator().manual_seed(0))
        mask = numpy.ones(shape, dtype=numpy.int64)
        (found,) = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask})
        with torch.no_grad():
            expected = model(ids).logits
        torch.testing.assert_close(
            torch.from_numpy(found), expected, rtol=0, atol=1e-5 * expected.abs().max()
        )


def test_room_is_asked_for_float32_whatever_the_artifact_is(artifact, tmp_path, monkeypatch):
    _, out = artifact("gpt2", dtype="bfloat16")
    asked = []
    monkeypatch.setattr("mpoe_convert.exports.export.check_space", lambda output, size: asked.append(size))
    monkeypatch.setattr(onnx, "_write", lambda source, check, folder: None)
    monkeypatch.setattr(onnx, "NEEDS", {})
    export(out, tmp_path / "graph", Export(to="onnx", check=False))
    assert asked == [4 * sum(tensor.numel() for tensor in load_file(out / "model.safetensors").values())]


def test_experts_that_own_too_much_each(artifact, tmp_path):
    """A mixture copies cores for every token while they are small, and sorts the tokens else."""
    _, out = artifact("gpt2", kind="dense")
    source = open_artifact(str(out))
    assert onnx.plan(source, Export(to="onnx"), None, tmp_path).library == "onnx"
    form = json.loads(json.dumps(source.mixtures[0].form))
    for term in (*form["up"]["terms"], *form["down"]["terms"]):
        term["in_dims"] = [64 * size for size in term["in_dims"]]
        term["out_dims"] = [64 * size for size in term["out_dims"]]
    wide = replace(source, mixtures=(replace(source.mixtures[0], form=form),))
    with pytest.raises(ExportError, match="own too much each, so that tokens are sorted by expert"):
        onnx.plan(wide, Export(to="onnx"), None, tmp_path)


@pytest.mark.parametrize("layout", ["two-sided", "balanced"])
def test_experts_that_it_does_not_carry(layout, artifact, tmp_path):
    _, out = artifact("gpt2", layout=layout)
    with pytest.raises(ExportError, match="cores that cannot act .*no ONNX function for aten.sort.stable"):
        export(out, tmp_path / "graph", Export(to="onnx"))
    assert not (tmp_path / "graph").exists()
