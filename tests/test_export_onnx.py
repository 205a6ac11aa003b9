"""The ONNX export: onnxruntime computes from the file what the model does, for sizes that were not traced."""

import numpy
import pytest
import torch
import transformers
from test_export_dense import perturb

from mpoe_convert import Export, export
from mpoe_convert.errors import ExportError


@pytest.mark.slow
def test_onnxruntime_computes_what_the_model_does(artifact, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    _, out = artifact("llama", noise=0.5, bond_dim=8)
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


@pytest.mark.parametrize("layout", ["two-sided", "balanced"])
def test_experts_that_it_does_not_carry(layout, artifact, tmp_path):
    _, out = artifact("gpt2", layout=layout)
    with pytest.raises(ExportError, match="cores that cannot act .*no ONNX function for aten.sort.stable"):
        export(out, tmp_path / "graph", Export(to="onnx"))
    assert not (tmp_path / "graph").exists()
