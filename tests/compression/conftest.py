"""A tiny model to calibrate."""

import pytest
import transformers
from helpers.calibration import batches_for
from helpers.tiny import save_tiny, save_tokenizer

from mpoe_convert import Recipe
from mpoe_convert.planning.plan import plan_checkpoint
from mpoe_convert.source.checkpoint import open_checkpoint


@pytest.fixture
def llama(tmp_path):
    """(folder, checkpoint, plan, batches) of a tiny Llama."""
    folder = save_tiny("llama", "AutoModelForCausalLM", tmp_path / "dense")
    save_tokenizer(folder)
    checkpoint = open_checkpoint(str(folder))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    planned = plan_checkpoint(Recipe(str(folder), bond_dim=4), checkpoint)
    return folder, checkpoint, planned, batches_for(model, "AutoModelForCausalLM")
