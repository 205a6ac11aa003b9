"""`finetune` on the command line: signals, their exit codes and the command that goes on; bars."""

import io
import re
import shlex
import signal

import pytest
from click.testing import CliRunner
from helpers.data import words
from helpers.tiny import save_tiny, save_tokenizer
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file

from mpoe_convert.cli import main
from mpoe_convert.cli.progress import TrainingProgress, export_progress, training_progress
from mpoe_convert.cli.tables import print_training
from mpoe_convert.cli.train import RepeatableCommand, continuing_command

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")


@pytest.fixture
def command(tmp_path, monkeypatch) -> list[str]:
    """A run of four steps in a folder whose names have blanks."""
    monkeypatch.chdir(tmp_path)
    save_tokenizer(save_tiny("gpt2", "AutoModelForCausalLM", tmp_path / "a model"))
    (tmp_path / "a text.txt").write_text(words(200))
    numbers = ["--length", "8", "--batch-size", "2", "--steps", "4", "--save-every", "3"]
    return ["finetune", "a model", "--data", "a text.txt", *numbers, "--token", "secret"]


def call(args: list[str]):
    return CliRunner().invoke(main, args, prog_name="mpoe-convert")


def send(number: int, times: int, monkeypatch) -> None:
    """Send a signal in the second step."""
    watch = TrainingProgress.watch

    def watch_and_send(self, what, done, total):
        watch(self, what, done, total)
        if (what, done) == ("training", 2):
            for _ in range(times):
                signal.raise_signal(number)

    monkeypatch.setattr(TrainingProgress, "watch", watch_and_send)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(number, code, command, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        send(number, 1, patched)
        stopped = call([*command, "-o", "stopped"])
    assert stopped.exit_code == code and stopped.stdout == ""
    *_, last = stopped.stderr.splitlines()
    said, _, again = last.partition(". Go on with: ")
    assert number.name in said and "step 2" in said and "Traceback" not in stopped.stderr
    assert [path.name for path in (tmp_path / "stopped").iterdir()] == ["checkpoint-2"]
    name, *args = shlex.split(again)
    assert name == "mpoe-convert" and "secret" not in again
    assert call(args).exit_code == call([*command, "-o", "whole"]).exit_code == 0
    resumed, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("stopped", "whole"))
    assert all(resumed[name].equal(whole[name]) for name in whole)


def test_two_signals_end_at_once(command, tmp_path, monkeypatch):
    send(signal.SIGINT, 2, monkeypatch)
    stopped = call([*command, "-o", "stopped"])
    assert stopped.exit_code == 130 and not (tmp_path / "stopped").exists()
    assert stopped.stderr.splitlines()[-1] == "Stopped by SIGINT; no output was written."


def test_what_is_in_the_way_is_told_before_anything_is_read(command, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("")
    command[1] = "no model"
    done = call([*command, "-o", "out"])
    assert (done.exit_code, done.stderr) == (
        1,
        "Error: 'out' already holds something: choose another folder\n",
    )


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--token", "x", "m 1"], "program 'm 1' --resume"),
        (["--token=x", "--resume", "m"], "program m --resume"),
    ],
)
def test_the_command_that_goes_on(args, expected, monkeypatch):
    command = RepeatableCommand("program", params=main.commands["finetune"].params)
    context = command.make_context("program", args)
    assert continuing_command(context) == expected
    monkeypatch.setenv("RANK", "0")
    assert continuing_command(context) == "the command that started it, and --resume"


# ---------------------------------------------------------------------------------------------------
# Bars


def screen(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100)


def test_bars_count_steps_and_batches():
    with training_progress(True, screen(True)) as shown:
        shown.watch("reading the data", 0, 0)
        assert not shown.bars.tasks
        shown.watch("training", 5, 20)  # a run that goes on
        (bar,) = shown.bars.tasks
        assert (bar.description, bar.completed, bar.total) == ("training", 5, 20)
        shown.watch("training", 6, 20)
        for batch in (1, 2):
            shown.watch("evaluating", batch, 3)
            assert [(each.description, each.completed) for each in shown.bars.tasks] == [
                ("training", 6),
                ("evaluating", batch),
            ]
        shown.watch("evaluating", 3, 3)
        assert [each.description for each in shown.bars.tasks] == ["training"]
        shown.bars.refresh()
    written = shown.out.file.getvalue()
    assert "reading the data" in written and "6/20" in written and "\x1b" in written


def test_a_bar_counts_only_what_can_be_counted():
    """The last frame of `export` and `prune` after each of their steps."""
    steps, frames = [("observing", 0, 0), ("h.0.weight", 1, 7), ("measuring", 0, 0)], []
    for last in range(1, len(steps) + 1):
        out = screen(True)
        with export_progress(True, out) as progress:
            for step in steps[:last]:
                progress(*step)
            out.file.truncate(0)
        frames.append(re.sub(r"\x1b\[[\d;?]*\w", "", out.file.getvalue()))
    assert ["observing" in frames[0], "1/7 h.0.weight" in frames[1], "measuring" in frames[2]] == [True] * 3
    assert "/" not in frames[0] + frames[2]


def test_a_first_frame_shows_the_total(monkeypatch):
    monkeypatch.setattr(Progress, "update", lambda *given, **kwargs: None)
    with training_progress(True, screen(True)) as shown:
        shown.watch("training", 0, 20)
        (bar,) = shown.bars.tasks
        assert (bar.completed, bar.total) == (0, 20)


@pytest.mark.parametrize(
    ("steps", "resumed", "line"),
    [(1, False, "1 step in 1 s; written to [b]out"), (1200, True, "1,200 steps; written to [b]out")],
)
def test_the_last_line_counts_steps(steps, resumed, line):
    report = {"steps": steps, "written_step": steps, "seconds": 1.2, "resumed": resumed, "log": []}
    out = screen(False)
    print_training(report | {"evaluation": None}, "[b]out", out)
    assert out.file.getvalue().splitlines()[-1] == line


def test_a_file_is_called_as_the_request(tmp_path):
    done = call(["finetune", "--config", str(tmp_path / "nope.yaml"), "-o", "out"])
    assert done.exit_code == 2 and "Error: cannot read the fine-tuning request " in done.stderr
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: t.txt\nset: {optim: sgd}")
    done = call(["finetune", "--config", str(file), "-o", "out"])
    told = "Error: the fine-tuning request has no key 'set'; the key of --set is 'arguments'\n"
    assert (done.exit_code, done.stderr) == (2, told)
    file.write_text("max-grad-norm: 1\nmax_grad_norm: 2")
    told = "Error: the fine-tuning request gives max_grad_norm twice"
    assert call(["finetune", "--config", str(file), "-o", "out"]).stderr.startswith(told)


def test_elsewhere_there_are_lines_alone():
    with training_progress(True, screen(False)) as shown:
        shown.watch("loading [b]the model", 0, 0)
        shown.watch("training", 0, 20)
        shown.watch("evaluating", 1, 3)
        shown.log(10, 20, {"loss": 2.5})
    assert shown.out.file.getvalue() == "loading [b]the model\nstep 10/20  loss 2.5\n"


@pytest.mark.parametrize(("enabled", "rank"), [(False, "0"), (True, "1")])
def test_nothing_is_shown(enabled, rank, monkeypatch):
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    with training_progress(enabled, screen(True)) as shown:
        assert shown is None
