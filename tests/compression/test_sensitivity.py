"""How much truncating one matrix changes, against a stock model in which that matrix alone is another."""

import pytest
import torch
import transformers
from helpers.calibration import batches_for
from helpers.models import generative
from helpers.tiny import save_tiny

from mpoe_convert import Recipe, plan
from mpoe_convert.compression.calibrate import calibrate
from mpoe_convert.compression.dense_run import DenseRun
from mpoe_convert.compression.metrics import load
from mpoe_convert.compression.sensitivity import measure_sensitivities
from mpoe_convert.decomposition.low_rank import factor
from mpoe_convert.planning.plan import plan_checkpoint
from mpoe_convert.source.checkpoint import open_checkpoint
from mpoe_convert.source.matrices import read_wide

CPU = torch.device("cpu")


def compared(model, batch):
    """(log-probabilities or last hidden states, mask of scored positions)."""
    output = model(**batch)
    values = output.logits.log_softmax(-1) if "logits" in output else output[0]
    mask = batch.get("attention_mask")
    if model.config.is_encoder_decoder or mask is None or mask.shape != values.shape[:-1]:
        mask = torch.ones(values.shape[:-1])
    return values, mask > 0


def change(theirs, ours):
    """Mean over tokens of all batches: Kullback-Leibler divergence, or half the squared difference."""
    theirs, ours = (torch.cat([values[mask] for values, mask in found]) for found in (theirs, ours))
    has_logits = torch.allclose(theirs.exp().sum(-1), torch.ones(len(theirs)), atol=1e-4)
    each = theirs.exp() * (theirs - ours) if has_logits else (theirs - ours).square() / 2
    return float(each.sum()) / len(theirs)


@pytest.mark.parametrize("model_type", ["gpt2", "phi3", "bart", "bert", "albert", "vit"])
@torch.no_grad()
def test_one_matrix_at_a_time(model_type, tmp_path):
    auto_class = generative(model_type)
    folder = save_tiny(model_type, auto_class, tmp_path / "dense")
    model = getattr(transformers, auto_class).from_pretrained(folder).eval()
    batches = batches_for(model, auto_class, 3)
    checkpoint = open_checkpoint(str(folder))
    planned = plan_checkpoint(Recipe(str(folder), bond_dim=4, keep=0.5, metric="outputs"), checkpoint)
    run = DenseRun(planned, checkpoint, tuple(batches), CPU)
    calibration = calibrate(run)
    matrices = list(planned.matrices)
    ranks = {matrix.name: 3 for matrix in matrices} | {matrices[1].name: None}
    found = measure_sensitivities(run, calibration, load("outputs"), ranks, lambda *_: None)
    assert list(found) == [name for name, rank in ranks.items() if rank]
    dense = [compared(model, batch) for batch in batches[:-1]]
    for ffn in (planned.ffns[0], planned.ffns[-1]):
        for matrix in ffn.matrices:
            if ranks[matrix.name] is None:
                continue
            weight = read_wide(checkpoint, matrix.source, CPU)
            metric = load("outputs").weigh(matrix, weight, calibration.load(ffn.ffn.path))
            product = torch.linalg.multi_dot(factor(weight, 3, metric))
            stored = checkpoint.read(matrix.source.weight)
            parameter = next(p for p in model.parameters() if torch.equal(p, stored))
            part = parameter if matrix.source.part is None else parameter.chunk(2)[matrix.source.part]
            part.copy_(product if matrix.source.transposed else product.mT)
            expected = change(dense, [compared(model, batch) for batch in batches[:-1]])
            parameter.copy_(stored)
            assert expected > 1e-9
            assert abs(found[matrix.name] - expected) < 1e-2 * expected + 1e-7


def test_what_matters_more_gets_more_ranks(tmp_path):
    """A layer whose output is scaled up keeps more ranks; the spectra of its weights do not show that."""
    folder = save_tiny("gpt2", "AutoModelForCausalLM", tmp_path / "dense")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ranks = {}
    for name, factors in {"first": (3.0, 0.3), "second": (0.3, 3.0)}.items():
        for layer, by in zip(model.transformer.h, factors, strict=True):
            layer.mlp.c_proj.weight.data.mul_(by)
        model.save_pretrained(tmp_path / name)
        recipe = Recipe(str(tmp_path / name), experts=2, bond_dim=2, keep=0.6, metric="outputs")
        batches = batches_for(model, "AutoModelForCausalLM", 6)
        for allocation in ("energy", "measured"):
            planned = plan(recipe.replace(allocation=allocation), calibration=batches)
            kept = [matrix.rank or min(matrix.rows, matrix.cols) for matrix in planned.matrices]
            ranks[name, allocation] = kept[1] - kept[3]
        assert planned.budget.chosen.loss > 0
        for layer, by in zip(model.transformer.h, factors, strict=True):
            layer.mlp.c_proj.weight.data.div_(by)
    assert ranks["first", "measured"] > ranks["first", "energy"]
    assert ranks["second", "measured"] < ranks["second", "energy"]
