"""Conversions by several processes: equal to those of one, and ended by one line if one of them fails."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers.commands import tree
from helpers.data import words
from helpers.once import made_once
from helpers.quire import AT, save_quire
from helpers.ranks import run_all
from helpers.stock_mixtures import make_model
from helpers.tiny import make_config, save_tiny, save_tokenizer
from transformers import LlamaForCausalLM

from mpoe_convert import Recipe
from mpoe_convert.compression.prepare import prepare
from mpoe_convert.errors import RequestError
from mpoe_convert.planning.shares import share_out
from mpoe_convert.ranks import Ranks, is_first, joined
from mpoe_convert.source.opening import open_source

SHARDS = ["--max-shard-size", "4KB", "-q"]
SMALL = ["--experts", "2", "--bond-dim", "4", *SHARDS]
CALIBRATED = ["--calibrate", "text.txt", "--calibration-tokens"]
CUT = ["--keep", "0.6", *CALIBRATED]
BUDGET = ["--keep", "0.9", "--correct", "--metric", "loss", *CALIBRATED, "1280"]


# By how many processes; "few" has two batches for three of them. The slow tests run more.
COUNTS = {"blocks": (1, 2), "budget": (1, 2, 3), "few": (1, 3), "mixture": (1, 2), "list": (1, 2)}
# What is run is packed and unpacked by compressed-tensors.
ROUNDED = ["--bits", "8", "--keep", "0.95", *CALIBRATED, "640"]
COUNTS["rounded"] = (1, 2) if find_spec("compressed_tensors") else ()
SLOW = {"few": (1, 3), "budget": (3,), "list": (1, 2), "rounded": (1, 2)}
SLOW_EVENTS = ("full", "calibrating nan", "calibrating kill", "evaluate nan")
LISTED = pytest.param("list", marks=pytest.mark.slow)
SHAPES = {"a": (torch.Size([3]), torch.float32), "b": (torch.Size([2]), torch.float64)}
CALIBRATED_CASES = ("budget", pytest.param("few", marks=pytest.mark.slow), "mixture")


def counts_of(case: str, config: pytest.Config) -> list[int]:
    """By how many processes a case is run: fewer without the slow tests."""
    return [n for n in COUNTS[case] if slow_too(config) or n not in SLOW.get(case, ())]


def slow_too(config: pytest.Config) -> bool:
    return config.option.markexpr != "not slow"


@pytest.fixture(scope="module")
def ran(pytestconfig, tmp_path_factory):
    """(folder, {name: what came of it}) of all runs."""
    return made_once(tmp_path_factory, "ranks", lambda folder: run_cases(folder, pytestconfig))


def run_cases(folder, config):
    """{name: what came of it} of all runs there."""
    write_sources(folder)
    runs = all_runs(config)
    found = dict(zip(runs, run_all(list(runs.values()), folder), strict=True))
    for number, name in enumerate(runs):
        found[name]["moments"] = folder / f"moments-{number}"
    return found


def write_sources(folder):
    save_tiny("llama", "AutoModelForCausalLM", folder / "llama")
    save_tokenizer(folder / "llama")
    config = make_config("llama")
    config.hidden_size, config.intermediate_size, config.max_position_embeddings = 64, 96, 64
    LlamaForCausalLM(config).save_pretrained(folder / "wide")  # with cores that are rounded
    save_tokenizer(folder / "wide")
    mixtral = make_model("mixtral")
    mixtral.config.max_position_embeddings = 64
    mixtral.save_pretrained(folder / "mixtral")
    save_tokenizer(folder / "mixtral")
    save_quire(folder / "quire", bound=False)
    (folder / "text.txt").write_text(words(4000), encoding="utf-8")


def all_runs(config):
    """{name: run} for `run_all`."""
    cases = {
        "blocks": ["llama", *SMALL],
        "budget": ["llama", *BUDGET, *SMALL],
        "few": ["llama", "--kind", "split", "--experts", "3", *CALIBRATED, "128", *SHARDS],
        "list": ["quire", "--trust-remote-code", "--experts-at", AT, *CUT, "1024", *SHARDS],
        "mixture": ["mixtral", *CUT, "640", *SHARDS],
        "rounded": ["wide", *ROUNDED, *SMALL],
    }
    runs = {}
    for case, args in cases.items():
        for count in counts_of(case, config):
            runs[f"{case} {count}"] = {"args": [*args, "-o", f"{case}-{count}"], "count": count}
    for event in ("nan", "kill", "full"):
        args = [*cases["blocks"], "-o", event]
        runs |= {event: {"args": args, "count": 2, event: [1, 1]}}
    resumed = {"args": [*cases["blocks"], "--resume", "-o", "resumed"]}
    runs |= {"left": resumed | {"count": 2, "kill": [1, 2]}, "resumed": resumed | {"count": 3}}
    for event in ("nan", "kill"):
        args = [*cases["budget"], "-o", f"calibrating-{event}"]
        runs[f"calibrating {event}"] = {"args": args, "count": 2, "calibrating": [1, event]}
    scored = ["evaluate", "llama", "--data", "text.txt", "--length", "32", "--limit", "50", "--json"]
    for count in counts_of("rounded", config):
        args = ["evaluate", "rounded-1", *scored[2:], "--trust-remote-code"]
        runs[f"evaluate rounded {count}"] = {"args": args, "count": count}
    for count in (1, 3):
        runs[f"evaluate {count}"] = {"args": [*scored, "--batch-size", "4"], "count": count}
    runs["evaluate nan"] = {"args": scored, "count": 2, "scoring": 1}
    runs["one file"] = {"args": ["llama", "--experts", "2", "-q", "-o", "one"], "count": 3}
    runs["no source"] = {"args": ["absent", "-q", "-o", "absent-out"], "count": 2}
    if slow_too(config):
        return runs
    return {name: run for name, run in runs.items() if name not in SLOW_EVENTS}


@pytest.mark.parametrize("case", ["blocks", LISTED, *CALIBRATED_CASES])
def test_several_processes_write_what_one_writes(ran, case, pytestconfig):
    folder, runs = ran
    for count in counts_of(case, pytestconfig):
        assert (runs[f"{case} {count}"]["codes"], runs[f"{case} {count}"]["stderr"]) == ([0] * count, "")
    alone, *shared = (tree(folder / f"{case}-{count}") for count in counts_of(case, pytestconfig))
    assert len([name for name in alone if name.endswith(".safetensors")]) > 3
    assert all(each == alone for each in shared)


@pytest.mark.slow
def test_several_processes_round_what_one_rounds(ran):
    """And the first one alone runs it, to measure what that changes."""
    pytest.importorskip("compressed_tensors")
    folder, runs = ran
    assert [runs[f"rounded {n}"]["codes"] for n in (1, 2)] == [[0], [0, 0]], runs["rounded 2"]["stderr"]
    alone, shared = (tree(folder / f"rounded-{n}") for n in (1, 2))
    assert alone == shared
    report = json.loads((folder / "rounded-2/conversion_report.json").read_text())
    assert report["divergence"]["tokens"] and report["rounding"]["errors"]


@pytest.mark.slow
def test_scores_of_a_rounded_model_by_several_processes_are_those_by_one(ran):
    pytest.importorskip("compressed_tensors")
    _, runs = ran
    one, two = runs["evaluate rounded 1"], runs["evaluate rounded 2"]
    assert (one["codes"], two["codes"]) == ([0], [0, 0]), two["stderr"]
    alone, shared = (
        json.loads(re.search(r"^\{$.*^\}$", run["stderr"], re.M | re.S)[0]) for run in (one, two)
    )
    assert alone == shared and alone["units"] == 50  # behind the library's progress bars


@pytest.mark.parametrize("case", CALIBRATED_CASES)
def test_several_processes_find_the_moments_that_one_finds(ran, case, pytestconfig):
    """To the last bit; none has read what another run has left."""
    _, runs = ran
    alone, *shared = (tree(runs[f"{case} {count}"]["moments"]) for count in counts_of(case, pytestconfig))
    assert alone and all(each == alone for each in shared)


def test_an_error_of_one_process_is_told_once_and_leaves_nothing(ran):
    folder, runs = ran
    assert runs["nan"]["codes"] == [1, 1]
    assert re.fullmatch(r"Error: process 1: \S+ holds NaN or Inf .*\n", runs["nan"]["stderr"])
    assert not list(folder.glob("*nan*"))


@pytest.mark.slow
def test_a_full_disk_of_one_process_is_told_once(ran):
    folder, runs = ran
    assert runs["full"]["codes"] == [1, 1]
    assert runs["full"]["stderr"] == (
        "Error: process 1: the disk is full; nothing was left at 'full': free some space and run again\n"
    )
    assert not list(folder.glob("*full*"))


def test_a_process_that_is_killed_ends_the_run(ran):
    folder, runs = ran
    assert runs["kill"]["codes"] == [1, -9]
    assert runs["kill"]["stderr"] == (
        "Error: another process of this run has ended before its work was done, perhaps for lack of memory; "
        "no output was written, run it again\n"
    )
    assert not list(folder.glob("*kill*"))


def test_what_is_left_of_a_killed_process_is_taken_up_by_another_number(ran):
    """No file twice, and none that the first ones have not finished."""
    folder, runs = ran
    left, resumed = runs["left"], runs["resumed"]
    assert left["codes"] == [1, -9] and len(left["stderr"].splitlines()) == 1, left["stderr"]
    assert (resumed["codes"], resumed["stderr"]) == ([0, 0, 0], "")
    assert tree(folder / "resumed") == tree(folder / "blocks-1")
    assert left["made"] and sorted(left["made"] + resumed["made"]) == sorted(runs["blocks 1"]["made"])
    assert [path.name for path in folder.glob("*resumed*")] == ["resumed"]


@pytest.mark.slow
def test_what_one_process_meets_in_its_batches_is_told_once(ran):
    folder, runs = ran
    assert runs["calibrating nan"]["codes"] == [1, 1]
    assert re.fullmatch(
        r"Error: process 1: the dense model's activations at layers\.0 \(inputs\) hold NaN or Inf; .*\n",
        runs["calibrating nan"]["stderr"],
    )
    assert not list(folder.glob("*calibrating-nan*"))


@pytest.mark.slow
def test_a_process_that_is_killed_in_its_batches_ends_the_run(ran):
    folder, runs = ran
    assert runs["calibrating kill"]["codes"] == [1, -9]
    assert runs["calibrating kill"]["stderr"] == runs["kill"]["stderr"]
    assert not list(folder.glob("*calibrating-kill*"))


def test_scores_of_several_processes_are_those_of_one(ran):
    """To the last digit, and printed once."""
    _, runs = ran
    assert runs["evaluate 1"]["codes"] == [0] and runs["evaluate 3"]["codes"] == [0] * 3
    alone, shared = (json.loads(runs[f"evaluate {count}"]["stderr"]) for count in (1, 3))
    assert alone == shared and alone["units"] == 50


@pytest.mark.slow
def test_what_one_process_meets_in_scoring_is_told_once(ran):
    _, runs = ran
    assert runs["evaluate nan"]["codes"] == [1, 1]
    assert re.fullmatch(r"Error: process 1: llama holds NaN .*\n", runs["evaluate nan"]["stderr"])


def test_wrong_requests_are_told_once(ran):
    _, runs = ran
    assert runs["one file"]["codes"] == [2, 2, 2]
    assert re.fullmatch(
        r"Error: 3 processes have one weight file to write; expected one for each: "
        r"--max-shard-size 1MB\n",
        runs["one file"]["stderr"],
    )
    assert runs["no source"]["stderr"].count("Error: ") == 1 and runs["no source"]["codes"] == [1, 1]


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan") / "llama"
    save_tiny("llama", "AutoModelForCausalLM", folder)
    recipe = Recipe(str(folder), experts=2, bond_dim=4, max_shard_size="4KB")
    return prepare(recipe, open_source(recipe.model)).plan


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shares_are_neighbours_of_about_equal_work(plan, count):
    shares = share_out(plan, count)
    assert [file for share in shares for file in share] == list(plan.shards)
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    work = {
        file: sum(tensors[name].num_bytes * (10 if tensors[name].ffn else 1) for name in names)
        for file, names in plan.shards.items()
    }
    mean = sum(work.values()) / count
    assert all(abs(sum(work[file] for file in share) - mean) <= max(work.values()) for share in shares)


def test_finished_files_are_nobodys_work(plan):
    done = list(plan.shards)[:3]
    shares = share_out(plan, 2, done)
    assert [file for share in shares for file in share] == list(plan.shards)[3:] and all(shares)


def test_a_single_file_is_not_shared(plan, monkeypatch):
    monkeypatch.setitem(plan.__dict__, "shards", {"model.safetensors": tuple(t.name for t in plan.tensors)})
    assert share_out(plan, 1) == [["model.safetensors"]]
    with pytest.raises(RequestError, match=r"^2 processes have one weight file .* max_shard_size='1MB'$"):
        share_out(plan, 2)


def test_a_rank_without_torchrun_speaks(monkeypatch):
    """Operators of clusters set RANK for programs that do not share their work."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert is_first()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert not is_first()


def test_whoever_is_not_asked_works_alone(monkeypatch):
    """A program of several processes that converts in one of them does not wait for the others."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with joined(distributed=False) as ranks:
        assert ranks == Ranks() and ranks.is_first
    assert Path(str(ranks.device("cpu"))) == Path("cpu")


class Unmovable:
    """Sums that leave their device only with more memory than there is."""

    shape, dtype = torch.Size([3]), torch.float32

    def cpu(self):
        raise RuntimeError("out of memory")


def no_memory(*args, **options):
    raise RuntimeError("out of memory")


@pytest.mark.parametrize(("sums", "exchanges"), [({"a": Unmovable()}, 0), ({}, 1)])
def test_a_sum_without_memory_fails_where_the_others_hear_of_it(monkeypatch, sums, exchanges):
    """Exchanges of objects carry errors; who fails between two reductions would leave the others waiting."""
    done = []
    monkeypatch.setattr(Ranks, "_exchange", lambda self, value: done.append("exchange") or [value, SHAPES])
    monkeypatch.setattr(Ranks, "_talk", lambda self, exchange: done.append("reduce"))
    monkeypatch.setattr(torch, "zeros", no_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        Ranks(1, 2).add_up(sums)
    assert done == ["exchange"] * exchanges
