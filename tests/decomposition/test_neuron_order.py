"""The order of hidden neurons: found where it is known, and no model computes anything else for it."""

import pytest
import torch
import transformers
from helpers.calibration import ONE_OF_EACH, batches_for
from helpers.models import generative
from helpers.selection import every
from helpers.tiny import make_inputs, outputs, save_tiny
from safetensors.torch import load_file, save_file

from mpoe_convert import Recipe, convert, plan
from mpoe_convert.conversion.build import choose_order
from mpoe_convert.decomposition.neuron_order import bisection, reordered
from mpoe_convert.runtime.modeling_mpoe import contract_chain

CUT = {"layout": "balanced", "sites": 3, "bond_dim": 2, "experts": 2, "noise": 0.0}


@pytest.mark.parametrize("count", [1, 2, 3, 8, 37])
def test_an_order_holds_every_neuron_once(count):
    features = torch.randn(count, 5, generator=torch.Generator().manual_seed(0))
    assert sorted(bisection(features).tolist()) == list(range(count))


def test_neurons_of_one_kind_stand_together():
    kinds = torch.tensor([2, 0, 1, 3, 0, 2, 3, 1, 1, 0, 3, 2])
    prototypes = torch.randn(4, 20, generator=torch.Generator().manual_seed(1))
    found = kinds[bisection(prototypes[kinds])].reshape(4, 3)
    assert (found == found[:, :1]).all() and sorted(found[:, 0].tolist()) == [0, 1, 2, 3]


def test_on_a_line_neighbours_stay_neighbours():
    place = torch.randperm(32, generator=torch.Generator().manual_seed(2))
    found = place[bisection(place[:, None] * torch.randn(1, 6))]
    blocks = [sorted(part.tolist()) for part in found.split(4)]
    assert all(block[-1] - block[0] == 3 for block in blocks)


def test_columns_rows_and_biases_move_together():
    order = torch.tensor([2, 0, 1])
    up, bias, down = torch.randn(4, 3), torch.randn(3), torch.randn(3, 5)
    x = torch.randn(7, 4)
    expected = (x @ up + bias).relu() @ down
    first = x @ reordered(up, "up", order) + reordered(bias, "gate", order)
    torch.testing.assert_close(first.relu() @ reordered(down, "down", order), expected)
    assert torch.equal(reordered(x[0], "down", order), x[0])  # a bias of the outputs


def plant_two_kinds(folder, recipe):
    """Make every FFN's weights of two kinds of neurons, in random order: exact at bond 2 once sorted."""
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for ffn in plan(recipe).ffns:
        inner = ffn.matrices[0].cols
        kinds = (torch.arange(inner) % 2)[torch.randperm(inner, generator=generator)]
        parts = {}
        for matrix in ffn.matrices:
            hidden_dims = matrix.sites.out_dims if matrix.role == "down" else matrix.sites.in_dims
            prototypes = torch.stack([product_vector(hidden_dims, generator) for _ in range(2)])
            neurons = prototypes[kinds]  # (inner, hidden)
            weight = neurons if matrix.role == "down" else neurons.mT  # (in, out)
            stored = weight if matrix.source.transposed else weight.mT
            parts.setdefault(matrix.source.weight, []).append(stored)
            if matrix.source.bias and matrix.role != "down":
                size = tensors[matrix.source.bias].shape
                tensors[matrix.source.bias] = torch.randn(size, generator=generator)
        tensors |= {name: torch.cat(stored).contiguous() for name, stored in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def product_vector(dims, generator):
    """A vector that is a product over the sites."""
    found = torch.ones(1)
    for dim in dims:
        found = torch.kron(found, torch.randn(dim, generator=generator))
    return found


def difference(recipe, output, auto_class, dense, batches=None):
    """(largest relative difference of the outputs, the report)."""
    report = convert(recipe, output, calibration=batches)
    made = getattr(transformers, auto_class).from_pretrained(output, trust_remote_code=True).eval()
    inputs = make_inputs(dense, auto_class)
    expected, found = outputs(dense, inputs), outputs(made, inputs)
    return max(float((found[key] - expected[key]).norm() / expected[key].norm()) for key in expected), report


@pytest.mark.parametrize("model_type", every(3, ONE_OF_EACH))
def test_a_better_order_changes_no_output(model_type, tmp_path):
    """With calibration its moments are in the same order: what was exact stays nearly so."""
    auto_class = generative(model_type)
    folder = save_tiny(model_type, auto_class, tmp_path / "dense")
    recipe = Recipe(str(folder), **CUT)
    plant_two_kinds(folder, recipe)
    dense = getattr(transformers, auto_class).from_pretrained(folder).eval()
    found, report = difference(recipe, tmp_path / "out", auto_class, dense)
    assert found < 1e-3
    assert all(order.applied for order in report.neuron_orders)
    assert all(order.bisected_error < 1e-3 < order.source_error for order in report.neuron_orders)
    batches = batches_for(dense, auto_class, 6)
    found, _ = difference(
        recipe.replace(metric="outputs"), tmp_path / "calibrated", auto_class, dense, batches
    )
    assert found < 1e-2


def test_the_source_order_on_request(tmp_path):
    folder = save_tiny("gpt2", "AutoModelForCausalLM", tmp_path / "dense")
    recipe = Recipe(str(folder), **CUT, neuron_order="source")
    plant_two_kinds(folder, recipe)
    dense = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    found, report = difference(recipe, tmp_path / "out", "AutoModelForCausalLM", dense)
    assert report.neuron_orders == () and found > 1e-3


def test_zero_matrices_keep_their_order(tmp_path):
    folder = save_tiny("gpt2", "AutoModelForCausalLM", tmp_path / "dense")
    recipe = Recipe(str(folder), **CUT)
    ffn = plan(recipe).ffns[0]
    order, report = choose_order(ffn, {m.role: torch.zeros(m.rows, m.cols) for m in ffn.matrices}, recipe)
    assert order is None and report.source_error == report.bisected_error == 0


def test_an_order_that_does_not_pay_is_left(tmp_path):
    """Chains of bond 2 in the source's order: nothing is lost there, and any other order loses."""
    folder = save_tiny("gpt2", "AutoModelForCausalLM", tmp_path / "dense")
    recipe = Recipe(str(folder), **CUT)
    ffn = plan(recipe).ffns[0]
    generator = torch.Generator().manual_seed(4)
    matrices = {
        m.role: contract_chain([torch.randn(s, generator=generator) for s in m.sites.core_shapes])
        for m in ffn.matrices
    }
    order, report = choose_order(ffn, matrices, recipe)
    assert order is None and not report.applied
    assert report.source_error < 1e-6 < 0.1 < report.bisected_error
