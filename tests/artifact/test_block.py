"""A config.json that was edited by hand: every command that reads it tells in one line what is wrong."""

import copy
import json
import math
import re
import shutil

import pytest
from click.testing import CliRunner
from helpers.data import words, write
from helpers.expert_mixtures import save_mixture
from safetensors.torch import load_file, save_file

from mpoe_convert import Recipe, convert
from mpoe_convert.artifact import block as block_file
from mpoe_convert.artifact.block import check_block, check_folder
from mpoe_convert.artifact.inspect import inspect
from mpoe_convert.artifact.reader import open_artifact
from mpoe_convert.cli import main
from mpoe_convert.errors import CheckpointError

# What people may write in the place of a value.
WRONG = {"text": "a", "null": None, "negative": -1, "list": [], "object": {}, "fraction": 0.5}
FREE = ("kind", "base_model_type")  # for people alone, see the guide
# Changes that may be right: fewer layers, projections or terms, another module.
MAY_BE = {
    "an entry of ffns": {"removed"},
    **dict.fromkeys(["gate", "adapter", "an entry of terms", "by_expert"], {"removed"}),
    **dict.fromkeys(["parts", "shared_experts"], {"removed"}),
    **dict.fromkeys(["slot", "activation", "experts"], {"text"}),
    **dict.fromkeys(["inner_dropout", "outer_dropout"], {"text", "null"}),
    "absorbed": {"list"},
    "an entry of absorbed": {"removed", "text"},
    "untied": {"removed", "null"},
    "bias": {"null"},
    "threshold": {"fraction"},
}
# By the guide to the format.
KEYS = {
    *("format", "num_experts", "top_k", "ffns", "forms", "family", "parts", "shared_experts", "rule"),
    *(
        "threshold",
        "up",
        "down",
        "gate",
        "adapter",
        "terms",
        "bias",
        "in_dims",
        "out_dims",
        "bonds",
        "shared",
    ),
    *("untied", "by_expert", "slot", "absorbed", "activation", "inner_dropout", "outer_dropout"),
    *("adds_residual", "experts"),
}


@pytest.fixture(scope="module")
def out(artifact):
    """Of a dense model."""
    return artifact("llama")[1]


@pytest.fixture(scope="module")
def of_mixture(tmp_path_factory):
    """Of a mixture as source."""
    folder = tmp_path_factory.mktemp("mixture")
    save_mixture("mixtral", folder / "source")
    convert(Recipe(str(folder / "source"), keep=0.8), folder / "out")
    return folder / "out"


RECIPES = {
    "sizes": ("gpt2", {"kind": "low-rank", "bond_dim": "2/3/4"}),
    "adapter": ("gpt2", {"kind": "adapter"}),
    "top-p": ("gpt2", {"select": "top-p", "threshold": 0.7}),
    "split": ("gpt2", {"kind": "split", "experts": 4, "parts": 2, "shared_experts": 1}),
}


@pytest.fixture(scope="module")
def configs(out, of_mixture, artifact):
    made = {name: artifact(model_type, **recipe)[1] for name, (model_type, recipe) in RECIPES.items()}
    folders = {"dense": out, "mixture": of_mixture, **made}
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


def named(place):
    """The key of a value, or of the list or the layers that it is an entry of."""
    last = place[-1]
    return f"an entry of {place[-2]}" if isinstance(last, int) or place[:-1] == ("ffns",) else last


@pytest.mark.parametrize("source", ["dense", "mixture", *RECIPES])
def test_whatever_stands_there_is_told_or_may_be(source, configs):
    config = configs[source]
    check_block(config, "config.json")
    for place, name, block in edits(config["mpoe"]):
        try:
            check_block(config | {"mpoe": block}, "out/config.json")
        except CheckpointError as error:
            assert str(error).startswith("'out/config.json'"), (place, name)
            assert "\n" not in str(error) and "expected" in str(error), (place, name, str(error))
        else:
            assert name in MAY_BE.get(named(place), ()), (place, name)


def test_every_key_of_the_format_is_tried(configs):
    tried = {named(place) for config in configs.values() for place, *_ in edits(config["mpoe"])}
    assert {key for key in tried if not key.startswith("an entry of ")} == KEYS


TERM = "mpoe.forms[0].up.terms[0]"
SAID = [
    (("top_k",), "2", "mpoe.top_k is '2', expected a whole number of at least 1"),
    (("num_experts",), True, "mpoe.num_experts is True, expected a whole number of at least 1"),
    (("num_experts",), 1, "mpoe.top_k is 2, expected at most num_experts, 1"),
    (("parts",), 2, "mpoe.parts is 2, expected a divisor of num_experts, 3"),
    (("rule",), "best", "mpoe.rule is 'best', expected one of expert-choice, top-any, top-k, top-p: "),
    (("rule",), "top-p", "mpoe.threshold is missing, expected a number above 0 and below 1"),
    (("threshold",), 0.5, "mpoe.threshold is 0.5, expected none beside the rule top-k"),
    (("ffns", "layers.0"), 3, "mpoe.ffns['layers.0'] is 3, expected the place of a form, 0 to 0"),
    (("family", "slot"), None, "mpoe.family.slot is None, expected text"),
    (("forms", 0, "up", "bias"), "own", 'is \'own\', expected null, "shared", "per-expert" or "once"'),
    (
        ("forms", 0, "up", "terms", 0, "bonds"),
        [4],
        f"{TERM}.bonds is [4], expected a list of 2 whole",
    ),
    (("forms", 0, "up", "terms", 0, "shared"), [], f"{TERM}.shared is [], expected a list of 3 times true"),
    (
        ("forms", 0, "up", "terms", 0, "out_dims"),
        [1, 1, 25],
        "the size of mpoe.forms[0].down is (24, 16), expected (25, 16) beside mpoe.forms[0].up",
    ),
    (("forms", 0, "adapters"), 4, "a form in config.mpoe has the parts ['adapters']"),
    (("format",), 7, "has format 7 of the mpoe block, expected 1"),
]


@pytest.mark.parametrize(("place", "value", "said"), SAID)
def test_a_value_says_what_was_expected(place, value, said, configs):
    config = copy.deepcopy(configs["dense"])
    at = config["mpoe"]
    *parents, last = place
    for key in parents:
        at = at[key]
    at[last] = value
    if "gate" in config["mpoe"]["forms"][0] and last == "out_dims":
        config["mpoe"]["forms"][0]["gate"]["terms"][0]["out_dims"] = value
    with pytest.raises(CheckpointError) as caught:
        check_block(config, "out/config.json")
    assert said in str(caught.value)


# Of an option at the top level of the config, by its default: what people may write, and what was expected.
NO_OPTION = {
    "router_z_loss_coef": (["high", None, True, math.nan], "a number"),
    "router_capacity_factor": (["high", [1.5]], "a number or null"),
    "mpoe_cache_bytes": (["1 GB", 0.5], "a whole number or null"),
    "output_router_logits": (["yes", 1], "true or false"),
    "router_tasks": (["a, b", ["a", 1]], "a list of texts or null"),
    "mpoe_schedule": (["fast", None, ["auto"]], "one of auto, apply, rebuild, cached"),
}


@pytest.mark.parametrize("name", NO_OPTION)
def test_an_option_says_what_was_expected(name, configs):
    found, expected = NO_OPTION[name]
    for value in found:
        with pytest.raises(CheckpointError) as caught:
            check_block(configs["dense"] | {name: value}, "out/config.json")
        said = f"'out/config.json': {name} is {value!r}, expected {expected}: take config.json as it came"
        assert str(caught.value).startswith(said)


def test_a_number_that_no_float_holds_is_told(configs):
    with pytest.raises(CheckpointError, match="router_z_loss_coef is 1000.*expected a number: "):
        check_block(configs["dense"] | {"router_z_loss_coef": 10**400}, "out/config.json")


def test_options_of_the_routers_of_a_source_are_its_own(configs):
    """Some have a number where ours is a text; those of the experts are ours."""
    config = configs["mixture"] | {"router_combine": 3, "output_router_logits": None}
    check_block(config, "config.json")
    with pytest.raises(CheckpointError, match="mpoe_cache is 'most', expected one of off, hit, all: "):
        check_block(config | {"mpoe_cache": "most"}, "config.json")


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


def changed(source, folder, rename):
    """A copy of an artifact, whose tensors have the names that `rename` gives; None: left out."""
    shutil.copytree(source, folder)
    named = {rename(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    named.pop(None, None)
    save_file(named, folder / "model.safetensors", {"format": "pt"})
    return folder


def without(pattern, source, folder):
    return changed(source, folder, lambda name: None if re.search(pattern, name) else name)


GONE = {
    "a layer": ("dense", r"\.layers\.1\.mlp\.", "(layers.1)"),
    "all layers": ("dense", r"\.mlp\.", "(layers.0, layers.1)"),
    "experts of a layer": ("mixture", r"\.layers\.1\..*\.mixture\.", "(layers.1)"),
}


@pytest.mark.parametrize("what", GONE)
def test_a_mixture_without_any_tensor_is_told(what, out, of_mixture, tmp_path):
    source, gone, paths = GONE[what]
    source = {"dense": out, "mixture": of_mixture}[source]
    folder = without(gone, source, tmp_path / "out")
    for read in (inspect, check_folder, open_artifact):
        with pytest.raises(CheckpointError, match="has no tensors of the mixtures") as caught:
            read(str(folder))
        assert paths in str(caught.value)


def test_a_mixture_that_has_its_down_projection_alone_names_the_rest(out, tmp_path):
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\..* is missing, expected \["):
        inspect(without(r"\.layers\.1\.mlp\.(?!down\.)", out, tmp_path / "out"))


def test_a_stack_may_be_left_out(artifact, tmp_path):
    """As `T5EncoderModel` saves it; a layer of the encoder may not."""
    source = artifact("t5")[1]
    inspect(without(r"^decoder\.", source, tmp_path / "encoder"))
    with pytest.raises(CheckpointError, match=r"\(encoder\.block\.1\.layer\.1\)"):
        inspect(without(r"^encoder\.block\.1\.layer\.1\.", source, tmp_path / "damaged"))


@pytest.mark.parametrize("command", ["finetune", "evaluate"])
def test_tensors_that_other_libraries_rounded_are_left_to_them(command, out, tmp_path, monkeypatch):
    """Their names are not those of config.json, and the commands have a word of their own for them."""
    folder = changed(out, tmp_path / "out", lambda name: re.sub("central_0$", "central_0.weight", name))
    with pytest.raises(CheckpointError, match="central_0 is missing"):
        check_folder(str(folder))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "eighths"}
    (folder / "config.json").write_text(json.dumps(config))
    check_folder(str(folder))
    assert inspect(folder).bits is None
    write(tmp_path / "text.jsonl", [{"text": words(40)}])
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, [command, str(folder), "-q", *COMMANDS[command]])
    said = {"finetune": "has rounded weights (eighths)", "evaluate": "would be random numbers"}[command]
    assert done.exit_code == 1 and said in done.stderr and "is missing" not in done.stderr


def test_the_shapes_of_a_form_are_worked_out_once_for_all_mixtures(artifact, monkeypatch):
    """Opening checks the block, then the tensors: both by the same shapes."""
    asked, shapes = [], block_file.mixture_shapes
    monkeypatch.setattr(block_file, "mixture_shapes", lambda *args: asked.append(1) or shapes(*args))
    folder = artifact("t5")[1]
    check_folder(str(folder))
    checked = len(asked)
    opened = open_artifact(str(folder))
    forms = len(opened.checkpoint.config["mpoe"]["forms"])
    assert len(opened.mixtures) > forms
    assert checked == forms and len(asked) == 2 * forms
