"""The artifact appears whole or not at all, replaces nothing but its own kind, and repeats to the byte."""

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import torch
from helpers.forked import Server
from helpers.tiny import save_tiny
from safetensors.torch import load_file, save_file

from mpoe_convert import MpoeError, Recipe, convert
from mpoe_convert.artifact import companions, layout, weight_files
from mpoe_convert.artifact import folder as artifact_folder
from mpoe_convert.conversion import card
from mpoe_convert.conversion import convert as conversion
from mpoe_convert.errors import OutputError

SMALL = {"experts": 2, "bond_dim": 4}
ARGS = ["--experts", "2", "--bond-dim", "4", "-q"]
NOBODY = 65534
FILES = {
    "README.md",
    "config.json",
    "conversion_report.json",
    "custom_generate",
    "custom_generate/generate.py",
    "generation_config.json",
    "model.safetensors",
    "modeling_mpoe.py",
    "mpoe_recipe.yaml",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return save_tiny("gpt2", "AutoModelForCausalLM", tmp_path_factory.mktemp("source") / "dense")


@pytest.fixture
def source(dense, tmp_path) -> Path:
    """A copy of the source in the run's folder, so that the recipe says "dense"."""
    shutil.copytree(dense, tmp_path / "dense")
    return tmp_path / "dense"


def tree(folder: Path) -> dict[str, str]:
    """Every path below the folder with a digest of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def one_line(text: str) -> str:
    """The error as it is told: one line and nothing else."""
    assert re.fullmatch(r"[^\n]+\n", text), text
    return text


# ------------------------------------------------------------------------------------- whole or not at all


def test_a_run_leaves_the_artifact_and_nothing_else(source, tmp_path, server):
    before = tree(source)
    run = server.run(["dense", "-o", "out", *ARGS], tmp_path)
    assert (run.code, run.stdout, run.stderr) == (0, "", "")
    assert set(tree(tmp_path / "out")) == FILES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out"]
    assert tree(source) == before


def test_folders_above_the_output_are_made(source, tmp_path):
    convert(Recipe(str(source), **SMALL), tmp_path / "a" / "b" / "out")
    assert layout.is_artifact(tmp_path / "a" / "b" / "out")


def test_an_empty_folder_may_be_the_output(source, tmp_path):
    (tmp_path / "out").mkdir()
    convert(Recipe(str(source), **SMALL), tmp_path / "out")
    assert layout.is_artifact(tmp_path / "out")


@pytest.mark.parametrize("nested", [False, True])
def test_a_failure_leaves_nothing_not_even_folders_above(nested, source, tmp_path):
    weights = load_file(source / "model.safetensors")
    weights["transformer.h.1.mlp.c_proj.weight"][3, 2] = torch.nan
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    before = tree(tmp_path)
    output = tmp_path / "a" / "b" / "out" if nested else tmp_path / "out"
    with pytest.raises(MpoeError, match=r"h\.1\.mlp\.c_proj\.weight holds NaN or Inf in 1 of 384 places"):
        convert(Recipe(str(source), **SMALL), output)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_stopped_run_leaves_nothing(sent, source, tmp_path, server):
    before = tree(tmp_path)
    run = server.start(["dense", "-o", "new/out", *ARGS], tmp_path, matrix_seconds=5)
    wait_for(lambda: list(tmp_path.glob("new/.out.*.partial/artifact/config.json")))
    os.kill(run.pid, getattr(signal, sent))
    run.wait()
    assert run.code == 128 + getattr(signal, sent)
    assert one_line(run.stderr) == f"Stopped by {sent}; no output was written.\n"
    assert tree(tmp_path) == before


def test_a_run_stopped_while_replacing_leaves_the_old_artifact(source, tmp_path, server):
    server.run(["dense", "-o", "out", *ARGS], tmp_path)
    before = tree(tmp_path)
    run = server.start(
        ["dense", "-o", "out", "--overwrite", "--seed", "1", *ARGS], tmp_path, matrix_seconds=5
    )
    wait_for(lambda: list(tmp_path.glob(".out.*.partial/artifact/config.json")))
    os.kill(run.pid, signal.SIGINT)
    assert run.wait().code == 130
    assert tree(tmp_path) == before


def test_an_impatient_second_interrupt_does_not_disturb_the_cleaning_up(source, tmp_path, server):
    before = tree(tmp_path)
    run = server.start(["dense", "-o", "out", *ARGS], tmp_path, matrix_seconds=5)
    wait_for(lambda: list(tmp_path.glob(".out.*.partial/artifact/config.json")))
    partial = next(tmp_path.glob(".out.*.partial"))
    for number in range(3000):  # so many files that removing them takes a while
        (partial / str(number)).touch()
    for _ in range(20):
        os.kill(run.pid, signal.SIGINT)
        time.sleep(0.001)
    assert run.wait().code == 130
    assert tree(tmp_path) == before


def wait_for(happens, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@pytest.mark.parametrize("stage", ["before", "between"])
def test_an_interrupt_while_moving_brings_the_old_artifact_back(stage, source, tmp_path, monkeypatch):
    convert(Recipe(str(source), **SMALL), tmp_path / "out")
    before = tree(tmp_path)
    replace, calls = os.replace, []

    def interrupted(*paths):
        calls.append(paths)
        if len(calls) == (1 if stage == "before" else 2):
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(artifact_folder.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(Recipe(str(source), seed=1, **SMALL), tmp_path / "out", overwrite=True)
    assert tree(tmp_path) == before


# --------------------------------------------------------------------------------------- full, read-only


def test_a_file_that_may_not_grow_is_told_and_leaves_nothing(source, tmp_path, server):
    before = tree(tmp_path)
    run = server.run(["dense", "-o", "out", *ARGS], tmp_path, file_bytes=20_000)
    assert run.code == 1
    assert "Error: cannot write 'out': " in one_line(run.stderr)
    assert "File too large" in run.stderr and "nothing was left there" in run.stderr
    assert tree(tmp_path) == before


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.returncode:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_without_room_is_told_before_any_work(source, small_disk, server, tmp_path):
    (small_disk / "filling").write_bytes(bytes(240 * 1024))
    run = server.run([source, "-o", small_disk / "out", *ARGS], tmp_path)
    assert run.code == 1
    assert re.search(r"the artifact needs 0\.0 MB and .* has 0\.0 MB free; free some", one_line(run.stderr))
    assert [path.name for path in small_disk.iterdir()] == ["filling"]


def test_a_disk_that_fills_up_is_told_and_leaves_nothing(source, small_disk, server, tmp_path):
    run = server.start([source, "-o", small_disk / "out", *ARGS], tmp_path, matrix_seconds=0.3)
    wait_for(lambda: list(small_disk.glob(".out.*.partial/artifact/modeling_mpoe.py")))
    with pytest.raises(OSError, match="No space left"), (small_disk / "filling").open("wb", 0) as filling:
        while True:
            filling.write(bytes(4096))
    run.wait()
    assert run.code == 1
    assert one_line(run.stderr).startswith(f"Error: the disk is full; nothing was left at '{small_disk}/out'")
    assert [path.name for path in small_disk.iterdir()] == ["filling"]


@pytest.mark.parametrize("where", ["companion", "shard", "card", "report"])
def test_no_space_is_noticed_wherever_it_ends(where, source, tmp_path, monkeypatch):
    """What the tmpfs tests do for real, at every writer, and where mounting is not allowed."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    place = {
        "companion": (companions.shutil, "copyfile"),
        "shard": (weight_files, "_write_at"),
        "card": (card, "write"),
        "report": (conversion, "write_json"),
    }

    def refuse(*args, **options):
        raise full

    before = tree(tmp_path)
    monkeypatch.setattr(*place[where], refuse)
    with pytest.raises(OutputError, match="the disk is full; nothing was left at '.*out': free some space"):
        convert(Recipe(str(source), **SMALL), tmp_path / "out")
    assert tree(tmp_path) == before


@pytest.fixture
def open_folder(dense):
    """A folder that another user can reach (pytest's own are private), with a source in it."""
    folder = Path(tempfile.mkdtemp(prefix="mpoe-output-"))
    folder.chmod(0o755)
    shutil.copytree(dense, folder / "dense")
    yield folder
    shutil.rmtree(folder)


def test_a_folder_that_is_not_writable_is_told_and_untouched(open_folder, server):
    if os.geteuid() != 0:
        pytest.skip("starting a process of another user needs root")
    before = tree(open_folder)
    for output in ("out", "deep/er/out"):
        run = server.run(["dense", "-o", output, *ARGS], open_folder, uid=NOBODY)
        assert run.code == 1
        expected = f"Error: cannot write '{output}': '{open_folder}' is not writable; choose another output\n"
        assert one_line(run.stderr) == expected
    assert tree(open_folder) == before


def test_an_unreadable_source_is_told(open_folder, server):
    if os.geteuid() != 0:
        pytest.skip("starting a process of another user needs root")
    (open_folder / "dense" / "model.safetensors").chmod(0o600)
    open_folder.chmod(0o777)
    run = server.run(["dense", "-o", "out", *ARGS], open_folder, uid=NOBODY)
    assert run.code == 1
    assert "dense/model.safetensors' cannot be read (Permission denied)" in one_line(run.stderr)
    assert [path.name for path in open_folder.iterdir()] == ["dense"]


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("file", "'file' exists and is not a folder; choose another output"),
        ("file/out", "file' is a file; choose another output"),
        ("link", "nowhere', which is not there; make that folder, or choose another output"),
        ("dense", "'dense' is not empty and not an artifact of mpoe-convert; nothing in it is touched"),
        ("dense/out", "lie inside each other; choose a folder outside the source"),
        ("dense/empty", "lie inside each other; choose a folder outside the source"),
        (".", "the output '.' is the current folder; name one that can be replaced"),
        ("..", "is not empty and not an artifact of mpoe-convert"),
        ("/", "is not empty and not an artifact of mpoe-convert"),
    ],
)
def test_impossible_outputs_are_refused_and_lose_nothing(output, expected, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to("nowhere")
    (source / "empty").mkdir()
    before = tree(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=re.escape(expected)) as caught:
            convert(Recipe("dense", **SMALL), output, overwrite=overwrite)
        assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before


# ------------------------------------------------------------------------------------------- overwriting


def test_a_link_to_a_folder_stays_one_and_its_folder_is_written(source, tmp_path):
    (tmp_path / "disk/empty").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/empty")
    convert(Recipe(str(source), **SMALL), tmp_path / "link")
    with pytest.raises(
        OutputError, match="link' already holds an artifact; pass overwrite=True to replace it"
    ):
        convert(Recipe(str(source), **SMALL), tmp_path / "link")
    convert(Recipe(str(source), **SMALL), tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk/empty/config.json").is_file()
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["empty"]
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "to-file").symlink_to("file")
    for output, said in (
        ("loop", "which is not there"),
        ("to-file", "file', which exists and is not a folder"),
    ):
        with pytest.raises(OutputError, match=said):
            convert(Recipe(str(source), **SMALL), tmp_path / output)


def test_overwrite_replaces_an_artifact_and_only_when_asked(source, tmp_path):
    out = tmp_path / "out"
    convert(Recipe(str(source), **SMALL), out)
    before = tree(tmp_path)
    with pytest.raises(OutputError, match="already holds an artifact; pass overwrite=True to replace it"):
        convert(Recipe(str(source), seed=1, **SMALL), out)
    assert tree(tmp_path) == before
    convert(Recipe(str(source), seed=1, **SMALL), out, overwrite=True)
    assert tree(tmp_path) != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out"]
    assert json.loads((out / "conversion_report.json").read_text())["recipe"]["seed"] == 1


def spoil_nothing_in_it(out):
    shutil.rmtree(out)
    out.mkdir()
    (out / "notes.txt").write_text("precious")


def spoil_other_config(out):
    (out / "config.json").write_text('{"model_type": "gpt2"}')


def spoil_no_report(out):
    (out / "conversion_report.json").unlink()


def spoil_damaged_report(out):
    (out / "conversion_report.json").write_text('{"files": [')


def spoil_file_beside(out):
    (out / "notes.txt").write_text("precious")


def spoil_folder_beside(out):
    (out / "checkpoint-100").mkdir()


SPOILS = {
    spoil_nothing_in_it: "is not empty and not an artifact of mpoe-convert; nothing in it is touched",
    spoil_other_config: "is not empty and not an artifact of mpoe-convert; nothing in it is touched",
    spoil_no_report: "is not empty and not an artifact of mpoe-convert; nothing in it is touched",
    spoil_damaged_report: "conversion_report.json' is not JSON",
    spoil_file_beside: "also holds 'notes.txt', which mpoe-convert did not write; move",
    spoil_folder_beside: "also holds 'checkpoint-100', which mpoe-convert did not write; move",
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_overwrite_touches_nothing_that_is_not_ours(spoil, source, tmp_path):
    out = tmp_path / "out"
    convert(Recipe(str(source), **SMALL), out)
    spoil(out)
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=SPOILS[spoil]):
        convert(Recipe(str(source), **SMALL), out, overwrite=True)
    assert tree(tmp_path) == before


def test_an_output_that_appears_meanwhile_is_not_replaced(source, tmp_path):
    """Somebody else fills the folder while the conversion runs."""
    out = tmp_path / "out"

    def fill(name, done, total, report):
        out.mkdir(exist_ok=True)
        (out / "notes.txt").write_text("precious")

    with pytest.raises(OutputError, match="is not empty and not an artifact"):
        convert(Recipe(str(source), **SMALL), out, progress=fill)
    assert tree(tmp_path / "out").keys() == {"notes.txt"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out"]


# ------------------------------------------------------------------------------------- modes, repetition


@pytest.mark.parametrize(("umask", "folder", "file"), [(0o022, 0o755, 0o644), (0o027, 0o750, 0o640)])
def test_modes_follow_the_umask(umask, folder, file, source, tmp_path, server):
    assert server.run(["dense", "-o", "out", *ARGS], tmp_path, umask=umask).code == 0
    assert (tmp_path / "out").stat().st_mode & 0o777 == folder
    modes = {(path.is_dir(), path.stat().st_mode & 0o777) for path in (tmp_path / "out").rglob("*")}
    assert modes == {(True, folder), (False, file)}


@pytest.mark.parametrize("layout", ["one-sided", "two-sided", "balanced"])
def test_two_runs_write_the_same_bytes(layout, source, tmp_path, server, monkeypatch):
    """In processes of their own or in one: every file, not just the weights."""
    args = ["--layout", layout, "--bias", "per-expert", *ARGS]
    server.run(["dense", "-o", "one", *args], tmp_path)
    monkeypatch.chdir(tmp_path)
    recipe = Recipe("dense", layout=layout, bias="per-expert", **SMALL)
    convert(recipe, "two")
    one = tree(tmp_path / "one")
    assert one == tree(tmp_path / "two") and set(one) == FILES
    convert(recipe.replace(seed=1), "three")
    assert tree(tmp_path / "three")["model.safetensors"] != one["model.safetensors"]


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def assert_same_tensors(found: dict, expected: dict) -> None:
    assert found and found.keys() <= expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("size", ["20kB", "4kB", "1kB"])
def test_shards_hold_the_tensors_of_the_whole(size, source, tmp_path):
    convert(Recipe(str(source), **SMALL), tmp_path / "whole")
    convert(Recipe(str(source), max_shard_size=size, **SMALL), tmp_path / "shards")
    whole, shards = all_tensors(tmp_path / "whole"), all_tensors(tmp_path / "shards")
    assert whole.keys() == shards.keys()
    assert_same_tensors(shards, whole)
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "shards" / file)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert index["weight_map"].keys() == whole.keys()


@pytest.mark.parametrize("choice", [{"layers": "1"}, {"include": "h.0"}, {"exclude": "h.0"}])
def test_a_subset_of_layers_makes_the_same_tensors_for_them(choice, source, tmp_path):
    convert(Recipe(str(source), **SMALL), tmp_path / "whole")
    convert(Recipe(str(source), **SMALL, **choice), tmp_path / "part")
    whole, part = all_tensors(tmp_path / "whole"), all_tensors(tmp_path / "part")
    original = load_file(source / "model.safetensors")
    made = {name: tensor for name, tensor in part.items() if name not in original}
    assert any("router" in name for name in made) and any(".mlp.c_fc." in name for name in part)
    assert_same_tensors(made, whole)
    assert_same_tensors({n: t for n, t in part.items() if n in original}, original)


def test_every_matrix_and_router_draws_numbers_of_its_own(source, tmp_path):
    """One seed, but no two tensors with the same noise."""
    convert(Recipe(str(source), **SMALL), tmp_path / "out")
    tensors = all_tensors(tmp_path / "out")
    routers = [tensor for name, tensor in tensors.items() if name.endswith("router.weight")]
    assert len(routers) == 2 and not torch.equal(*routers)
    noise = [(t[1] - t[0]) / t[0].norm() for name, t in tensors.items() if name.endswith("up.terms.0.aux_0")]
    assert len(noise) == 2 and not torch.allclose(*noise)
