"""A conversion that was interrupted goes on from its finished weight files."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers.commands import tree
from helpers.data import words
from helpers.stock_mixtures import make_model
from helpers.tiny import save_tiny, save_tokenizer
from safetensors.torch import load_file, save_file

from mpoe_convert import Recipe, convert
from mpoe_convert.artifact.folder import count_finished, find_resumable
from mpoe_convert.cli import main
from mpoe_convert.conversion import convert as conversion
from mpoe_convert.conversion import shards
from mpoe_convert.errors import CheckpointError, MachineError, OutputError, RecipeError

CALLS = {
    "dense": {"model": "llama", "experts": 2, "bond_dim": 4},
    "budget": {"model": "llama", "experts": 2, "bond_dim": 2, "keep": 0.9},
    "orders": {"model": "llama", "experts": 2, "bond_dim": 8, "layout": "balanced"},
    "mixture": {
        "model": "mixtral",
        "keep": 0.6,
        "experts": 3,
        "calibrate": "text.txt",
        "calibration_tokens": 1024,
    },
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    save_tiny("llama", "AutoModelForCausalLM", folder / "llama")
    make_model("mixtral").save_pretrained(folder / "mixtral")
    save_tokenizer(folder / "mixtral")
    (folder / "text.txt").write_text(words(4000), encoding="utf-8")
    return folder


@pytest.fixture
def work(sources, tmp_path, monkeypatch):
    """The current folder, with the sources."""
    shutil.copytree(sources, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(case: str = "dense", **options) -> Recipe:
    return Recipe(**CALLS[case] | {"max_shard_size": "4KB"} | options)


@contextmanager
def saving(after: int | None = None, error: BaseException | None = None) -> Iterator[list[str]]:
    """The names of the weight files that are saved; `error` comes in place of the one behind `after`."""
    files: list[str] = []
    save = conversion.stream_shard

    def watched(specs, tensors, path: Path):
        if len(files) == after:
            assert error is not None
            raise error
        files.append(path.name)
        save(specs, tensors, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "stream_shard", watched)
        yield files


def interrupt(made: Recipe, after: int = 2, error: BaseException | None = None) -> Path:
    """What a run leaves that is interrupted when it has finished some files."""
    error = error or KeyboardInterrupt()
    with saving(after, error), pytest.raises(type(error)):
        convert(made, "out", resume=True)
    left = find_resumable(Path("out"))
    assert left is not None and count_finished(left) == after and not Path("out").exists()
    return left


@pytest.mark.parametrize("case", CALLS)
def test_it_goes_on_and_writes_the_same(work, case):
    with saving() as all_files:
        whole = convert(recipe(case), "whole")
    interrupt(recipe(case))
    with saving() as files:
        resumed = convert(recipe(case), "out", resume=True)
    assert files == all_files[2:] and len(files) > 1
    assert bool(whole.neuron_orders) == (case == "orders")
    assert tree(Path("out")) == tree(Path("whole")) and resumed.to_json() == whole.to_json()
    assert not [path for path in work.iterdir() if path.name.startswith(".")]


def test_it_may_be_interrupted_again_and_by_an_error(work):
    convert(recipe(), "whole")
    interrupt(recipe(), 1)
    with (
        saving(1, CheckpointError("it broke")),
        pytest.raises(
            CheckpointError, match=r"^it broke; 2 of \d+ weight files are kept in '\.out\."
        ) as told,
    ):
        convert(recipe(), "out", resume=True)
    assert str(told.value).endswith("run it again with resume=True to go on")
    convert(recipe(), "out", resume=True)
    assert tree(Path("out")) == tree(Path("whole"))


def test_a_full_disk_keeps_what_is_finished(work):
    with (
        saving(2, OSError(28, "No space left on device")),
        pytest.raises(
            OutputError, match=r"^the disk is full; .* run again; 2 of \d+ weight files are kept in"
        ),
    ):
        convert(recipe(), "out", resume=True)
    assert count_finished(find_resumable(Path("out"))) == 2


def test_a_change_in_any_of_a_mixture_s_files_is_seen(work):
    """A tensor of all experts is made of several files."""
    shutil.rmtree("mixtral")
    make_model("mixtral").save_pretrained("mixtral", max_shard_size="4KB")
    files = sorted(Path("mixtral").glob("model-*.safetensors"))
    assert len(files) > 4
    made = Recipe("mixtral", keep=0.6, max_shard_size="4KB")
    for file in files:
        left = interrupt(made)
        file.touch()
        with pytest.raises(RecipeError, match=rf"^the source's '{file.name}' has changed since the inter"):
            convert(made, "out", resume=True)
        shutil.rmtree(left)


def test_without_the_option_nothing_is_kept_and_what_was_kept_goes(work):
    interrupt(recipe())
    with saving(2, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        convert(recipe(), "out")
    assert find_resumable(Path("out")) is None and not list(work.glob(".out*"))


def test_a_run_without_a_finished_file_leaves_nothing(work):
    with saving(0, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt, match="^$"):
        convert(recipe(), "out", resume=True)
    assert not list(work.glob(".out*"))


@pytest.mark.parametrize("harm", ["changed", "cut", "gone", "begun"])
def test_files_that_do_not_hold_are_made_again(work, harm):
    convert(recipe(), "whole")
    left = interrupt(recipe())
    first, second = sorted((left / "artifact").glob("model-*.safetensors"))
    if harm == "changed":  # as long as before
        data = bytearray(second.read_bytes())
        data[-1] ^= 1
        second.write_bytes(data)
    elif harm == "cut":
        second.write_bytes(second.read_bytes()[:-4])
    elif harm == "gone":
        second.unlink()
    else:  # a file that the interrupted run had only begun
        name = second.name.replace("00002", "00003")
        (second.parent / name).write_bytes(b"begun")
        (second.parent / "code").mkdir()
        (second.parent / "code" / "stray.py").write_text("")
    with saving() as files:
        convert(recipe(), "out", resume=True)
    assert first.name not in files and (second.name in files) == (harm != "begun")
    assert tree(Path("out")) == tree(Path("whole"))


def touch_a_weight() -> None:
    tensors = load_file("llama/model.safetensors")
    tensors["model.norm.weight"] += torch.ones(())
    save_file(tensors, "llama/model.safetensors", metadata={"format": "pt"})


REFUSED = {
    "option": ({"noise": 0.2}, lambda: None, r"the interrupted run had noise=0\.01, this one has noise=0\.2"),
    "nothing": ({"layers": "0"}, lambda: None, r"the interrupted run had no layers, this one has layers='0'"),
    "source": (
        {},
        touch_a_weight,
        r"the source's 'model\.safetensors' has changed since the interrupted run",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_run_is_refused_by_name(work, case):
    options, change, words = REFUSED[case]
    left = interrupt(recipe())
    change()
    with pytest.raises(RecipeError, match=rf"^{words}; repeat that run's options .* leave out resume=True"):
        convert(recipe(**options), "out", resume=True)
    assert find_resumable(Path("out")) == left and count_finished(left) == 2
    convert(recipe(**options), "out")


def test_another_release_is_refused(work, monkeypatch):
    interrupt(recipe())
    monkeypatch.setattr(shards, "__version__", "99.0")
    with pytest.raises(RecipeError, match=r"^the interrupted run was of mpoe-convert \S+, this is 99\.0; "):
        convert(recipe(), "out", resume=True)


def test_the_command_says_what_is_kept_and_goes_on(work):
    command = [
        "llama",
        "--experts",
        "2",
        "--bond-dim",
        "4",
        "--max-shard-size",
        "4KB",
        "-o",
        "out",
        "--resume",
    ]
    with saving(3, KeyboardInterrupt()):
        stopped = CliRunner().invoke(main, command)
    assert stopped.exit_code == 130
    assert re.fullmatch(
        r"Stopped by SIGINT; 3 of \d+ weight files are kept in '\.out\.\w+\.partial': run it again with "
        r"--resume to go on\.\n",
        stopped.stderr,
    )
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0 and re.search(
        r"^Going on with '\.out\.\w+\.partial', where an interrupted run left 3 weight files\.$",
        done.stderr,
        re.M,
    )


def test_what_is_kept_is_said_in_the_words_of_the_same_error(work):
    """Of several processes those that another one speaks for stay silent."""
    told = MachineError("another process has ended")
    told.is_told = True
    with saving(2, told), pytest.raises(MachineError, match=r"^another process has ended; 2 of ") as caught:
        convert(recipe(), "out", resume=True)
    assert caught.value.is_told
