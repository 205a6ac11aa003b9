"""What the processes of a conversion move, against what its parts read and write."""

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from helpers.stock_mixtures import make_model
from helpers.tiny import save_tiny

from mpoe_convert import Recipe, plan
from mpoe_convert.cli import main
from mpoe_convert.compression.mixtures import prepare_mixture
from mpoe_convert.compression.prepare import prepare
from mpoe_convert.conversion import times
from mpoe_convert.conversion.convert import _Builder
from mpoe_convert.planning.shares import Costs, plan_shares, share_out
from mpoe_convert.source.in_memory import InMemory
from mpoe_convert.source.opening import open_source


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shares")
    for model_type in ("llama", "phi3"):  # phi3 has gate and up in one tensor
        save_tiny(model_type, "AutoModelForCausalLM", folder / model_type)
    make_model("mixtral").save_pretrained(folder / "mixtral")
    return folder


def prepared(folder, **options):
    recipe = Recipe(str(folder), max_shard_size="4KB", **options)
    checkpoint = open_source(recipe.model)
    if isinstance(checkpoint, InMemory):
        return checkpoint, prepare_mixture(recipe, checkpoint)
    return checkpoint, prepare(recipe, checkpoint)


CASES = {
    "llama": {"experts": 2, "bond_dim": 4},
    "phi3": {"experts": 2, "bond_dim": 4, "dtype": "bfloat16"},
    "mixtral": {"keep": 0.6},
}
SMALL = {"experts": 2, "bond_dim": 4}


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_bytes_are_those_that_each_process_moves(folders, case, count, monkeypatch):
    checkpoint, made = prepared(folders / case, **CASES[case])
    shares = plan_shares(made.plan, count).each
    read, cls = [], type(checkpoint)
    original = cls.read

    def noted(self, name):
        tensor = original(self, name)
        read.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(cls, "read", noted)
    for share, files in zip(shares, share_out(made.plan, count), strict=True):
        read.clear()
        builder = _Builder(made, checkpoint, files, torch.device("cpu"), None)
        tensors = [builder.take(name) for file in files for name in made.plan.shards[file]]
        assert share.read_bytes == sum(read)
        assert share.written_bytes == sum(tensor.nbytes for tensor in tensors)
        assert not builder.pending  # what belongs into another process's files is not kept
        assert share.files == len(files) and share.ffns == builder.num_ffns
    assert sum(share.work for share in shares) == pytest.approx(1)


def test_files_without_numbers_are_shared_out(folders):
    _, made = prepared(folders / "llama", **SMALL)
    last = list(made.plan.shards)[-1]
    emptied = [
        replace(tensor, shape=(0,)) if tensor.name in made.plan.shards[last] else tensor
        for tensor in made.plan.tensors
    ]
    empty = replace(made.plan, tensors=tuple(emptied))
    finished = set(empty.shards) - {last}
    assert sorted(share_out(empty, 2, finished), key=len) == [[], [last]]


def test_memory_of_a_process_is_that_of_its_own_files(folders):
    _, made = prepared(folders / "llama", experts=2, bond_dim=4)
    plan = made.plan
    assert plan_shares(plan, 1).each[0].peak_bytes == plan.peak_bytes
    shares = plan_shares(plan, 5).each
    assert max(share.peak_bytes for share in shares) == plan.peak_bytes
    alone = next(file for file in plan.shards if not plan.ffns_in([file]))
    copied = sum(tensor.num_bytes for tensor in plan.tensors if tensor.name in plan.shards[alone])
    assert plan.peak_of([alone]) == copied and plan.peak_of([]) == 0


def test_the_command_shows_and_prints_them(folders):
    args = ["plan", str(folders / "llama"), "--experts", "2", "--bond-dim", "4", "--max-shard-size", "4KB"]
    shown = CliRunner().invoke(main, [*args, "--processes", "3"])
    assert shown.exit_code == 0 and "At most " in shown.output and "Processes" in shown.output
    found = json.loads(CliRunner().invoke(main, [*args, "--processes", "3", "--json"]).output)
    assert len(found["processes"]) == 3 and sum(each["files"] for each in found["processes"]) == len(
        found["shards"]
    )
    assert "processes" not in json.loads(CliRunner().invoke(main, [*args, "--json"]).output)


def test_times_follow_from_the_costs_of_the_parts(folders):
    """Bytes by the disk's speed, FFNs by their seconds; the slowest process, or the one disk."""
    _, made = prepared(folders / "llama", experts=2, bond_dim=4)
    plan = made.plan
    seconds = {ffn.ffn.key: 2.0 + number for number, ffn in enumerate(plan.ffns)}
    for disk in (1e2, 1e12):
        for count in (1, 2, 3):
            shares = plan_shares(plan, count, Costs(disk, seconds))
            for files, share in zip(share_out(plan, count), shares.each, strict=True):
                made_here = {plan.by_name[name].ffn for file in files for name in plan.shards[file]} - {None}
                expected = share.read_bytes / disk + sum(seconds[key] for key in made_here)
                assert share.seconds == pytest.approx(expected)
            moved = sum(share.read_bytes + share.written_bytes for share in shares.each) / disk
            assert shares.seconds == pytest.approx(max(moved, *(share.seconds for share in shares.each)))
    assert plan_shares(plan, 2).seconds is None


@pytest.mark.parametrize(
    ("folder", "options"),
    [
        ("llama", {}),
        ("llama", {"kind": "low-rank"}),
        ("llama", {"layout": "balanced"}),
        ("llama", {"max_error": 0.5}),
        ("phi3", {"layout": "one-sided"}),
        ("llama", {"kind": "split", "experts": 4}),
        ("llama", {"kind": "split", "experts": 10, "shared_experts": 2}),
        ("mixtral", {"keep": 0.5}),
    ],
)
def test_whatever_is_planned_can_be_timed(folder, options, folders, monkeypatch):
    """Its own work, whole or on cut matrices; of a machine that is slower by 1,000."""
    planned = plan(Recipe(str(folders / folder), **(options if folder == "mixtral" else SMALL | options)))

    def timed(work):
        work()
        return 1.0

    monkeypatch.setattr(times, "_timed", timed)
    flops = times._products_per_second(torch.device("cpu")) / 1000
    for tried, is_cut in ((1 << 20, False), (64, True)):
        monkeypatch.setattr(times, "TRIED", tried)
        monkeypatch.setattr(times, "STEP", 4)
        costs = times.measure(planned, disk=1e9, flops=flops)
        assert costs.disk == 1e9 and costs.ffns.keys() == {ffn.ffn.key for ffn in planned.ffns}
        for ffn in planned.ffns:
            parts = len(ffn.matrices) if folder == "mixtral" else 1
            assert costs.ffns[ffn.ffn.key] >= (1050 if is_cut else 999) * parts


def test_the_command_times(folders):
    args = ["plan", str(folders / "llama"), "--experts", "2", "--bond-dim", "4", "--max-shard-size", "4KB"]
    shown = CliRunner().invoke(main, [*args, "--processes", "2", "--time", "--disk-speed", "0.001"])
    assert shown.exit_code == 0, shown.output
    assert "About " in shown.output and "with a disk of 1.0 MB/s" in shown.output
    found = json.loads(CliRunner().invoke(main, [*args, "--time", "--json"]).output)
    assert len(found["processes"]) == 1 and found["seconds"] > found["costs"]["ffn_seconds"] > 0


def test_one_file_for_several_processes_is_refused(folders):
    args = ["plan", str(folders / "llama"), "--experts", "2", "--processes", "2"]
    found = CliRunner().invoke(main, args)
    assert (
        found.exit_code == 2 and "2 processes have one weight file to write; expected one for" in found.output
    )
