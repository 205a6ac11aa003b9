"""What a run that was killed leaves beside its output, and what the next one makes of it."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers.commands import tree

from mpoe_convert.artifact import folder
from mpoe_convert.artifact.folder import TemporaryFolder, remove_leftovers, scratch, staged
from mpoe_convert.artifact.layout import EXPORT_REPORT_FILE
from mpoe_convert.cli import main

# Writes a part of "out", and waits. The process is then killed, or ended in an orderly way.
WRITER = """
import sys
import tempfile
from pathlib import Path
from mpoe_convert.artifact.folder import staged
with staged(Path("out"), overwrite=True) as folder:
    (folder / "half").write_text("half")
    print(folder, flush=True)
    sys.stdin.read()
    (folder / "whole").write_text("whole")
"""


@pytest.fixture
def writer(tmp_path, monkeypatch):
    """A living run that has written a part of "out", and its temporary folder."""
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-c", WRITER]
    run = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    yield run, Path(run.stdout.readline().strip()).parent
    run.kill()
    run.wait()
    run.stdin.close()
    run.stdout.close()


def export(path: Path, text: str) -> Path:
    """A folder that looks like one that this tool wrote."""
    path.mkdir()
    (path / "weights").write_text(text)
    (path / EXPORT_REPORT_FILE).write_text(json.dumps({"files": ["weights", EXPORT_REPORT_FILE]}))
    return path


def test_what_a_killed_run_left_is_removed_and_what_a_living_one_writes_is_not(writer):
    run, partial = writer
    assert remove_leftovers(Path("out")) == [] and (partial / "artifact" / "half").exists()
    with staged(Path("out")) as mine:  # two at once: the other one's work stays
        (mine / "mine").touch()
    assert (partial / "artifact" / "half").exists()
    run.kill()
    run.wait()
    assert remove_leftovers(Path("other")) == []
    assert remove_leftovers(Path("out")) == [partial]
    assert tree(Path.cwd()) == {"out": "", "out/mine": tree(Path("out"))["mine"]}


def test_the_next_run_removes_it(writer):
    run, partial = writer
    run.kill()
    run.wait()
    with staged(Path("out")) as mine:
        (mine / "mine").touch()
        assert not partial.exists()
    assert [path.name for path in Path.cwd().iterdir()] == ["out"]


def test_a_run_ends_as_before_while_another_one_looks_for_leftovers(writer):
    run, _ = writer
    assert remove_leftovers(Path("out")) == []
    run.stdin.close()
    assert run.wait() == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["half", "whole"]


def test_the_command_names_what_it_removes(writer):
    run, partial = writer
    run.kill()
    run.wait()
    done = CliRunner().invoke(main, ["convert", "./absent", "-o", "out"])
    assert partial.exists() and "there is no folder './absent'" in done.stderr  # nothing is begun
    Path("empty").mkdir()
    done = CliRunner().invoke(main, ["convert", "empty", "-o", "out"])
    assert done.stderr.splitlines()[0] == f"Removed '{partial}', which a run that was killed had left."
    assert not partial.exists() and done.stdout == ""


CUT = """
import os
from pathlib import Path
from mpoe_convert.artifact.folder import staged
replace, calls = os.replace, []
def cut(*paths):
    replace(*paths)
    calls.append(paths)
    if len(calls) == {}:
        os._exit(9)
os.replace = cut
with staged(Path("out"), overwrite=True) as folder:
    (folder / "new").touch()
"""


@pytest.mark.parametrize("replacements", [1, 2])
def test_a_run_that_is_killed_while_it_replaces_an_artifact_loses_neither(
    replacements, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    export(Path("out"), "old")
    done = subprocess.run([sys.executable, "-c", CUT.format(replacements)], cwd=tmp_path)
    assert done.returncode == 9 and Path("out").exists() == (replacements == 2)
    assert len(remove_leftovers(Path("out"))) == 1
    assert [path.name for path in Path.cwd().iterdir()] == ["out"]
    names = {path.name for path in Path("out").iterdir()}
    assert names == ({"new"} if replacements == 2 else {"weights", EXPORT_REPORT_FILE})


def test_nothing_that_is_not_such_a_folder_is_touched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (".out.abcdefgh.partial", ".out.abcdefgh.old", ".out.x.abcdefgh.partial", ".out.partial"):
        Path(name).mkdir()
        (Path(name) / "mine").touch()
    for name in (".out.x.abcdefgi.partial", ".out.short.partial"):
        Path(name).mkdir()
        (Path(name) / folder.LOCK).touch()
    Path("elsewhere").mkdir()
    Path("elsewhere", folder.LOCK).touch()
    Path(".out.abcdefgj.partial").symlink_to("elsewhere")
    Path(".out.abcdefgk.partial").touch()
    before = tree(tmp_path)
    assert remove_leftovers(Path("out")) == [] and tree(tmp_path) == before
    assert remove_leftovers(Path("absent/out")) == []


def test_where_there_are_no_locks_nothing_is_taken_for_a_leftover(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def refuse(*_):
        raise OSError(95, os.strerror(95))

    monkeypatch.setattr(folder.fcntl, "flock", refuse)
    with scratch(Path("out")) as mine:
        assert not (mine.parent / folder.LOCK).exists()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("case", ["resumed", "removed", "temporary"])
def test_where_locks_are_refused_no_descriptor_stays_open(case, tmp_path, monkeypatch):
    name = "mine-x" if case == "temporary" else ".out.abcdefgh.partial"
    left = tmp_path / name
    left.mkdir()
    for file in (folder.LOCK, folder.RUN):
        (left / file).touch()
    opened = []

    def refuse(lock, _):
        opened.append(lock)
        raise OSError(95, os.strerror(95))

    monkeypatch.setattr(folder.fcntl, "flock", refuse)
    monkeypatch.setattr(folder, "count_finished", lambda _: 1)
    if case == "resumed":
        with pytest.raises(OSError, match="not supported"):
            folder._taken_up(tmp_path / "out")
    elif case == "removed":
        assert remove_leftovers(tmp_path / "out") == []
    else:
        folder._remove_dead("mine-", tmp_path)
    assert left.is_dir() and len(opened) == 1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])


def test_temporary_folders_lie_beside_the_target_of_a_link(tmp_path):
    (tmp_path / "disk/out").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/out")
    with scratch(tmp_path / "link") as made:
        assert made.parent.parent == tmp_path / "disk" and made.parent.name.startswith(".out.")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


def test_temporary_folders_last_as_long_as_their_process(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = f"""
import os, tempfile
tempfile.tempdir = {str(tmp_path)!r}
from mpoe_convert.artifact.folder import TemporaryFolder
first, second = TemporaryFolder("mpoe-test-"), TemporaryFolder("mpoe-test-")
second.close()
print(first.path, flush=True)
input()
os.kill(os.getpid(), 9)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True)
    living = Path(process.stdout.readline().strip())
    (tmp_path / "mpoe-test-foreign").mkdir()  # without a lock: not ours
    mine = TemporaryFolder("mpoe-test-")
    assert sorted(tmp_path.iterdir()) == sorted([living, mine.path, tmp_path / "mpoe-test-foreign"])
    process.communicate("\n")
    other = TemporaryFolder("mpoe-test-")
    assert not living.exists() and mine.path.is_dir()
    other.close()
    del mine
    assert list(tmp_path.iterdir()) == [tmp_path / "mpoe-test-foreign"]
