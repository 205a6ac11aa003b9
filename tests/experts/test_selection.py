"""Selections on their way from the command line to config.json, plans, cards and logs."""

import re

import pytest
from click.testing import CliRunner
from helpers.data import QUICK, words
from helpers.tiny import INNER

from mpoe_convert import Export, Finetuning, Recipe, convert, export, finetune, plan
from mpoe_convert.cli import main
from mpoe_convert.errors import ExportError, RecipeError
from mpoe_convert.experts.kinds import split
from mpoe_convert.experts.selection import SELECTIONS, THRESHOLD, in_short, in_words
from mpoe_convert.request import read_recipe
from mpoe_convert.runtime.modeling_mpoe import RULES
from mpoe_convert.source.json_files import read_json_object

VARYING = ("top-p", "top-any")


def test_every_selection_is_a_rule():
    assert set(SELECTIONS) == set(RULES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.5}, "threshold given with select='top-k'; expected with select='top-p' only"),
        (
            {"select": "top-any", "threshold": 0.5},
            "threshold given with select='top-any'; expected with select='top-p' only",
        ),
        (
            {"select": "top-p", "top_k": 1},
            "top_k is 1 with select='top-p', whose number of experts per token then never varies; expected "
            "at least 2, or select='top-k'",
        ),
        ({"select": "top-p", "top_k": 9, "experts": 8}, "top_k is 9 with 8 experts; expected 1 to 8"),
    ],
)
def test_what_has_no_meaning_is_told(options, message):
    with pytest.raises(RecipeError) as error:
        Recipe("m", **options)
    assert re.sub(r"[`'\"]", "", str(error.value)) == re.sub(r"[`'\"]", "", message)


def test_a_limit_is_all_experts_unless_it_is_given():
    assert Recipe("m", select="top-p", experts=6).top_k == 6
    assert Recipe("m", select="top-p", experts=6).replace(experts=4).top_k == 4
    assert Recipe("m", select="top-any", experts=6, top_k=2).replace(experts=4).top_k == 2
    assert Recipe("m", experts=6).top_k == 2
    read = Recipe.from_mapping({"model": "m", "select": "top-p", "top_k": 2, "experts": 8})
    assert read.read_from_file({"select", "top_k", "experts"}).replace(seed=1).top_k == 2


def test_in_words():
    assert (
        in_short("top-k", 2, None) == "top 2"
        and in_short("top-any", 4, None) == "top-any, at most 4 per token"
    )
    assert in_short("top-p", 4, 0.9) == "top-p 0.9, at most 4 per token"
    assert in_words("top-k", 2, None) == "of which 2 are chosen per token"
    assert "reach 0.5 (XMoE), at most 3" in in_words("top-p", 3, 0.5)
    assert "learned thresholds it passes (DynMoE), at most 3" in in_words("top-any", 3, None)


@pytest.mark.parametrize("select", VARYING)
def test_plan_config_card_and_recipe(select, tiny_gpt2, tmp_path):
    recipe = Recipe(str(tiny_gpt2), experts=4, bond_dim=4, select=select, top_k=3)
    found = plan(recipe)
    fixed = plan(Recipe(str(tiny_gpt2), experts=4, bond_dim=4, top_k=3))
    assert found.totals.varies and not fixed.totals.varies
    for name in ("active_params", "flops_per_token"):  # of the largest number
        assert getattr(fixed.totals, name) <= getattr(found.totals, name) < 1.01 * getattr(fixed.totals, name)
    rows = [row[""] for row in found.totals.rows("FFNs")]
    assert rows[1::2] == ["FFNs: parameters used per token, at most", "FFNs: FLOPs per token, at most"]
    assert f"(at most {found.totals.flops_per_token:,})" in found.savings
    convert(recipe, tmp_path / "out")
    block = read_json_object(tmp_path / "out" / "config.json")["mpoe"]
    assert block["rule"] == select and block["top_k"] == 3
    assert block.get("threshold") == (THRESHOLD if select == "top-p" else None)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{in_words(select, 3, block.get('threshold'))}. " in card and "and takes at most " in card
    written = read_recipe(tmp_path / "out" / "mpoe_recipe.yaml")
    again = Recipe.from_mapping(written).read_from_file(set(written))
    assert again.replace(seed=0).top_k == 3 and again.select == select
    convert(again, tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "out" / "config.json").read_text()
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "out")])
    assert f"of 4 experts, {in_short(select, 3, block.get('threshold'))}; from" in shown.output


def test_a_fixed_number_leaves_no_trace(tiny_gpt2, tmp_path):
    convert(Recipe(str(tiny_gpt2), experts=4, bond_dim=4), tmp_path / "out")
    assert not {"rule", "threshold"} & read_json_object(tmp_path / "out" / "config.json")["mpoe"].keys()


@pytest.mark.parametrize("select", VARYING)
def test_exports(select, artifact, tmp_path):
    _, out = artifact("llama", select=select)
    with pytest.raises(ExportError, match=f"is no .*, which has no selection rule {select}$"):
        export(out, tmp_path / "moe", Export(to="moe"))
    export(out, tmp_path / "dense", Export(to="dense"))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_training_logs_the_number_of_experts(artifact, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(words(600))
    for select in ("top-any", "top-k"):
        _, out = artifact("gpt2", select=select)
        target = tmp_path / select
        report = finetune(Finetuning(str(out), str(text), **QUICK), target)
        items = [item for entry in report["log"] for item in entry.items()]
        numbers = [value for key, value in items if key.startswith("experts_per_token/")]
        assert len(numbers) == (0 if select == "top-k" else 4) and all(1 <= number <= 3 for number in numbers)
        said = "At step 4 a token went to " in (target / "README.md").read_text()
        assert said == (select != "top-k")


def test_parts_are_exact_only_where_all_are_chosen(tiny_gpt2):
    for select in ("top-k", *VARYING):
        found = plan(Recipe(str(tiny_gpt2), kind="split", experts=4, top_k=4, select=select))
        assert found.is_exact == (select == "top-k")
        said = [
            warning for warning in found.warnings if "as its router chooses, at most 4, of 4 parts" in warning
        ]
        assert bool(said) == (select != "top-k")
    assert INNER % 4 == 0


def test_no_limit_stays_none(tiny_gpt2, tmp_path):
    """What was not given follows the number of experts, and a recipe file does not list it."""
    recipe = Recipe(str(tiny_gpt2), experts=4, bond_dim=4, select="top-p")
    assert (recipe.top_k, recipe.replace(experts=6).top_k, recipe.replace(select="top-k").top_k) == (4, 6, 2)
    convert(recipe, tmp_path / "out")
    listed = read_recipe(tmp_path / "out" / "mpoe_recipe.yaml")
    assert listed["select"] == "top-p" and not {"top_k", "threshold"} & listed.keys()
    assert Recipe.from_mapping(listed | {"select": "top-any", "experts": 6}).top_k == 6
    convert(recipe.replace(top_k=3, threshold=0.5), tmp_path / "limited")
    listed = read_recipe(tmp_path / "limited" / "mpoe_recipe.yaml")
    assert (listed["top_k"], listed["threshold"]) == (3, 0.5)


def test_parts_that_a_selection_leaves_out():
    """By the router that the artifact has: here experts' rows are axes, so that logits are the inputs."""
    import torch

    inputs, rows = torch.tensor([[3.0, 0.0, 0.0], [0.5, 0.4, -1.0]]), torch.eye(3)
    found = split._left_out(inputs, rows, split.Options(experts=3, top_k=3, select="top-p", threshold=0.8))
    assert found.tolist() == [[0, 1, 1], [0, 0, 1]]  # probabilities 0.91, and 0.47 and 0.43
    found = split._left_out(inputs, rows, split.Options(experts=3, top_k=3, select="top-any"))
    assert found.tolist() == [[0, 1, 1], [0, 0, 1]]  # cosines above zero
    found = split._left_out(inputs, rows, split.Options(experts=3, top_k=2))
    assert found.sum(1).tolist() == [1, 1]
