"""Checkpoints whose tensors contradict their config.json are refused before anything is written."""

import json
import re

import pytest
import torch
from click.testing import CliRunner
from helpers.models import generative
from helpers.tiny import save_tiny
from safetensors.torch import load_file, save_file

from mpoe_convert import MpoeError, Recipe, convert, plan
from mpoe_convert.cli import main
from mpoe_convert.errors import CheckpointError

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
