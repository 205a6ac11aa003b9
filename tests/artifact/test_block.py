"""A config.json that was edited by hand: every command that reads it tells in one line what is wrong."""

import copy
import json

import pytest
from click.testing import CliRunner
from helpers.data import words, write
from helpers.expert_mixtures import save_mixture

from mpoe_convert import Recipe, convert
from mpoe_convert.artifact.block import check_block
from mpoe_convert.artifact.inspect import inspect
from mpoe_convert.cli import main
from mpoe_convert.errors import CheckpointError

# What people may write in the place of a value.
WRONG = {"text": "a", "null": None, "negative": -1, "list": [], "object": {}, "fraction": 0.5}
FREE = ("kind", "base_model_type", "version")  # for people alone, see the guide
# Changes that may be right: fewer layers or projections, another module.
MAY_BE = {"ffns": {"removed"}, "forms": {"removed", "null"}, "family": {"removed", "text", "null"}}


@pytest.fixture(scope="module")
def out(artifact):
    """Of a dense model."""
    return artifact("llama")[1]


@pytest.fixture(scope="module")
def configs(out, artifact, tmp_path_factory):
    """Of experts that differ in size, and of a mixture as source too."""
    folder = tmp_path_factory.mktemp("mixture")
    save_mixture("mixtral", folder / "source")
    convert(Recipe(str(folder / "source"), keep=0.8), folder / "out")
    sizes = artifact("gpt2", kind="low-rank", bond_dim="2/3/4")[1]
    folders = {"dense": out, "mixture": folder / "out", "sizes": sizes}
    return {name: json.loads((each / "config.json").read_text()) for name, each in folders.items()}


def places(value, place=()):
    """Where the values of a JSON document stand, two of a list."""
    keys = [*value] if isinstance(value, dict) else range(len(value))[:2] if isinstance(value, list) else ()
    for key in keys:
        yield (*place, key)
        yield from places(value[key], (*place, key))


def edits(block):
    """(place, what was done, block): every value taken away, or another one in its place."""
    for place in places(block):
        for name in ("removed", *WRONG):
            changed = at = copy.deepcopy(block)
            *parents, last = place
            for key in parents:
                at = at[key]
            if name == "removed":
                del at[last]
            else:
                at[last] = WRONG[name]
            if changed != block and place[0] not in FREE:
                yield place, name, changed


@pytest.mark.parametrize("source", ["dense", "mixture", "sizes"])
def test_whatever_stands_there_is_told_or_may_be(source, configs):
    config, tried = configs[source], 0
    check_block(config, "config.json")
    for place, name, block in edits(config["mpoe"]):
        tried += 1
        try:
            check_block(config | {"mpoe": block}, "out/config.json")
        except CheckpointError as error:
            assert str(error).startswith("'out/config.json'"), (place, name)
            assert "\n" not in str(error) and "expected" in str(error), (place, name, str(error))
        else:
            assert name in MAY_BE.get(place[0], ()), (place, name)
    assert tried > 150


TERM = "mpoe.forms[0].up.terms[0]"
SAID = {
    ("top_k",): ("2", "mpoe.top_k is '2', expected a whole number of at least 1"),
    ("num_experts",): (True, "mpoe.num_experts is True, expected a whole number of at least 1"),
    ("num_experts", ""): (1, "mpoe.top_k is 2, expected at most num_experts, 1"),
    ("ffns", "layers.0"): (3, "mpoe.ffns['layers.0'] is 3, expected the place of a form, 0 to 0"),
    ("family", "slot"): (None, "mpoe.family.slot is None, expected a text"),
    ("forms", 0, "up", "bias"): ("own", 'is \'own\', expected null, "shared", "per-expert" or "once"'),
    ("forms", 0, "up", "terms", 0, "bonds"): (
        [4],
        f"{TERM}.bonds is [4], expected a list of 2 whole",
    ),
    ("forms", 0, "up", "terms", 0, "shared"): ([], f"{TERM}.shared is [], expected a list of 3 times true"),
    ("forms", 0, "up", "terms", 0, "out_dims"): (
        [1, 1, 25],
        "the size of mpoe.forms[0].down is (24, 16), expected (25, 16) beside mpoe.forms[0].up",
    ),
    ("forms", 0, "adapters"): (4, "a form in config.mpoe has the parts ['adapters']"),
    ("format",): (7, "has format 7 of the mpoe block, expected 1"),
}


@pytest.mark.parametrize("place", SAID)
def test_a_value_says_what_was_expected(place, configs):
    config = copy.deepcopy(configs["dense"])
    value, said = SAID[place]
    at = config["mpoe"]
    *parents, last = [key for key in place if key != ""]
    for key in parents:
        at = at[key]
    at[last] = value
    if "gate" in config["mpoe"]["forms"][0] and last == "out_dims":
        config["mpoe"]["forms"][0]["gate"]["terms"][0]["out_dims"] = value
    with pytest.raises(CheckpointError) as caught:
        check_block(config, "out/config.json")
    assert said in str(caught.value)


def widen_a_bond(block):
    block["forms"][0]["up"]["terms"][0]["bonds"][1] += 1


def name_no_number(block):
    block["top_k"] = "2"


COMMANDS = {
    "inspect": [],
    "verify": [],
    "export to dense": ["--to", "dense", "-o", "new"],
    "export to moe": ["--to", "moe", "-o", "new"],
    "prune": ["--experts", "2", "--calibrate", "text.jsonl", "-o", "new"],
    "evaluate": ["--data", "text.jsonl", "--length", "8"],
    "finetune": ["--data", "text.jsonl", "--steps", "1", "--length", "8", "-o", "new"],
    "push": ["me/experts"],
}
FAULTS = {
    "a value": (name_no_number, "out/config.json': mpoe.top_k is '2', expected a whole number of at least 1"),
    "a bond": (
        widen_a_bond,
        "up.terms.0.aux_1 has the shape [3, 16, 4], expected [3, 16, 5] by config.json",
    ),
}


@pytest.fixture
def damaged(out):
    """A function that changes the block in the artifact; it comes back as it was."""
    path = out / "config.json"
    before = path.read_text()

    def damage(change):
        config = json.loads(before)
        change(config["mpoe"])
        path.write_text(json.dumps(config))
        return out

    yield damage
    path.write_text(before)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_ends_in_one_line(command, fault, damaged, tmp_path, monkeypatch):
    change, said = FAULTS[fault]
    folder = damaged(change)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    write(tmp_path / "text.jsonl", [{"text": words(40)}])
    done = CliRunner().invoke(main, [command.split()[0], str(folder), "-q", *COMMANDS[command]])
    assert (done.exit_code, done.stdout) == (1, "")
    assert isinstance(done.exception, SystemExit)
    assert said in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_what_has_no_value_is_no_fault(out, damaged):
    """Keys that a reader needs not are left to people."""
    assert inspect(damaged(lambda block: block.pop("kind"))).config["mpoe"].get("kind") is None
