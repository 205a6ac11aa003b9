"""Moments of gradients, against autograd on the stock model."""

import math
from functools import partial

import pytest
import torch
import transformers
from helpers.calibration import batches_for, calibrated, plan_whole
from helpers.models import generative
from helpers.tiny import save_tiny

from mpoe_convert import Recipe
from mpoe_convert.compression import fisher
from mpoe_convert.compression.batches import is_causal, split
from mpoe_convert.compression.fisher import graph_sized, sampled_loss
from mpoe_convert.compression.stream import projection_modules
from mpoe_convert.errors import CheckpointError
from mpoe_convert.source.checkpoint import open_checkpoint


@pytest.mark.parametrize("model_type", ["gpt2", "bert", "t5", "bart", "vit", "llama", "phi3"])
def test_moments_are_those_of_gradients_on_the_thin_side(model_type, tmp_path):
    """Of a plain FFN that of up's inputs is what autograd itself gives; of down that of its outputs."""
    auto_class = generative(model_type)
    folder = save_tiny(model_type, auto_class, tmp_path / "dense")
    checkpoint = open_checkpoint(str(folder))
    model = getattr(transformers, auto_class).from_pretrained(folder).eval()
    batches = batches_for(model, auto_class)
    planned = plan_whole(Recipe(str(folder), bond_dim=4), checkpoint)
    found = calibrated(planned, checkpoint, batches, gradients=True)
    gradients, kept = {}, []
    for ffn in planned.ffns:
        modules = projection_modules(model, planned.family, ffn)

        def note(module, args, output, key):
            for name, tensor in (("in", args[0]), ("out", output)):
                tensor.retain_grad()
                kept.append(((*key, name), tensor))

        for role in ("up", "down"):
            hook = partial(note, key=(ffn.ffn.path, role))
            modules[role].register_forward_hook(hook)
    tokens = 0
    for number, piece in enumerate(graph_sized(split(batches)[0])):
        kept.clear()
        generator = torch.Generator().manual_seed(number)
        loss, count = sampled_loss(model, piece, generator, is_causal(checkpoint))
        loss.backward()
        tokens += count
        for key, tensor in kept:
            gradients.setdefault(key, []).append(tensor.grad.reshape(-1, tensor.shape[-1]))
    for ffn in planned.ffns:
        tensors = found.load(ffn.ffn.path).tensors
        rows = torch.cat(gradients[ffn.ffn.path, "down", "out"])
        theirs = rows.mT @ rows / tokens
        near = {"rtol": 1e-3, "atol": 1e-4 * theirs.abs().max()}
        torch.testing.assert_close(tensors["down.gradient"], theirs, **near)
        mean = rows.square().mean(1).sum() / tokens
        torch.testing.assert_close(tensors["down.gradient_mean"], mean, rtol=1e-3, atol=1e-12)
        if "gate" in ffn.ffn.projections:
            assert tensors["up.gradient"].shape == tensors["gate.gradient"].shape
            assert not torch.equal(tensors["up.gradient"], tensors["gate.gradient"])
            continue
        if model_type in ("bert", "bart"):  # what goes into up goes past it, too
            continue
        rows = torch.cat(gradients[ffn.ffn.path, "up", "in"])
        theirs = rows.mT @ rows / tokens
        torch.testing.assert_close(tensors["up.gradient"], theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max())


@pytest.mark.parametrize("model_type", ["gpt2", "bert", "distilbert"])
def test_only_scored_labels_have_gradients(model_type, tmp_path):
    """The loss is a sum over those places; behind the last attention other places have no gradient."""
    auto_class = generative(model_type) if model_type == "gpt2" else "AutoModelForMaskedLM"
    folder = save_tiny(model_type, auto_class, tmp_path / "dense")
    model = getattr(transformers, auto_class).from_pretrained(folder).eval()
    batch = batches_for(model, auto_class, 1)[0]
    batch["attention_mask"][1, :3] = 0  # labels of padding do not count, nor is it told what follows padding
    batch["labels"] = torch.full_like(batch["input_ids"], 7)
    batch["labels"][1:, 5:] = -100
    seen = []
    plan_of = plan_whole(Recipe(str(folder), bond_dim=4), open_checkpoint(str(folder)))
    last = model.base_model.get_submodule(plan_of.ffns[-1].ffn.path)
    last.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    model.base_model.register_forward_hook(lambda m, a, out: seen[0].retain_grad())
    loss, count = sampled_loss(model, batch, torch.Generator().manual_seed(0), model_type == "gpt2")
    loss.backward()
    length, shift = batch["labels"].shape[1], int(model_type == "gpt2")
    places = [
        range(length - 3 - shift),
        range(3, 5 - shift),
        *[range(5 - shift)] * (len(batch["labels"]) - 2),
    ]
    expected = torch.zeros_like(batch["labels"], dtype=torch.bool)
    for row, counted in enumerate(places):
        expected[row, list(counted)] = True
    assert count == int(expected.sum())
    assert torch.equal(seen[0].grad.abs().sum(-1) > 0, expected)


def test_padding_of_a_model_without_a_head_has_no_gradient(tmp_path):
    folder = save_tiny("bert", "AutoModel", tmp_path / "dense")
    model = transformers.AutoModel.from_pretrained(folder).eval()
    batch = batches_for(model, "AutoModel", 1)[0]
    outputs = []
    model.encoder.register_forward_hook(lambda m, a, out: outputs.append(out[0]))
    model.encoder.register_forward_hook(lambda m, a, out: outputs[0].retain_grad())
    loss, count = sampled_loss(model, batch, torch.Generator().manual_seed(0), False)
    loss.backward()
    assert count == int(batch["attention_mask"].sum()) < batch["attention_mask"].numel()
    assert torch.equal(outputs[0].grad.abs().sum(-1) > 0, batch["attention_mask"] > 0)


def test_nan_gradients_are_not_kept(llama, monkeypatch):
    _, checkpoint, planned, batches = llama
    original = fisher.sampled_loss
    monkeypatch.setattr(fisher, "sampled_loss", lambda *a: (original(*a)[0] * math.nan, 1))
    with pytest.raises(CheckpointError, match=r"layers\.\d \(gradients, "):
        calibrated(planned, checkpoint, batches[:3], gradients=True)
    monkeypatch.undo()
    found = calibrated(planned, checkpoint, batches[:3], gradients=True)
    assert all(found.load(path).tensors["up.gradient"].isfinite().all() for path in found.paths)
