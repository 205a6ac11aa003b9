"""The modelling file without torch and transformers says what it says with them."""

import subprocess
import sys

import pytest
import torch
from helpers.tiny import save_tiny

from mpoe_convert import Recipe, plan
from mpoe_convert.experts import KINDS
from mpoe_convert.runtime import modeling_mpoe, shapes

RECIPES = [
    *({"kind": kind} for kind in KINDS),
    {"bias": "per-expert"},
    {"layout": "two-sided"},
    {"layout": "balanced"},
    {"top_k": 3},
]
WORKS = [(1, 2, 3), (7, 14, 2.5), (400, 800, 3)]
SCHEDULES = ("apply", "rebuild", "cached")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    return [save_tiny(t, "AutoModelForCausalLM", folder / t) for t in ("gpt2", "llama")]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_names_shapes_and_costs_are_those_of_the_real_modules(recipe, sources):
    for source in sources:
        planned = plan(Recipe(str(source), experts=3, bond_dim=4, **recipe))
        form, experts, top_k = planned.ffns[0].form.parts, planned.recipe.experts, planned.recipe.top_k
        found = shapes.modeling().FeedForward(form, experts, top_k)
        with torch.device("meta"):
            real = modeling_mpoe.FeedForward(form, experts, top_k)
        expected = [(name, tuple(tensor.shape)) for name, tensor in real.state_dict().items()]
        assert [(name, tensor.shape) for name, tensor in found.state_dict().items()] == expected
        assert (found.shared_params, found.own_params) == (real.shared_params, real.own_params)
        for part, real_part in zip(found.parts, real.parts, strict=True):
            assert part.in_float32 == real_part.in_float32
        for work in WORKS:
            for schedule in SCHEDULES:
                costs = found.cost(shapes.modeling().Work(*work), schedule)
                assert costs == real.cost(modeling_mpoe.Work(*work), schedule)
            router = found.router.cost(shapes.modeling().Work(*work), "apply")
            assert router == real.router.cost(modeling_mpoe.Work(*work), "apply")


def test_constants_and_functions_are_those_of_the_file():
    for name in ("FORMAT_VERSION", "CLASS_PREFIX", "MODEL_TYPE_PREFIX", "OPTIONS", "DEFAULT_RULE"):
        assert getattr(shapes.modeling(), name) == getattr(modeling_mpoe, name)
    assert shapes.functions() is modeling_mpoe  # transformers is imported here


CHILD = """
import sys
import torch
from mpoe_convert.runtime import shapes
cores = [torch.arange(1.0, 7).reshape(1, 2, 3, 1), torch.arange(1.0, 5).reshape(1, 2, 2, 1)]
first, second = (core[0, ..., 0] for core in cores)
print(torch.equal(shapes.functions().contract_chain(cores), torch.kron(first, second)))
shapes.modeling().FeedForward
print("transformers" in sys.modules)
"""


def test_functions_of_tensors_need_torch_alone():
    """A chain whose bonds are 1 is the Kronecker product of its cores."""
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
