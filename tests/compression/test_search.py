"""--search: every way that the recipe leaves open is tried, and the nearest to the dense model stays."""

import json
import math
from dataclasses import replace

import pytest
import transformers
from helpers.calibration import batches_for as batches_for
from helpers.calibration import pair
from helpers.tiny import save_tiny, save_tokenizer

from mpoe_convert import Recipe, convert, plan
from mpoe_convert.compression.divergence import Divergence
from mpoe_convert.compression.prepare import alternatives
from mpoe_convert.errors import RecipeError

SEARCH = {"experts": 2, "bond_dim": 2, "noise": 0.0, "keep": 0.8, "search": True}
OPEN = [
    ({}, 12),
    ({"metric": "loss"}, 6),
    ({"metric": "outputs", "allocation": "energy"}, 2),
    ({"metric": "diagonal"}, 3),
    ({"allocation": "loss"}, 2),
    ({"allocation": "uniform", "correct": True}, 2),
    ({"metric": "loss", "allocation": "measured", "correct": True}, 1),
]


@pytest.mark.parametrize(("given", "count"), OPEN, ids=[str(given) for given, _ in OPEN])
def test_what_is_given_stays_and_the_rest_is_tried(given, count):
    recipe = Recipe("model", **SEARCH | given)
    found = alternatives(recipe)
    assert len(found) == len(set(found)) == count
    for way in found:
        assert way == recipe.replace(
            search=False, metric=way.metric, allocation=way.allocation, correct=way.correct
        )
        assert {name: getattr(way, name) for name in given} == given
        assert way.metric and way.allocation


def test_the_nearest_stays_and_is_what_its_own_recipe_gives(tmp_path):
    """Its weights are, byte for byte, those of a conversion by the recipe that the artifact names."""
    _, _, report = pair("gpt2", tmp_path, **SEARCH)
    assert len(report.trials) == 12
    distances = [trial.divergence.distance for trial in report.trials]
    assert len(set(distances)) > 3
    nearest = report.trials[distances.index(min(distances))]
    chosen = report.plan.recipe
    assert (chosen.metric, chosen.allocation, chosen.correct) == (
        nearest.metric,
        nearest.allocation,
        nearest.correct,
    )
    assert not chosen.search and report.divergence == nearest.divergence
    written = json.loads((tmp_path / "out/conversion_report.json").read_text())
    assert [trial["divergence"]["nats"] for trial in written["trials"]] == distances
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out"]
    assert "closest to the dense model of 12 variants" in (tmp_path / "out/README.md").read_text()
    again = straight(tmp_path / "again", chosen)
    assert again.divergence == report.divergence and again.trials == ()
    first, second = (tmp_path / name / "out/model.safetensors" for name in ("", "again"))
    assert first.read_bytes() == second.read_bytes()
    # Another metric than that of the first way, with what is measured in it.
    other = next(t for t in report.trials if (t.metric, t.allocation) == ("outputs", "measured"))
    assert straight(tmp_path / "other", other).divergence == other.divergence


def straight(folder, way):
    """The report of a conversion that is no search."""
    choices = {"metric": way.metric, "allocation": way.allocation, "correct": way.correct, "search": False}
    return pair("gpt2", folder, **SEARCH | choices)[2]


def test_layers_that_share_an_ffn_are_searched_without_corrections(tmp_path):
    _, _, report = pair("albert", tmp_path, **SEARCH)
    assert len(report.trials) == 6 and not any(trial.correct for trial in report.trials)
    with pytest.raises(RecipeError, match="layers share the FFN"):
        pair("albert", tmp_path / "asked", **SEARCH, correct=True)


def test_models_without_logits_are_compared_by_their_hidden_states(tmp_path):
    folder = save_tiny("bert", "AutoModel", tmp_path / "dense")
    dense = transformers.AutoModel.from_pretrained(folder).eval()
    batches = batches_for(dense, "AutoModel", 6)
    recipe = Recipe(str(folder), **SEARCH, metric="outputs")
    report = convert(recipe, tmp_path / "out", calibration=batches)
    assert report.divergence.nats is None
    assert report.divergence.difference == min(trial.divergence.difference for trial in report.trials)


WRONG = [
    ({"keep": None}, "search given without keep; expected keep alone"),
    ({"max_error": 0.5}, "search given with max_error; expected keep alone"),
    ({"search": "yes"}, "search is 'yes'; expected true or false"),
    ({"metric": "weights", "correct": True, "calibrate": "builtin"}, "correct given with metric='weights'"),
    ({}, "search given without calibrate"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[message for _, message in WRONG])
def test_searches_that_cannot_be(wrong, message, tiny_gpt2, tmp_path):
    with pytest.raises(RecipeError, match=message):
        convert(Recipe(str(tiny_gpt2), **SEARCH | wrong), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_compares_nothing(tiny_gpt2):
    with pytest.raises(RecipeError, match="search given to a plan"):
        plan(Recipe(str(tiny_gpt2), **SEARCH, calibrate="builtin"))


def test_outputs_that_are_not_finite_are_never_the_nearest():
    finite = Divergence(10, 3.0, None, None, None)
    assert finite.distance == 3.0
    assert replace(finite, nats=math.nan).distance == replace(finite, nats=math.inf).distance == math.inf
    assert Divergence(10, None, 0.5, None, None).distance == 0.5


def test_command_line(tmp_path):
    from click.testing import CliRunner

    from mpoe_convert.cli import main

    folder = save_tiny("gpt2", "AutoModelForCausalLM", tmp_path / "dense")
    save_tokenizer(folder)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{3 + k * k % 30}" for k in range(4000)))
    asked = [
        str(folder),
        "--experts",
        "2",
        "--bond-dim",
        "2",
        "--keep",
        "0.7",
        "--search",
        "--metric",
        "outputs",
    ]
    asked += ["--calibrate", str(text), "--calibration-tokens", "1024", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(main, asked, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "Search: ways that were tried" in done.output
    rows = [line.split("│")[1:-1] for line in done.output.splitlines() if "│ outputs" in line]
    assert len(rows) == 6
    distances = [float(row[3]) for row in rows]
    assert distances == sorted(distances)
