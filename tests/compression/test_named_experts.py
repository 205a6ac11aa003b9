"""Calibration at experts that were named by hand, against those that transformers marks and by definition."""

from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from helpers.expert_mixtures import VOCAB, save_mixture
from helpers.quire import OWN, save_quire
from helpers.stock_mixtures import make_model

from mpoe_convert import Recipe
from mpoe_convert.compression.batches import split
from mpoe_convert.compression.dense_run import DenseRun
from mpoe_convert.compression.expert_gradients import expert_sensitivities
from mpoe_convert.compression.expert_moments import collect
from mpoe_convert.compression.fisher import sampled_loss
from mpoe_convert.decomposition.symmetric import unpacked
from mpoe_convert.planning.mixtures import plan_mixture, resolve_mixture
from mpoe_convert.source.expert_layout import read_layout
from mpoe_convert.source.opening import open_source


def batches(count, length):
    generator = torch.Generator().manual_seed(7)
    return [{"input_ids": torch.randint(3, VOCAB, (1, length), generator=generator)} for _ in range(count)]


def make_run(folder, count, length, **options):
    """(calibration session, whole model, layer's path -> experts)"""
    checkpoint = open_source(str(folder), **options)
    recipe = Recipe(str(folder), **options)
    planned = plan_mixture(resolve_mixture(recipe, checkpoint), checkpoint)
    run = DenseRun(planned, checkpoint, tuple(batches(count, length)), torch.device("cpu"))
    model, family = run.in_memory(torch.float32), planned.family
    paths = [ffn.ffn.path for ffn in planned.ffns]
    modules = {path: f"{path}.{family.slot}.{family.experts}" for path in paths}
    return run, model, {path: model.base_model.get_submodule(name) for path, name in modules.items()}


def moments_of(model, count, length, layout, ending, change=lambda batch: batch):
    found = {}
    wanted = lambda path: path.endswith(ending)  # noqa: E731
    made = [change(batch) for batch in batches(count, length)]
    collect(model, made, found.__setitem__, wanted=wanted, layout=layout)
    return found


def test_moments_are_those_of_marked_experts():
    model = make_model("mixtral")
    layout = read_layout(model.model.layers[0].mlp.experts)
    known, named = (moments_of(model, 5, 7, each, ".mlp.experts") for each in (None, layout))
    assert len(known) == 2 and known.keys() == named.keys()
    for path, moments in known.items():
        for field in fields(moments):
            expected, found = (torch.as_tensor(getattr(each, field.name)) for each in (moments, named[path]))
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("model_type", ["mixtral", "nemotron_h"])
def test_gradients_are_those_of_marked_experts(model_type, tmp_path):
    run, model, modules = make_run(save_mixture(model_type, tmp_path / "source"), 5, 7)
    layout = read_layout(next(iter(modules.values())))
    family = replace(run.plan.family, layout=layout)
    named = replace(run, plan=replace(run.plan, family=family))
    expected, found = (expert_sensitivities(each, model, modules, lambda *_: None) for each in (run, named))
    assert found.keys() == expected.keys()
    for path, roles in expected.items():
        assert {r: float(t) for r, t in found[path].items()} == pytest.approx(
            {r: float(t) for r, t in roles.items()}, rel=1e-5
        )


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    return save_quire(tmp_path_factory.mktemp("listed") / "quire_of_a_list", bound=False)


def blocks_seen(model, paths, seen):
    """Note the hidden states (tokens, H) that blocks get."""

    def note(path, block, args):
        seen.setdefault(path, []).append(args[0].detach().flatten(0, -2))

    for path in paths:
        block = model.base_model.get_submodule(f"{path}.block")
        yield block.register_forward_pre_hook(partial(note, path))


def chosen_by(block, x):
    """(tokens, 2) the weights of every token's experts, and (tokens, 2) the experts."""
    return block.choice(x).softmax(-1).topk(2, dim=-1)


def neurons(sheet, x):
    return torch.nn.functional.silu(sheet.w1(x)) * sheet.w3(x)


def test_moments_of_a_list_are_of_what_its_experts_get(listed):
    run, model, modules = make_run(listed, 5, 7, **OWN)
    found = moments_of(model, 5, 7, run.plan.family.layout, ".sheets")
    assert list(found) == [f"model.{path}.block.sheets" for path in modules] and len(found) == 2
    seen = {}
    handles = [*blocks_seen(model, modules, seen)]
    with torch.no_grad():
        for batch in split(run.batches)[0]:
            model(**batch)
        for path, experts in modules.items():
            moments, x = found[f"model.{path}.block.sheets"], torch.cat(seen[path])
            weights, chosen = chosen_by(model.base_model.get_submodule(f"{path}.block"), x)
            assert moments.total == len(x)
            for number, sheet in enumerate(experts):
                own, places = (chosen == number).nonzero(as_tuple=True)
                rows, combine = x[own], weights[own, places, None]
                assert moments.tokens[number] == len(rows)
                for sums, each in ((moments.inputs, rows), (moments.inner, neurons(sheet, rows))):
                    expected = (combine * each).mT @ (combine * each)
                    torch.testing.assert_close(unpacked(sums[number]), expected, rtol=1e-4, atol=1e-4)
                norms = (combine * sheet(rows)).norm(dim=1)
                assert float(moments.saliency[number]) == pytest.approx(norms.sum().item(), rel=1e-4)
    for handle in handles:
        handle.remove()


def padded(batch):
    """The same text, and padding behind it."""
    ids = torch.nn.functional.pad(batch["input_ids"], (0, 3), value=5)
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < ids.shape[1] - 3).long()[None]}


def test_padding_does_not_count_in_a_list(listed):
    """No token of this model sees later ones."""
    run, model, _ = make_run(listed, 5, 7, **OWN)
    layout = run.plan.family.layout
    plain = moments_of(model, 5, 7, layout, ".sheets")
    for path, moments in moments_of(model, 5, 7, layout, ".sheets", padded).items():
        for field in fields(moments):
            expected, found = (torch.as_tensor(getattr(each, field.name)) for each in (plain[path], moments))
            torch.testing.assert_close(found, expected)


def test_gradients_of_a_list_are_those_of_its_weights(listed):
    """One token's gradient at a projection times its input is the gradient of the weights."""
    run, model, modules = make_run(listed, 9, 1, **OWN)
    found = expert_sensitivities(run, model, modules, lambda *_: None)
    squares, combine, rows, seen = {}, {}, 0, {}
    handles = [*blocks_seen(model, modules, seen)]
    model.requires_grad_(True)
    for place, batch in enumerate(split(run.batches)[0]):
        generator = torch.Generator().manual_seed(place)
        model.zero_grad()
        loss, _ = sampled_loss(model, batch, generator, True)
        loss.backward()
        for path, experts in modules.items():
            x = seen[path][-1]
            weights, chosen = chosen_by(model.base_model.get_submodule(f"{path}.block"), x)
            combine[path] = combine.get(path, 0.0) + weights.square().sum().item()
            for number in chosen[0].tolist():
                sheet, rows = experts[number], rows + 1
                inputs = {"gate": ("w1", x), "up": ("w3", x), "down": ("w2", neurons(sheet, x))}
                for role, (name, each) in inputs.items():
                    gradient = getattr(sheet, name).weight.grad
                    mean = gradient.square().sum() / each.square().sum() / len(gradient)
                    squares[path, role] = squares.get((path, role), 0.0) + mean.item()
    for handle in handles:
        handle.remove()
    assert rows == 2 * 2 * 8  # of 8 tokens that are not held out, in two layers
    for (path, role), total in squares.items():
        assert float(found[path][role]) == pytest.approx(0.5 * total / combine[path], rel=1e-4)
