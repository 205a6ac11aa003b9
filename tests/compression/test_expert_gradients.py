"""What errors at a mixture's experts cost, against the stock modules' own gradients of their weights."""

import math
from functools import partial

import pytest
import torch
from helpers.expert_mixtures import VOCAB, save_mixture

from mpoe_convert import Recipe
from mpoe_convert.compression import fisher
from mpoe_convert.compression.batches import split
from mpoe_convert.compression.dense_run import DenseRun
from mpoe_convert.compression.expert_gradients import expert_sensitivities
from mpoe_convert.compression.fisher import sampled_loss
from mpoe_convert.errors import CheckpointError
from mpoe_convert.planning.mixtures import plan_mixture, resolve_mixture
from mpoe_convert.source.checkpoint import open_checkpoint
from mpoe_convert.source.in_memory import in_memory


def make_run(model_type, folder, batches):
    """(calibration session, whole model, layer's path -> experts)"""
    checkpoint = in_memory(open_checkpoint(str(save_mixture(model_type, folder))))
    planned = plan_mixture(resolve_mixture(Recipe(str(folder)), checkpoint), checkpoint)
    run = DenseRun(planned, checkpoint, tuple(batches), torch.device("cpu"))
    model = run.in_memory(torch.float32)
    slot = planned.family.slot
    paths = {ffn.ffn.path: f"{ffn.ffn.path}.{slot}.experts" for ffn in planned.ffns}
    return run, model, {path: model.base_model.get_submodule(name) for path, name in paths.items()}


def tokens(count, length):
    generator = torch.Generator().manual_seed(7)
    return [{"input_ids": torch.randint(3, VOCAB, (1, length), generator=generator)} for _ in range(count)]


def quiet(*_):
    pass


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "nemotron_h"])
def test_single_tokens_give_the_squares_of_the_weights_gradients(model_type, tmp_path):
    """One token's gradient at a projection times its input is the gradient of the weights."""
    run, model, modules = make_run(model_type, tmp_path / "source", tokens(9, 1))
    found = expert_sensitivities(run, model, modules, quiet)
    calls, outputs = {}, {}

    def note(path, module, args, kwargs, y):
        calls[path], outputs[path] = (*args, *kwargs.values()), y
        y.retain_grad()

    for path, module in modules.items():
        module.register_forward_hook(partial(note, path), with_kwargs=True)
        module.requires_grad_(True)
    squares, combined, scored = {}, dict.fromkeys(modules, 0.0), 0
    for number, batch in enumerate(split(run.batches)[0]):
        model.zero_grad()
        generator = torch.Generator().manual_seed(number)
        loss, count = sampled_loss(model, batch, generator, True)
        loss.backward()
        scored += count
        for path, module in modules.items():
            x, chosen, weights = (each.detach() for each in calls[path])
            for expert, combine in zip(chosen[0].tolist(), weights[0].tolist(), strict=True):
                combined[path] += combine**2
                mean = {"down": combine**2 * outputs[path].grad.square().mean()}
                for role, gradient in gradients(module, expert):
                    width = gradient.numel() // x.numel()
                    mean[role] = gradient.square().sum() / x.square().sum() / width
                for role, each in mean.items():
                    squares[path, role] = squares.get((path, role), 0.0) + float(each)
    assert scored == 8
    assert set(squares) == {(path, role) for path, roles in found.items() for role in roles}
    for (path, role), total in squares.items():
        assert float(found[path][role]) == pytest.approx(0.5 * total / combined[path], rel=1e-4)


def gradients(module, expert):
    """(role, gradient of the expert's matrix) of what x enters."""
    if not module.has_gate:
        yield "up", module.up_proj.grad[expert]
    elif module.is_transposed:  # gpt-oss, whose halves alternate
        yield "gate", module.gate_up_proj.grad[expert][:, 0::2]
        yield "up", module.gate_up_proj.grad[expert][:, 1::2]
    else:
        half = module.gate_up_proj.shape[1] // 2
        yield "gate", module.gate_up_proj.grad[expert][:half]
        yield "up", module.gate_up_proj.grad[expert][half:]


def test_the_expected_rise_is_the_loss_s_own(tmp_path):
    """Random errors at the outputs of the last experts, of known size, against the change of the loss."""
    run, model, modules = make_run("mixtral", tmp_path / "source", tokens(8, 40))
    path, module = list(modules.items())[-1]
    found = expert_sensitivities(run, model, {path: module}, quiet)[path]["down"]
    batches, size = split(run.batches)[0], 0.03
    generator, squares = torch.Generator().manual_seed(1), []

    def disturb(module, args, kwargs, y):
        error = size * torch.randn(y.shape, generator=generator)
        squares.append(float(error.square().sum(-1).mean()))
        return y + error

    def outputs():
        with torch.no_grad():
            return torch.cat([model(**batch).logits[0] for batch in batches]).div(2).log_softmax(-1)

    before = outputs()
    handle = module.register_forward_hook(disturb, with_kwargs=True)
    rises = [4 * float((before.exp() * (before - outputs())).sum(-1).mean()) for _ in range(20)]
    handle.remove()
    expected = float(found) * sum(squares) / len(squares)
    # Top-2 weights of Mixtral sum to 1, and the gradient at a token does not depend on them.
    assert sum(rises) / len(rises) == pytest.approx(expected, rel=0.3)


def test_padding_is_not_counted(tmp_path):
    batches = tokens(4, 6)
    run, model, modules = make_run("mixtral", tmp_path / "source", batches)
    plain = expert_sensitivities(run, model, modules, quiet)
    padded = [
        {
            "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 3)),
            "attention_mask": torch.tensor([[1] * 6 + [0] * 3]),
        }
        for batch in batches
    ]
    run = DenseRun(run.plan, run.checkpoint, tuple(padded), run.device)
    found = expert_sensitivities(run, model, modules, quiet)
    for path, roles in plain.items():
        for role, value in roles.items():
            torch.testing.assert_close(found[path][role], value, rtol=1e-4, atol=0)


def test_nothing_is_left_behind_and_nan_is_told(tmp_path, monkeypatch):
    run, model, modules = make_run("mixtral", tmp_path / "source", tokens(4, 6))
    expert_sensitivities(run, model, modules, quiet)
    assert not any(each._forward_hooks for each in modules.values())
    monkeypatch.setattr(fisher, "sampled_loss", lambda *a: (sampled_loss(*a)[0] * math.nan, 1))
    with pytest.raises(CheckpointError, match=r"layers\.\d \(gradients, "):
        expert_sensitivities(run, model, modules, quiet)
