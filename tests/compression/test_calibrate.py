"""Moments from batches in lockstep, against hooks on the stock model in memory."""

import gc
import json
import tempfile

import pytest
import torch
import transformers
from helpers.calibration import CPU, ONE_OF_EACH, batches_for, calibrated, plan_whole
from helpers.models import generative
from helpers.tiny import HIDDEN, save_tiny
from torch import nn
from transformers.pytorch_utils import Conv1D

from mpoe_convert import Recipe, plan
from mpoe_convert.compression.calibrate import MomentsWalk
from mpoe_convert.compression.dense_run import DenseRun
from mpoe_convert.compression.fisher import sampled_loss
from mpoe_convert.errors import CheckpointError, DataError
from mpoe_convert.source.checkpoint import open_checkpoint


def expected_moments(folder, auto_class, checkpoint, batches):
    """(the plan, (inputs, outputs without bias) of every projection on the batches, by the weight's name)."""
    model = getattr(transformers, auto_class).from_pretrained(folder, dtype="auto").eval()
    planned = plan_whole(Recipe(str(folder), bond_dim=4), checkpoint)
    seen, batch = {}, {}
    with_weight = [module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))]

    def hook(source, path):
        def note(module, args, output):
            x, y = args[0].reshape(-1, args[0].shape[-1]), output.reshape(-1, output.shape[-1])
            if module.bias is not None:
                y = y - module.bias
            mask = batch.get("attention_mask")
            decoder = model.config.is_encoder_decoder and path.startswith("decoder")
            if mask is not None and not decoder:
                x, y = x[mask.reshape(-1) > 0], y[mask.reshape(-1) > 0]
            if source.part is not None:
                y = y.chunk(2, -1)[source.part]
            seen.setdefault((source.weight, source.part), []).append((x.detach(), y.detach()))

        return note

    for ffn in planned.ffns:
        for source in ffn.ffn.projections.values():
            weight = checkpoint.read(source.weight)
            module = next(m for m in with_weight if torch.equal(m.weight, weight))
            module.register_forward_hook(hook(source, ffn.ffn.path))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    return planned, {key: [torch.cat(part) for part in zip(*rows, strict=True)] for key, rows in seen.items()}


def moment(rows):
    return rows.mT @ rows / len(rows)


@pytest.mark.parametrize("model_type", ONE_OF_EACH)
def test_moments_are_those_of_the_stock_model(model_type, tmp_path):
    auto_class = generative(model_type)
    folder = save_tiny(model_type, auto_class, tmp_path / "dense")
    checkpoint = open_checkpoint(str(folder))
    model = getattr(transformers, auto_class).from_pretrained(folder)
    batches = batches_for(model, auto_class)
    planned, expected = expected_moments(folder, auto_class, checkpoint, batches[:-1])
    _, held_out = expected_moments(folder, auto_class, checkpoint, batches[-1:])
    found = calibrated(planned, checkpoint, batches)
    for ffn in planned.ffns:
        moments = found.load(ffn.ffn.path)
        for matrix in ffn.matrices:
            key = (matrix.source.weight, matrix.source.part)
            inputs, outputs = expected[key]
            place = "inner" if matrix.role == "down" else "inputs"
            ours, theirs = (
                (moments.tensors[place], moment(inputs))
                if matrix.rows <= matrix.cols
                else (moments.tensors[f"{matrix.role}.outputs"], moment(outputs))
            )
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
            scale = moments.tensors[f"{place}.scale"]
            torch.testing.assert_close(scale, inputs.square().mean(0), rtol=1e-4, atol=1e-6)
            weight = torch.randn(matrix.rows, matrix.cols, generator=torch.Generator().manual_seed(0))
            kept = held_out[key][0]
            error = (kept @ weight * 0.5).norm() / (kept @ weight).norm()
            assert abs(moments.output_error(matrix, weight, weight / 2) - error) < 1e-3


def test_chains_with_cut_bonds_take_moments_of_wide_inputs_too(tmp_path):
    folder = save_tiny("gpt2", "AutoModelForCausalLM", tmp_path / "dense")
    checkpoint = open_checkpoint(str(folder))
    batches = batches_for(transformers.AutoModelForCausalLM.from_pretrained(folder), "AutoModelForCausalLM")
    _, expected = expected_moments(folder, "AutoModelForCausalLM", checkpoint, batches[:-1])
    planned = plan_whole(Recipe(str(folder), layout="balanced", bond_dim=2), checkpoint)
    found = calibrated(planned, checkpoint, batches)
    for ffn in planned.ffns:
        for matrix in ffn.matrices:
            theirs = moment(expected[matrix.source.weight, None][0])
            ours = found.load(ffn.ffn.path).input_moment(matrix)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_a_second_run_reads_what_the_first_found(llama, monkeypatch):
    _, checkpoint, planned, batches = llama
    first = calibrated(planned, checkpoint, batches)
    monkeypatch.setattr(MomentsWalk, "walk", lambda *_: pytest.fail("the model ran again"))
    assert calibrated(planned, checkpoint, batches).folder == first.folder


def test_other_weights_and_other_text_are_other_moments(llama, tmp_path):
    folder, checkpoint, planned, batches = llama
    first = calibrated(planned, checkpoint, batches).folder
    assert calibrated(planned, checkpoint, batches[::-1]).folder != first
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    model.save_pretrained(folder)
    assert calibrated(planned, open_checkpoint(str(folder)), batches).folder != first


def test_an_interrupted_run_goes_on(llama, tmp_path, monkeypatch):
    _, checkpoint, planned, batches = llama
    whole = calibrated(planned, checkpoint, batches)
    expected = [whole.load(path).tensors for path in whole.paths]
    whole.file(whole.paths[1]).unlink()
    kept = whole.file(whole.paths[0]).stat().st_mtime_ns

    def stop(path, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrated(planned, checkpoint, batches, progress=stop)
    assert whole.file(whole.paths[1]).is_file()  # this FFN was done when the run was stopped
    whole.file(whole.paths[1]).unlink()
    again = calibrated(planned, checkpoint, batches)
    assert whole.file(whole.paths[0]).stat().st_mtime_ns == kept
    for path, tensors in zip(again.paths, expected, strict=True):
        assert again.load(path).tensors.keys() == tensors.keys()
        for name, tensor in again.load(path).tensors.items():
            torch.testing.assert_close(tensor, tensors[name])


def test_only_one_ffn_is_summed_at_a_time(llama, monkeypatch):
    _, checkpoint, planned, batches = llama
    counts = []
    original = MomentsWalk.finish

    def finish(self, path):
        counts.append(sum(bool(sums.sums) for sums in self.sums.values()))
        original(self, path)

    monkeypatch.setattr(MomentsWalk, "finish", finish)
    calibrated(planned, checkpoint, batches[1:])
    assert counts == [1, 1]


def test_a_model_that_computes_nan_is_told_with_the_place(llama):
    folder, _, planned, batches = llama
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(3e38)
    model.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"layers\.0 \(inner\) hold NaN or Inf"):
        calibrated(planned, open_checkpoint(str(folder)), batches)
    gc.collect()


def test_too_little_text(llama, tmp_path):
    folder, checkpoint, planned, batches = llama
    with pytest.raises(DataError, match="has 1 batch; expected two or more"):
        calibrated(planned, checkpoint, batches[:1])
    small = [{name: part[:1, :3] for name, part in batch.items()} for batch in batches]
    with pytest.raises(DataError, match=f"the {HIDDEN} that moments of {HIDDEN} features need"):
        calibrated(planned, checkpoint, small)
    text = tmp_path / "short.txt"
    text.write_text("w3 w4 w5 " * 100)
    with pytest.raises(DataError, match="has 256 tokens in blocks of 64; expected the 65,536"):
        plan(Recipe(str(folder), bond_dim=4, keep=1.7, calibrate=(str(text),)))


@pytest.mark.parametrize("kind", ["bin", "bfloat16"])
def test_other_files_and_dtypes(kind, llama, tmp_path):
    folder, _, _, batches = llama
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    if kind == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    else:
        model.bfloat16().save_pretrained(folder)
    checkpoint = open_checkpoint(str(folder))
    planned, expected = expected_moments(folder, "AutoModelForCausalLM", checkpoint, batches[:-1])
    found = calibrated(planned, checkpoint, batches)
    for ffn in planned.ffns:
        up = next(m for m in ffn.matrices if m.role == "up")
        theirs = moment(expected[up.source.weight, None][0].float())
        ours = found.load(ffn.ffn.path).tensors["inputs"]
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def test_the_modelssampled_loss_is_of_probabilities_at_temperature_two(llama):
    """The gradient of the logits is the probabilities minus one for the sampled label."""
    folder, _, _, batches = llama
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    model.lm_head.weight.data *= 10  # confident predictions
    batch = {"input_ids": torch.full((5000, 1), 7)}
    seen = []
    model.lm_head.register_forward_hook(lambda m, a, out: (out.retain_grad(), seen.append(out))[0])
    loss, count = sampled_loss(model, batch, torch.Generator().manual_seed(0), True)
    loss.backward()
    drawn = (seen[0] / 2).softmax(-1) - seen[0].grad
    assert count == batch["input_ids"].numel()
    torch.testing.assert_close(drawn.sum(-1), torch.ones(drawn.shape[:-1]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(drawn.amax(-1), torch.ones(drawn.shape[:-1]), rtol=1e-5, atol=1e-5)
    probabilities = (seen[0][0, 0] / 2).softmax(-1)
    assert 0.2 < probabilities.max() < 0.9
    errors = (probabilities * (1 - probabilities) / len(drawn)).sqrt()
    assert ((drawn.mean((0, 1)) - probabilities).abs() < 5 * errors + 1e-4).all()


def test_no_code_of_the_source_runs_and_its_absence_is_no_trouble(llama, tmp_path):
    folder, _, planned, batches = llama
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    (folder / "config.json").write_text(json.dumps(config))
    text = tmp_path / "text.txt"
    text.write_text("w3 w4 w5 " * 1000)
    recipe = Recipe(str(folder), experts=2, bond_dim=2, keep=0.8)
    planned = plan(recipe.replace(calibrate=(str(text),), calibration_tokens=1024))
    assert planned.budget.tokens == 1024
    marker = tmp_path / "ran"
    (folder / "configuration_x.py").write_text(f"open({str(marker)!r}, 'w')")
    plan(recipe.replace(calibrate=(str(text),), calibration_tokens=512))
    assert not marker.exists()


def left_by_a_killed_run(folder):
    """A folder with a lock that no process holds."""
    folder.mkdir()
    (folder / "lock").touch()
    (folder / "large.safetensors").write_text("x")
    return folder


def test_what_killed_runs_have_left_is_removed(llama, tmp_path, monkeypatch):
    """Half a file of moments, and blocks that were put on the disk."""
    _, checkpoint, planned, batches = llama
    found = calibrated(planned, checkpoint, batches)
    dead = left_by_a_killed_run(found.folder / "unfinished-dead")
    path = found.paths[0]
    found.save(path, found.load(path).tensors)
    assert not dead.exists() and not list(found.folder.glob("unfinished-*"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead = left_by_a_killed_run(tmp_path / "mpoe-offload-dead")
    with DenseRun(planned, checkpoint, (), CPU).streamed():
        assert not dead.exists() and len(list(tmp_path.glob("mpoe-offload-*"))) == 1
    assert not list(tmp_path.glob("mpoe-*"))
