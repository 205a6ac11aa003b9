"""What a plan says before anything is read: what truncation will cost, and which of two costs is saved."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from helpers.tiny import make_config

from mpoe_convert import Recipe, convert, plan
from mpoe_convert.planning.totals import savings_in_words

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A GPT-2 of one layer whose matrices are random, 64 x 128."""
    config = make_config("gpt2")
    config.n_embd, config.n_inner, config.n_layer = 64, 128, 1
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("random")
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("bond_dim", "heading"),
    [
        (8, "truncation will lose most of the model: "),
        (15, "truncation will change the weights: "),
        (16, ""),
    ],
)
def test_a_plan_warns_of_truncation_as_the_conversion_does(bond_dim, heading, dense, tmp_path):
    recipe = Recipe(
        dense, experts=2, layout="balanced", sites=3, bond_dim=bond_dim, noise=0.0, neuron_order="source"
    )
    foretold = plan(recipe)
    report = convert(recipe, tmp_path / "out")
    if not heading:
        assert foretold.forecasts == [] == foretold.to_json()["warnings"]
        return
    (text,) = foretold.forecasts
    assert text.startswith(heading) and "trained ones lose somewhat less" in text
    assert text in foretold.to_json()["warnings"] and text in " ".join(map(str, foretold.shown()))
    measured = re.search(r"is (0\.\d+)", report.warnings[0])
    estimate = re.search(r"relative error of (0\.\d+)", text)
    assert measured and estimate and abs(float(measured[1]) - float(estimate[1])) < 0.03
    assert text not in report.warnings


def test_chains_that_are_not_truncated_are_not_warned_of(dense):
    for options in ({"bond_dim": 4}, {"kind": "dense"}, {"kind": "low-rank"}, {"layout": "two-sided"}):
        assert plan(Recipe(dense, experts=2, **options)).forecasts == []


@pytest.mark.parametrize(
    ("stored", "flops", "words"),
    [
        (25, 162, "stores 25.0% of the parameters (25), but takes 162.0% of the FLOPs per token (162)."),
        (25, 50, "stores 25.0% of the parameters (25) and takes 50.0% of the FLOPs per token (50)."),
        (100, 100, "stores 100.0% of the parameters (100) and takes 100.0% of the FLOPs per token (100)."),
        (120, 50, "stores 120.0% of the parameters (120), but takes 50.0% of the FLOPs per token (50)."),
    ],
)
def test_which_shares_of_a_plain_moe_are_taken(stored, flops, words, dense):
    totals = replace(
        plan(Recipe(dense, experts=8)).totals,
        stored_params=stored,
        plain_moe_params=100,
        flops_per_token=flops,
        plain_moe_flops_per_token=100,
    )
    assert savings_in_words(totals, 8) == f"Beside a plain MoE of 8 experts it {words}"


def test_the_readme_says_what_its_demo_saves():
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert plan(Recipe(ROOT / "examples/tiny-gpt2", experts=8, bond_dim=64)).savings in readme
