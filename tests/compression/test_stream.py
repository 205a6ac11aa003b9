"""The dense model, read from disk block by block."""

import pytest
import torch
import transformers
from helpers.calibration import CPU, batches_for
from helpers.models import generative
from helpers.tiny import save_tiny

from mpoe_convert import Recipe
from mpoe_convert.compression.dense_run import DenseRun
from mpoe_convert.compression.stream import run_batch
from mpoe_convert.planning.plan import plan_checkpoint
from mpoe_convert.source.checkpoint import open_checkpoint


def test_layers_that_stay_dense_are_read_block_by_block_too(llama, monkeypatch):
    folder, checkpoint, _, _ = llama
    planned = plan_checkpoint(Recipe(str(folder), bond_dim=4, layers="0"), checkpoint)
    with DenseRun(planned, checkpoint, (), CPU).streamed() as model:
        layers = [all(p.is_meta for p in layer.parameters()) for layer in model.model.layers]
    assert layers == [True, True]


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "t5", "bart"])
def test_nothing_is_cached_for_generation(model_type, tmp_path):
    auto_class = generative(model_type)
    folder = save_tiny(model_type, auto_class, tmp_path / "dense")
    checkpoint = open_checkpoint(str(folder))
    stock = getattr(transformers, auto_class).from_pretrained(folder)
    batch = batches_for(stock, auto_class)[0]
    assert stock(**batch).get("past_key_values") is not None
    planned = plan_checkpoint(Recipe(str(folder), bond_dim=4), checkpoint)
    with DenseRun(planned, checkpoint, (), CPU).streamed() as model, torch.no_grad():
        assert run_batch(model, batch).get("past_key_values") is None
