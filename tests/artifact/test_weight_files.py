"""Weight files hold finite weights, or are not written."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpoe_convert import Export, export
from mpoe_convert.artifact.weight_files import save_shard
from mpoe_convert.errors import CheckpointError


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_refused(value, dtype, tmp_path):
    tensors = {"h.0.attn.c_attn.weight": torch.ones(3, 2, dtype=dtype), "count": torch.tensor([1])}
    tensors["h.0.attn.masked_bias"] = torch.tensor(value)  # a mask, of a buffer's name
    save_shard(tensors, tmp_path / "file.safetensors")
    assert load_file(tmp_path / "file.safetensors").keys() == tensors.keys()
    tensors["h.0.attn.c_attn.weight"][1, 1] = value
    with pytest.raises(CheckpointError, match=r"c_attn\.weight holds NaN or Inf in 1 of 6 places"):
        save_shard(tensors, tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()


@pytest.mark.parametrize("to", ["dense", "moe"])
def test_no_export_of_them_is_left(to, artifact, tmp_path):
    """Of an artifact with a norm that somebody destroyed."""
    _, out = artifact("llama")
    shutil.copytree(out, tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds NaN or Inf"):
        export(tmp_path / "source", tmp_path / "exported", Export(to=to, check=False))
    assert not (tmp_path / "exported").exists()
