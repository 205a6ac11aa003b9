"""Every option of every command has a range: what lies inside is taken, what lies outside is told."""

import math
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

from mpoe_convert import Export, Finetuning, Pruning, Recipe
from mpoe_convert.cli import main
from mpoe_convert.errors import RecipeError, RequestError, RunError
from mpoe_convert.options import LARGEST_COUNT, by_name, description, in_home, types_of
from mpoe_convert.training.request import Scoring

REQUESTS = {
    Recipe: {"model": "gpt2", "experts": 8},
    Finetuning: {"model": "m", "data": "d"},
    Scoring: {"model": "m", "data": "d"},
    Export: {},
    Pruning: {"experts": 4, "calibrate": "t"},
}
ABOVE_0 = math.nextafter(0, 1)
FINITE = math.nextafter(math.inf, 0)
COUNT = (1, LARGEST_COUNT)
# (smallest, largest) of every number.
NUMBERS = {
    Recipe: {
        "experts": (2, LARGEST_COUNT),
        "top_k": (1, 8),  # of the 8 experts
        "threshold": (ABOVE_0, math.nextafter(1, 0)),
        "shared_experts": (0, LARGEST_COUNT),
        "parts": (2, 8),  # of the 8 experts, of kind split
        "bond_dim": COUNT,
        "sites": (3, 63),
        "noise": (0, 10),
        "seed": (0, 2**63 - 1),
        "keep": (ABOVE_0, 8),  # a plan knows how much less is the most: tests/compression/test_prepare.py
        "max_error": (ABOVE_0, math.nextafter(1, 0)),
        "calibration_tokens": COUNT,
        "bits": (4, 8),
    },
    Finetuning: {
        "length": COUNT,
        "steps": COUNT,
        "epochs": (ABOVE_0, 1e6),
        "batch_size": COUNT,
        "accumulate": COUNT,
        "learning_rate": (ABOVE_0, FINITE),  # training stops where the loss is not finite
        "central_lr": (0, 1000),
        "auxiliary_lr": (0, 1000),
        "router_lr": (0, 1000),
        "weight_decay": (0, 100),
        "warmup": (0, LARGEST_COUNT),
        "max_grad_norm": (0, FINITE),
        "skip_centre": (0, 1),
        "seed": (0, 2**32 - 1),
        "teacher_weight": (0, math.nextafter(1, 0)),
        "temperature": (ABOVE_0, 1000),
        "hidden_weight": (0, 1e6),
        "eval_every": COUNT,
        "save_every": COUNT,
        "log_every": COUNT,
    },
    Scoring: {
        "length": COUNT,
        "stride": COUNT,
        "batch_size": COUNT,
        "limit": COUNT,
        "seed": (0, 2**63 - 1),
    },
    Export: {"expert": (0, LARGEST_COUNT), "calibration_tokens": COUNT},
    Pruning: {"experts": (2, LARGEST_COUNT), "calibration_tokens": COUNT},
}
# Texts that are read in a way of their own: some that are taken, some that are refused.
TEXTS = {
    "layers": (["0", "0-3,7"], ["", "a", "3-1", "-1", "1.5", "0,", "9" * 5000]),
    "max_shard_size": (
        ["1KB", "2GB", "1GiB"],
        ["", "0", "2", "999", "-1GB", "inf", "nan", "1e9", "9" * 400 + "GB"],
    ),
    "device": (["auto", "cpu", "cuda", "cuda:1", "mps"], ["", "gpu", "cuda:", "cuda:-1", "CPU"]),
    "factors": (["2,2,2x2,2,2", "2,2,2X2,2,2"], ["", "2,2,2", "2,2x2,2", "2,0,2x2,2,2", "2,2,2x2,2"]),
}
# Options without which others are refused.
NEEDED = {
    (Export, "calibration_tokens"): {"calibrate": "t"},
    (Recipe, "parts"): {"kind": "split"},
    (Recipe, "threshold"): {"select": "top-p"},
    (Export, "base"): {"to": "lora"},
    (Export, "base_revision"): {"to": "lora", "base": "b"},
}
# What commands take beside the fields of their requests.
FLAGS = {
    "overwrite",
    "dry_run",
    "resume",
    "stream",
    "timed",
    "private",
    "create_pr",
    "as_json",
    "quiet",
    "verbose",
}
PATHS_AND_NAMES = {"output", "config", "artifact", "repo_id", "branch", "commit_message", "shell", "token"}
OF_COMMANDS = PATHS_AND_NAMES | {"tolerance", "processes", "disk_speed", "compute_speed"}  # tested below


def cases(table):
    return [(request, name) for request, names in table.items() for name in names]


def is_number(each) -> bool:
    hints = {hint for member in types_of(each.type) for hint in (member, *getattr(member, "__args__", ()))}
    return bool(hints & {int, float})


def make(request, **options):
    [name] = options
    return request(**REQUESTS[request] | NEEDED.get((request, name), {}) | options)


def refusal(request, **options) -> str:
    with pytest.raises((RecipeError, RunError)) as error:
        make(request, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def beyond(end: float, by: float) -> float:
    if isinstance(end, int):
        return end + int(by)
    return math.nextafter(end, by * math.inf)


def test_every_option_is_in_a_table_here():
    for request in REQUESTS:
        numbers = {name for name, each in by_name(request).items() if is_number(each)}
        assert numbers == set(NUMBERS[request]), request
        for name, each in by_name(request).items():
            about = description(each)
            if (about.read not in (None, in_home) or about.valid) and name not in numbers:
                assert name in TEXTS, name


def test_every_option_of_every_command_is_a_field_or_known_here():
    fields = {name for request in REQUESTS for name in by_name(request)}
    for command in main.commands.values():
        for param in command.params:
            is_flag = isinstance(param, click.Option) and (param.is_flag or param.count)
            assert param.name in fields | OF_COMMANDS | (FLAGS if is_flag else set()), param.name


@pytest.mark.parametrize(("request_class", "name"), cases(NUMBERS))
def test_a_number_is_taken_up_to_its_ends_and_told_beyond(request_class, name):
    low, high = NUMBERS[request_class][name]
    for end in (low, high):
        assert getattr(make(request_class, **{name: end}), name) == end
    each = by_name(request_class)[name]
    for wrong in (beyond(low, -1), beyond(high, 1), -1, math.nan, math.inf, -math.inf, True, "", "x", [], {}):
        if wrong == [] and name == "bond_dim":
            continue
        said = refusal(request_class, **{name: wrong})
        assert said.startswith(f"{name} is ") and "expected " in said
    if int in types_of(each.type) and float not in types_of(each.type):
        refusal(request_class, **{name: low + 0.5})
        assert type(getattr(make(request_class, **{name: np.int64(low)}), name)) is int
    else:
        assert getattr(make(request_class, **{name: np.float32(0.5)}), name) == 0.5


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_is_read_or_told(name):
    good, bad = TEXTS[name]
    for request in REQUESTS:
        if name not in by_name(request):
            continue
        for text in good:
            assert getattr(make(request, **{name: text}), name) == text
        for text in bad:
            assert refusal(request, **{name: text}).startswith(f"{name} is {text!r}")


@pytest.mark.parametrize("request_class", REQUESTS, ids=lambda cls: cls.__name__)
def test_no_text_is_empty_and_choices_are_told_with_what_was_meant(request_class):
    for name, each in by_name(request_class).items():
        about, members = description(each), types_of(each.type)
        holds_text = any(hint is str or getattr(hint, "__args__", ())[:1] == (str,) for hint in members)
        if not holds_text or name in TEXTS or is_number(each):
            continue
        for empty in ("", " ", "a\0b"):
            assert refusal(request_class, **{name: empty}).startswith(f"{name} is ")
        if about.choices:
            wrong = list(about.choices)[0] + "x"
            assert f"; did you mean {list(about.choices)[0]!r}?" in refusal(request_class, **{name: wrong})


def test_paths_are_taken_where_text_is():
    assert Recipe(Path("m"), calibrate=[Path("a"), "b"], keep=0.5).calibrate == ("a", "b")
    made = Finetuning(Path("m"), Path("a"), eval_data=(Path("b"),), teacher=Path("t"), tokenizer=Path("k"))
    assert (made.model, made.data, made.eval_data, made.teacher) == ("m", ("a",), ("b",), "t")
    assert made.tokenizer == "k" and Export(base=Path("x"), to="lora").base == "x"


COMMANDS = {Recipe: ["plan", "m"], Finetuning: ["finetune", "m", "-o", "o", "--data", "d"]} | {
    Scoring: ["evaluate", "m", "--data", "d"],
    Export: ["export", "a", "-o", "o"],
    Pruning: ["prune", "a", "-o", "o", "--calibrate", "t", "--experts", "4"],
}


@pytest.mark.parametrize("request_class", COMMANDS, ids=lambda cls: cls.__name__)
def test_the_command_line_calls_options_by_their_flags(request_class, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in NUMBERS[request_class]:
        flag = f"--{name.replace('_', '-')}"
        needed = ["--kind", "split"] if name == "parts" else []
        done = CliRunner().invoke(main, [*COMMANDS[request_class], *needed, flag, "-1"])
        assert done.exit_code == 2 and done.stderr.startswith(f"Error: {flag} is "), name
        assert f"{name} is" not in done.stderr or "_" not in name
    assert not list(tmp_path.iterdir())


TOLERANCES = {
    (0, 1e-3, 10, np.float32(0.5)): True,
    (-1, ABOVE_0 * -1, math.nan, math.inf, "0.1", True): False,
}


def test_the_tolerance_of_verify_is_a_finite_number_of_at_least_0(tmp_path):
    from mpoe_convert import verify

    for values, is_good in TOLERANCES.items():
        for value in values:
            with pytest.raises(Exception, match="is not a folder" if is_good else "^tolerance is") as error:
                verify(tmp_path / "none", tolerance=value)
            assert is_good or isinstance(error.value, RequestError)
    done = CliRunner().invoke(main, ["verify", "none", "--tolerance", "-1"])
    assert (done.exit_code, "Error: --tolerance is -1.0; expected" in done.stderr) == (2, True)


@pytest.mark.parametrize(("count", "is_good"), [(1, True), (10_000, True), (0, False), (10_001, False)])
def test_the_processes_of_a_plan_are_a_number_from_1_to_10000(count, is_good):
    done = CliRunner().invoke(main, ["plan", "none", "--processes", str(count)])
    said = "none" if is_good else f"Error: --processes is {count}; expected a whole number from 1 to 10,000"
    assert said in done.stderr and done.exit_code == (1 if is_good else 2)


@pytest.mark.parametrize(
    ("speed", "is_good"), [("1e-300", True), ("1e6", True), ("0", False), ("1000001", False), ("nan", False)]
)
@pytest.mark.parametrize("name", ["--disk-speed", "--compute-speed"])
def test_a_speed_of_a_plan_is_a_number_above_0(name, speed, is_good):
    done = CliRunner().invoke(main, ["plan", "none", "--time", name, speed])
    said = f"Error: {name} is {float(speed):g}; expected a number above 0 and of at most 1e+06"
    assert ("none" if is_good else said) in done.stderr and done.exit_code == (1 if is_good else 2)
    done = CliRunner().invoke(main, ["plan", "none", name, "1"])
    assert f"{name} was given without --time; expected both or neither" in done.stderr
