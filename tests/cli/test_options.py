"""One description per option: the command line, the checks, YAML keys and docstrings come from the fields."""

import inspect
import json
import math
import re
from dataclasses import fields

import click
import pytest
from click.testing import CliRunner

from mpoe_convert import Export, Finetuning, Pruning, Recipe, evaluate, experts
from mpoe_convert.cli import main
from mpoe_convert.errors import LibraryError, RecipeError, RunError
from mpoe_convert.exports import targets as exports
from mpoe_convert.options import (
    LARGEST_COUNT,
    OptionGroup,
    again,
    by_name,
    default_of,
    described,
    description,
    option,
    types_of,
)
from mpoe_convert.request import Request, plugin_options
from mpoe_convert.training.request import Scoring

# The request of every command, and what the command has beside its fields.
COMMON = {"as_json", "quiet", "verbose", "token"}
PUSH = {"repo_id", "private", "create_pr", "branch", "commit_message"}
COMMANDS = {
    "convert": (Recipe, {"output", "overwrite", "resume", "stream", "dry_run", "config", *PUSH}),
    "plan": (Recipe, {"config", "processes", "timed", "disk_speed", "compute_speed"}),
    "finetune": (Finetuning, {"output", "resume", "config"}),
    "evaluate": (Scoring, set()),
    "export": (Export, {"artifact", "output", "overwrite", "revision"}),
    "prune": (Pruning, {"artifact", "output", "overwrite"}),
}
# The command line as it was before it was made of fields: none of these may go, each keeps its default.
STABLE = {
    "convert": {"--experts": 8, "--top-k": 2, "--kind": "mpo", "--bond-dim": 64, "--layout": None}
    | {"--sites": None, "--noise": 0.01, "--seed": 0, "--svd": "auto", "--gauge": "canonical"}
    | {"--neuron-order": "auto", "--device": "auto", "--dtype": None, "--max-shard-size": "1GB"}
    | {"--keep": None, "--max-error": None, "--allocation": None, "--metric": None, "--correct": False}
    | {"--search": False, "--calibrate": (), "--calibration-tokens": 65536, "--calibration-split": "train"}
    | {"--text-column": "text", "--target-column": "target", "--ffn": None, "--trust-remote-code": False}
    | {"--revision": None, "--bias": None, "--layers": None, "--include": (), "--exclude": ()}
    | {"--factors": None},
    "finetune": {"--eval-data": (), "--split": "train", "--eval-split": "validation", "--length": None}
    | {"--text-column": "text", "--target-column": "target", "--label-column": "label", "--routed-by": None}
    | {"--task": None, "--tokenizer": None, "--steps": None, "--epochs": 1.0, "--batch-size": 8}
    | {"--accumulate": 1, "--learning-rate": 5e-4, "--central-lr": 1.0, "--auxiliary-lr": None}
    | {"--router-lr": 1.0, "--weight-decay": 0.01, "--schedule": "cosine", "--warmup": 0.05}
    | {"--max-grad-norm": 1.0, "--skip-centre": 0.0, "--skip-unit": "step", "--freeze": ()}
    | {"--teacher": None, "--teacher-weight": 0.5, "--temperature": 2.0, "--hidden-weight": 0.0}
    | {"--precision": "float32", "--seed": 0, "--eval-every": None, "--save-every": 500, "--log-every": 10}
    | {"--report-to": (), "--option": {}, "--set": {}, "--trust-remote-code": False},
    "evaluate": {"--against": None, "--split": "test", "--length": None, "--stride": None, "--batch-size": 8}
    | {"--limit": None, "--device": "auto", "--seed": 0, "--record": False, "--task": None}
    | {"--tokenizer": None, "--text-column": "text", "--target-column": "target", "--label-column": "label"}
    | {"--routed-by": None, "--trust-remote-code": False},
    "export": {"--to": "dense", "--expert": None, "--calibrate": (), "--calibration-tokens": 65536}
    | {"--calibration-split": "train", "--text-column": "text", "--target-column": "target", "--base": None}
    | {"--base-revision": None, "--max-shard-size": "1GB", "--check": True},
}


def params(command: str) -> dict[str, click.Parameter]:
    return {param.name: param for param in main.commands[command].params}


def plain(text: str) -> str:
    return " ".join(text.split())


# ---------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_its_request_s_fields_and_what_is_listed_here(command):
    request, others = COMMANDS[command]
    assert set(params(command)) == set(by_name(request)) | others | COMMON


@pytest.mark.parametrize("command", COMMANDS)
def test_every_field_has_help_and_the_command_shows_it_with_the_default(command):
    page = plain(CliRunner().invoke(main, [command, "--help"], terminal_width=300).output)
    for name, each in by_name(COMMANDS[command][0]).items():
        about, param = description(each), params(command)[name]
        assert about.help.endswith((".", "'", '"')), name
        if isinstance(param, click.Argument):
            continue
        assert plain(about.help) in page, name
        assert param.heading == about.group
        default = default_of(each)
        if isinstance(default, (int, float, str)) and not isinstance(default, bool):
            assert param.help.endswith(f"[default: {about.default_text or default}]"), name


@pytest.mark.parametrize("command", STABLE)
def test_names_and_defaults_stay(command):
    request = COMMANDS[command][0]
    found = {
        name: default_of(by_name(request)[param.name])
        for param in params(command).values()
        if param.name in by_name(request)
        for name in param.opts
        if name.startswith("--")
    }
    assert {name: found.get(name) for name in STABLE[command]} == STABLE[command]
    assert ("--data" in found) == (command in ("finetune", "evaluate"))


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_is_given_by_default(command):
    """What the command line leaves open is for the file and the field to say."""
    for name in by_name(COMMANDS[command][0]):
        param = params(command)[name]
        assert param.default in (None, ()) or not isinstance(param.default, (str, int)), name


def test_a_field_without_help_is_no_option():
    with pytest.raises(TypeError, match="size says nothing of itself"):

        @described
        class Silent(OptionGroup):
            size: int = option(default=3, at_least=1, at_most=9)

    with pytest.raises(
        TypeError, match="size has no range; expected both ends, math.inf where there is none"
    ):

        @described
        class Boundless(OptionGroup):
            size: int = option(default=3, help="Size.", at_least=1)


# -------------------------------------------------------------------------------------------------- values

REQUESTS = {
    Recipe: ("gpt2",),
    Finetuning: ("model", "data.txt"),
    Scoring: ("model", "data.txt"),
    Export: (),
    Pruning: ("text.txt", 4),
}
WRONG = {int: 1.5, float: "1e-3", bool: "yes", str: 3}


@pytest.mark.parametrize("request_class", REQUESTS, ids=lambda cls: cls.__name__)
def test_a_value_of_another_type_is_told_in_one_line(request_class):
    for name, each in by_name(request_class).items():
        if description(each).only:
            continue  # the plug-in's; see below
        first = next(hint for hint in types_of(each.type) if hint is not type(None))
        wrong = "much" if name in ("layers", "max_shard_size") else WRONG.get(first, 3.5)
        positional = [field.name for field in fields(request_class) if not field.kw_only]
        given = dict(zip(positional, REQUESTS[request_class], strict=False))
        with pytest.raises((RecipeError, RunError)) as error:
            request_class(**given | {name: wrong})
        found = str(error.value)
        assert re.match(rf"{name} is {re.escape(repr(wrong))}; expected \S", found), found
        assert "\n" not in found


@pytest.mark.parametrize("request_class", REQUESTS, ids=lambda cls: cls.__name__)
def test_a_request_is_what_its_mapping_says(request_class):
    made = request_class(*REQUESTS[request_class])
    assert request_class.from_mapping(json.loads(json.dumps(made.to_mapping()))) == made
    with pytest.raises((RecipeError, RunError), match=r"the .* has no key 'no_such'; its keys are"):
        request_class.from_mapping({"no-such": 1})
    assert made.replace() == made
    assert repr(made).count("=") == len(REQUESTS[request_class])


def test_ranges_choices_and_lists():
    @described
    class Sample(OptionGroup):
        share: float = option(default=0.5, help="A share.", above=0, at_most=1, such_as=0.3)
        names: tuple[str, ...] = option(default=(), help="Names.", choices=("a", "b"))
        size: int | tuple[int, ...] = option(
            default=1, help="Size.", at_least=1, at_most=99, expected="sizes"
        )
        more: int | None = option(default=None, help="More.", at_least=2, below=9)
        weight: float = option(default=0.0, help="Weight.", at_least=-math.inf, at_most=math.inf)

    assert Sample(names="a").names == ("a",) and Sample(names=["a", "b"]).names == ("a", "b")
    assert Sample(size=[3, 4]).size == (3, 4) and Sample(more=8).more == 8 and Sample(share=1).share == 1
    for wrong, said in (
        ({"share": 0}, "share is 0; expected a number above 0 and of at most 1, such as 0.3"),
        ({"share": float("nan")}, "share is nan; expected a number above 0"),
        ({"share": True}, "share is True; expected a number"),
        ({"names": ("a", "c")}, "names is ('a', 'c'); expected some of a, b"),
        ({"names": "bb"}, "names is 'bb'; expected some of a, b; did you mean 'b'?"),
        ({"names": 3}, "names is 3; expected some of a, b"),
        ({"size": (3, 0)}, "size is (3, 0); expected sizes"),
        ({"weight": float("inf")}, "weight is inf; expected a number"),
        ({"more": 9}, "more is 9; expected a whole number of at least 2 and below 9"),
    ):
        with pytest.raises(RecipeError, match=re.escape(said)):
            Sample(**wrong)


def test_the_docstring_describes_every_field_once():
    for request in REQUESTS:
        doc = inspect.getdoc(request)
        for name in by_name(request):
            assert len(re.findall(rf"^    {name}: \S", doc, re.MULTILINE)) == 1, (request, name)
        assert doc.index("Attributes:") < doc.index("Raises:")
    assert "`metric`" in inspect.getdoc(Recipe) and "--metric" not in inspect.getdoc(Recipe)


def test_evaluate_has_the_fields_of_its_request_in_its_signature():
    found = inspect.signature(evaluate).parameters
    assert set(by_name(Scoring)) <= set(found)
    for name, each in by_name(Scoring).items():
        if each.kw_only:
            assert found[name].default == default_of(each)


# ------------------------------------------------------------------------------------------------ plug-ins


@pytest.mark.parametrize("kind", experts.KINDS)
def test_a_kind_s_options_are_fields_of_the_recipe(kind):
    assert set(by_name(experts.load(kind).Options)) <= set(by_name(Recipe))
    assert type(Recipe("gpt2", kind=kind).own_options) is experts.load(kind).Options
    help = params("convert")["kind"].help
    assert f"{kind}: {experts.load(kind).ABOUT}" in help


@pytest.mark.parametrize("target", exports.TARGETS)
def test_a_target_s_options_are_fields_of_the_export(target):
    module = exports.load(target)
    assert set(by_name(module.Options)) <= set(by_name(Export))
    assert f"{target}: {module.ABOUT}" in params("export")["to"].help
    assert all(isinstance(names, tuple) for names in module.NEEDS.values())


def test_an_option_of_one_plug_in_is_refused_with_another():
    given = {"sites": 3, "factors": "2,2,2x2,2,2", "gauge": "identity", "layout": "balanced", "svd": "exact"}
    for name, value in given.items():
        Recipe("gpt2", kind="mpo", **{name: value})
        for kind in set(experts.KINDS) - {"mpo"}:
            said = f"{name} given with kind={kind!r}; expected with kind='mpo' only"
            with pytest.raises(RecipeError, match=said):
                Recipe("gpt2", kind=kind, **{name: value})
    assert "Only with --kind mpo." in params("convert")["gauge"].help
    with pytest.raises(RecipeError, match="base given with to='moe'; expected with to='lora' only"):
        Export("moe", base="gpt2")


def test_plug_ins_that_read_an_option_each_in_their_way_say_so():
    words = params("convert")["bond_dim"].help
    for kind in ("adapter", "core-space", "low-rank", "mpo"):
        own = description(by_name(experts.load(kind).Options)["bond_dim"]).help
        assert f"{kind}: {own[0].lower()}{own[1:].rstrip('.')}" in words
    assert Recipe("gpt2", kind="mpo", bond_dim="4,8").bond_dim == (4, 8)
    for kind in ("adapter", "core-space", "low-rank"):
        with pytest.raises(RecipeError, match=r"bond_dim is \(4, 8\); expected a whole number of at least 1"):
            Recipe("gpt2", kind=kind, bond_dim=(4, 8))


def test_a_new_plug_in_is_a_class_with_options():
    @described
    class Common(OptionGroup):
        size: int = option(default=1, help="Size.", at_least=1, at_most=9)

    @described
    class Round(Common):
        radius: int = option(default=2, help="Radius.", at_least=1, at_most=LARGEST_COUNT)
        size: int = again(Common, "size", "Diameter.")

    @described
    class Square(Common):
        edge: int = option(default=3, help="Edge.", at_least=1, at_most=9)

    @described
    class Draw(plugin_options("shape", Common, {"round": Round, "square": Square}), Request):
        """What to draw."""

        shape: str = option(default="round", help="The shape.", choices=("round", "square"))

    assert Draw(radius=5).own_options == Round(radius=5)
    assert description(by_name(Draw)["size"]).help == "Size. round: diameter."
    assert description(by_name(Draw)["edge"]).help == "Edge. Only with --shape square."
    with pytest.raises(
        RecipeError, match="radius given with shape='square'; expected with shape='round' only"
    ):
        Draw(shape="square", radius=5)
    with pytest.raises(RecipeError, match="radius is 0; expected a whole number of at least 1"):
        Draw(radius=0)

    @described
    class Other(Common):
        edge: int = option(default=4, help="Edge.", at_least=1, at_most=9)

    with pytest.raises(TypeError, match="the defaults of edge differ between square, other"):
        plugin_options("shape", Common, {"square": Square, "other": Other})


# -------------------------------------------------------------------------------------- optional libraries


def test_only_what_a_task_needs_is_asked_for(artifact, tmp_path, monkeypatch):
    """Perplexity takes no library that scores translations or classes."""
    from importlib.util import find_spec

    gone = {"sacrebleu", "rouge_score", "sklearn", "matplotlib"}
    monkeypatch.setattr(
        "mpoe_convert.extras.find_spec", lambda name: None if name in gone else find_spec(name)
    )
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{3 + k % 30}" for k in range(60)))
    assert evaluate(str(artifact("gpt2")[1]), str(text), length=16).task == "causal"
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "w3 w4", "target": "w5"}))
    needs = r"task seq2seq, needs sacrebleu and rouge_score: .*mpoe-convert\[train\]"
    with pytest.raises(LibraryError, match=needs):
        evaluate(str(artifact("t5")[1]), str(rows))
    from mpoe_convert import draw_pictures

    with pytest.raises(LibraryError, match="report needs matplotlib"):
        draw_pictures(artifact("gpt2")[1])


@pytest.mark.parametrize(
    ("given", "said"), [("router_tasks=[a", "its value is not YAML"), ("router_tasks", "expected NAME=VALUE")]
)
def test_an_assignment_that_cannot_be_read_is_a_usage_error(given, said):
    done = CliRunner().invoke(main, ["finetune", "model", "--data", "d", "-o", "out", "--option", given])
    assert done.exit_code == 2 and said in " ".join(done.stderr.split()) and "Traceback" not in done.output
