"""A recipe is resolved in one place: every hole is filled there, and nothing is filled in afterwards."""

import pytest
from helpers.tiny import save_tiny

from mpoe_convert import Recipe, plan
from mpoe_convert.errors import RecipeError
from mpoe_convert.experts import KINDS, load
from mpoe_convert.planning.planner import plan_checkpoint
from mpoe_convert.planning.resolve import resolve_recipe
from mpoe_convert.source.checkpoint import open_checkpoint

SMALL = {"experts": 2, "bond_dim": 2}


@pytest.fixture
def llama(tmp_path):
    return open_checkpoint(str(save_tiny("llama", "AutoModelForCausalLM", tmp_path / "llama")))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_to_the_kind_is_filled_in(kind, llama):
    recipe = Recipe(llama.source, kind=kind, **SMALL)
    found = resolve_recipe(recipe, llama).recipe
    assert recipe.bias is None and found.bias == load(kind).DEFAULT_BIAS
    assert all(getattr(found, name) == value for name, value in found.own_options.resolved(False).items())
    assert found.sites == (3 if kind == "mpo" else None)


@pytest.mark.parametrize(
    ("options", "layout", "sites"),
    [
        ({}, "blocks", 3),
        ({"sites": 5}, "one-sided", 5),
        ({"keep": 0.9}, "one-sided", 3),
        ({"max_error": 0.9}, "one-sided", 3),
        ({"keep": 0.9, "layout": "blocks"}, "blocks", 3),
        ({"layout": "balanced"}, "balanced", 5),
    ],
)
def test_a_chain_s_layout(options, layout, sites, llama):
    """Blocks, but not where all parameters are counted or another number of cores is asked for."""
    found = resolve_recipe(Recipe(llama.source, **SMALL | options), llama).recipe
    assert (found.layout, found.sites) == (layout, sites)
    assert resolve_recipe(found, llama).recipe == found


# Of a recipe, with and without calibration data: metric and allocation.
FITS = {
    "nothing is fitted": ({}, False, (None, None)),
    "truncated chains": ({"layout": "balanced"}, True, ("outputs", None)),
    "truncated chains without data": ({"layout": "balanced"}, False, (None, None)),
    "a budget": ({"keep": 0.9}, True, ("loss", "loss")),
    "a budget without data": ({"keep": 0.9}, False, ("weights", "energy")),
    "a metric": ({"keep": 0.9, "metric": "diagonal"}, True, ("diagonal", "energy")),
    "an allocation": ({"keep": 0.9, "allocation": "uniform"}, True, ("loss", "uniform")),
}


@pytest.mark.parametrize("name", FITS)
def test_what_is_fitted_to(name, llama):
    changes, calibrated, expected = FITS[name]
    found = resolve_recipe(Recipe(llama.source, **SMALL | changes), llama, calibrated=calibrated).recipe
    assert (found.metric, found.allocation) == expected


@pytest.mark.parametrize("metric", ["loss", "outputs", "diagonal"])
def test_metrics_that_need_data(metric, llama):
    recipe = Recipe(llama.source, keep=0.9, metric=metric, **SMALL)
    with pytest.raises(RecipeError, match=f"metric is '{metric}'; expected calibrate with it"):
        resolve_recipe(recipe, llama)


@pytest.mark.parametrize("allocation", ["loss", "measured"])
def test_allocations_that_need_data(allocation, llama):
    recipe = Recipe(llama.source, keep=0.9, allocation=allocation, **SMALL)
    with pytest.raises(RecipeError, match=f"allocation is '{allocation}'; expected calibrate with it"):
        resolve_recipe(recipe, llama)


@pytest.mark.parametrize("kind", KINDS)
def test_resolved_twice_it_is_the_same(kind, llama):
    first = resolve_recipe(Recipe(llama.source, kind=kind, layers="1", **SMALL), llama)
    assert resolve_recipe(first.recipe, llama) == first
    assert first.kept_dense == ("layers.0",) and [ffn.index for ffn in first.ffns] == [1]


def test_the_plan_holds_the_resolved_recipe(llama):
    resolved = resolve_recipe(Recipe(llama.source, **SMALL), llama)
    assert plan_checkpoint(resolved, llama).recipe is resolved.recipe
    assert plan(Recipe(llama.source, **SMALL)).recipe == resolved.recipe
