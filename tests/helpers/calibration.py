"""Batches to calibrate on, and models converted with them."""

import torch
import transformers

from helpers.models import MODEL_TYPES, generative
from helpers.tiny import VOCAB, make_inputs, save_tiny
from mpoe_convert import Recipe, convert
from mpoe_convert.compression.calibrate import calibrate
from mpoe_convert.compression.dense_run import DenseRun
from mpoe_convert.planning.plan import Plan
from mpoe_convert.planning.planner import plan_checkpoint
from mpoe_convert.planning.resolve import resolve_recipe
from mpoe_convert.source.checkpoint import Checkpoint
from mpoe_convert.source.families import FAMILIES

# One type per way of building a layer.
ONE_OF_EACH = [row.model_types[0] for row in FAMILIES if row.model_types[0] in MODEL_TYPES]
CPU = torch.device("cpu")


def calibrated(planned, checkpoint, batches, **options):
    """The moments of a plan's FFNs on batches; options as for `calibrate`."""
    return calibrate(DenseRun(planned, checkpoint, tuple(batches), CPU), **options)


def batches_for(model, auto_class, count=4):
    """Batches that differ, with padding where the model takes a mask."""
    first = make_inputs(model, auto_class)
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(100 + seed)
        batch = dict(first)
        for name in ("input_ids", "decoder_input_ids"):
            if name in batch:
                batch[name] = torch.randint(3, VOCAB, batch[name].shape, generator=generator)
        if "pixel_values" in batch:
            batch["pixel_values"] = torch.randn(batch["pixel_values"].shape, generator=generator)
        else:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["attention_mask"][0, -3:] = 0
        found.append(batch)
    return found


def pair(model_type, tmp_path, **recipe):
    """(stock model, converted one, report) of a tiny model, calibrated on random inputs."""
    auto_class = generative(model_type)
    folder = save_tiny(model_type, auto_class, tmp_path / "dense")
    dense = getattr(transformers, auto_class).from_pretrained(folder).eval()
    recipe = {"experts": 2, "bond_dim": 2, "noise": 0.0} | recipe
    batches = None if recipe.get("metric") == "weights" else batches_for(dense, auto_class, 6)
    report = convert(Recipe(str(folder), **recipe), tmp_path / "out", calibration=batches)
    options = {"trust_remote_code": True}
    made = getattr(transformers, auto_class).from_pretrained(tmp_path / "out", **options).eval()
    return dense, made, report


def plan_whole(recipe: Recipe, checkpoint: Checkpoint) -> Plan:
    """The plan of a recipe with all matrices whole; there are calibration data if it names a metric."""
    resolved = resolve_recipe(recipe, checkpoint, calibrated=recipe.metric is not None)
    return plan_checkpoint(resolved, checkpoint)
